"""Every puzzle is solved by a few lines, and its check refuses the untouched cell and wrong answers."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

from aespa_nb import puzzles
from aespa_nb.errors import AespaError

PAGE = Path(__file__).parents[1] / "nbs/start/08_puzzles.ipynb"
CELLS = ["".join(c["source"]) for c in json.loads(PAGE.read_text())["cells"] if c["cell_type"] == "code"]
CELLS = {m[1]: source for source in CELLS if (m := re.search(r"^check\((\w+)\)$", source, flags=re.M))}


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setattr(puzzles, "ANSWERS", {})
    yield
    plt.close("all")


def codes(W, scale, zero, bits):
    return (torch.round(W / scale) + zero).clamp(0, 2**bits - 1)


def row_grid(W, bits):
    low, high = W.amin(1, keepdim=True).clamp(max=0), W.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    return scale, torch.round(-low / scale)


def layer_loss(dW, H):
    return (dW @ H @ dW.T).trace()


def second_moment(X):
    return X @ X.T / X.shape[1]


def fitted_grid(W, bits):
    least = torch.full_like(W[:, :1], torch.inf)
    kept = row_grid(W, bits)
    for share in torch.arange(0.3, 1.01, 0.05):
        scale, zero = row_grid(share * W, bits)
        error = (scale * (codes(W, scale, zero, bits) - zero) - W).square().sum(1, keepdim=True)
        kept = tuple(torch.where(error < least, new, old) for new, old in zip((scale, zero), kept))
        least = torch.minimum(error, least)
    return kept


def compensate(W, j, error, U):
    return torch.cat([W[:, : j + 1], W[:, j + 1 :] - error[:, None] / U[j, j] * U[j, j + 1 :]], 1)


def probabilities(Q, K):
    S = Q.T @ K / len(Q) ** 0.5
    return (S + torch.full_like(S, -torch.inf).triu(1)).softmax(-1)


def value_moment(X, A):
    return (Y := X @ A.T) @ Y.T


def query_side(K, n_heads):
    return (K @ K.mT).repeat_interleave(n_heads // len(K), 0)


def two_sided_loss(dW, H, G):
    return (G @ dW @ H @ dW.T).trace()


def mean_over_positions(G, R):
    return (R.mT @ G @ R).mean(0)


def price_of_moves(E, H, scale):
    return 2 * scale * (E @ H) + scale**2 * H.diagonal()


def target(W, X, X_full):
    return torch.linalg.solve(X @ X.T, X @ X_full.T @ W.T).T


def pack3(codes):
    number = sum(int(c) * 8**i for i, c in enumerate(codes))
    return [number % 256, number // 256 % 256, number // 65536]


SOLVED = {name: globals()[name] for name in puzzles.PUZZLES}


def right(answer):
    puzzles.check(answer)
    return answer.__name__ in puzzles.ANSWERS


def spoiled(answer, how):
    "The answer, changed."
    new = lambda *a: tuple(how(v) for v in found) if isinstance(found := answer(*a), tuple) else how(found)
    new.__name__ = answer.__name__
    return new


@pytest.mark.parametrize("name", puzzles.PUZZLES)
def test_solved_by_a_few_lines_and_by_nothing_else(name, capsys):
    assert right(SOLVED[name]) and "right" in capsys.readouterr().out
    for how in (lambda v: torch.as_tensor(v) + 0.01, lambda v: None, lambda v: torch.as_tensor(v)[None], str):
        assert not right(spoiled(SOLVED[name], how))
        assert "not yet" in (said := capsys.readouterr().out) and "hint" in said
    puzzles.hint(name, len(puzzles.PUZZLES[name].hints))
    with pytest.raises(AespaError, match=" hints"):
        puzzles.hint(name, len(puzzles.PUZZLES[name].hints) + 1)


def test_every_untouched_cell_is_told_so(capsys):
    assert list(CELLS) == list(puzzles.PUZZLES)
    for source in CELLS.values():
        exec(source, dict(vars(puzzles)))
        assert "it returns nothing yet" in capsys.readouterr().out
        plt.close("all")


def test_the_answers_make_a_quantizer(monkeypatch):
    assert puzzles.board() is None
    puzzles.ANSWERS.update(SOLVED)
    short = lambda: full._replace(calib=full.calib[:2, :32], heldout=full.heldout[:, :32])
    full = puzzles.load_reference()
    full.model.model.layers = full.model.model.layers[:1]
    monkeypatch.setattr(puzzles, "load_reference", short)
    assert 0 < puzzles.board({"nothing": 1.0}, windows=2, progress=False) < 1
