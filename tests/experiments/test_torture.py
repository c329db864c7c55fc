"""A slice of experiments/torture.py: damaged models end in a model no worse than round-to-nearest, or in one line."""

import pytest
import torch
import torture
from aespa_nb import AespaConfig, NumericalError, quantize_model
from aespa_nb.attention.kronecker_losses import KroneckerLoss
from aespa_nb.quantize.layer import RoundedLayer, round_layer_safely
from aespa_nb.rounding.grid import minmax_grid
from models import refused

ROUNDED = [
    ("llama", "dead channels: all norm weights 0", "best"),
    ("llama", "exploding channel: norm weight times 1e+08", "gptq"),
    ("llama", "constant token stream", "best"),
    ("llama", "one sequence of three tokens", "turboboa"),
    ("llama", "weights: all equal", "max"),
    ("llama", "weights: equal within rows", "best"),
    ("llama", "weights: all 0", "aespa"),
    ("llama", "one outlier of 1e+03 in each weight", "best"),
    ("llama", "queries and keys times 1e+06", "best"),
    ("llama", "float16 that overflows in a block", "gptq"),
    ("opt", "duplicate channels", "zfold"),
    ("opt", "identical heads", "adaround"),
    ("moe", "constant token stream", "best"),
    ("moe", "experts: the router is blind", "gptq"),
]
REFUSED = [
    ("one outlier of 3e+38 in each weight", "NaN or Inf"),
    ("nan in a norm", "layernorm.weight has NaN or Inf: the checkpoint is damaged"),
    ("inf in the head", "lm_head.weight has NaN or Inf: the checkpoint is damaged"),
    ("nan in an embedding that no token uses", "embed_tokens.weight has NaN or Inf: the checkpoint is damaged"),
    ("float16, both ends at its largest number", "reaches beyond torch.float16: load the model as torch.float32"),
    ("exploding channel: norm weight times 1e+18", "take dtype=torch.float64"),
    ("sequences of one token", "at least 2 tokens"),
]


@pytest.mark.parametrize(("kind", "case", "preset"), ROUNDED)
def test_no_worse_than_round_to_nearest(kind, case, preset):
    rtn, row = (torture.one(kind, case, p) for p in ("rtn", preset))
    assert torture.judge(row, rtn) == "rounded", (row, rtn)


@pytest.mark.parametrize(("case", "message"), REFUSED)
def test_a_clear_line_else(case, message):
    row = torture.one("llama", case, "gptq")
    assert row["end"] == "refused" and message in row["why"], row


def indefinite(lowest):
    "Gives a Hessian one eigenvalue that it can't have."

    def change(W, H):
        Q, values = torch.linalg.eigh(H).eigenvectors, torch.linspace(0.5, 2, 16)
        values[3] = lowest
        return W, Q @ torch.diag(values) @ Q.T

    return change


def worse(W, *args):
    return RoundedLayer.of(torch.zeros(W.shape), minmax_grid(W, 3), loss_rtn=1.0, loss=9.0)


def fails(*args):
    raise NumericalError("no: never")


as_it_is = lambda W, H: (W, H)
LAYERS = {  # what is done to weight and Hessian, who rounds instead of ours, and what is noted
    "good": (as_it_is, None, None),
    "slightly indefinite": (indefinite(-0.05), None, "raised by 0.1"),
    "indefinite": (indefinite(-0.5), None, "raised by 1"),
    "hopeless": (indefinite(-30), None, "x: no damping helped: rounded to nearest"),
    "beyond float32": (lambda W, H: (1e25 * W, H), None, None),  # compared in float64
    "a solution worse than nearest": (as_it_is, worse, "rounded to nearest"),
    "no solution": (as_it_is, fails, "x: no damping helped: rounded to nearest"),
}


@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_ends_no_worse_than_rounded_to_nearest(case, monkeypatch):
    change, solver, note = LAYERS[case]
    g, notes, config = torch.Generator().manual_seed(0), [], AespaConfig.preset("gptq", 3)
    W, X = torch.randn(8, 16, generator=g), torch.randn(16, 64, generator=g)
    W, H = change(W, X @ X.T / 64)
    if solver:
        monkeypatch.setattr("aespa_nb.quantize.layer.round_layer", solver)
    zeta = torch.full((16,), 2.0 if solver is fails else 1.0)
    layer = round_layer_safely("x", W, KroneckerLoss(H), config, zeta, W, notes)
    W_hat = layer.weight()
    assert torch.isfinite(W_hat).all() and layer.loss <= layer.loss_rtn < float("inf")
    assert len(notes) == bool(note) and all(note in found for found in notes)
    if note and "nearest" in note:
        assert torch.equal(W_hat, minmax_grid(W, 3).round(W)) and layer.loss == layer.loss_rtn
    if case == "good":
        assert layer.loss < layer.loss_rtn and torch.equal(layer.grid.round(W_hat), W_hat)


def test_nothing_to_round_is_said():
    model, tokens = torture.build("llama")
    with refused("nothing to round"):
        quantize_model(model, tokens, AespaConfig(keep={"self_attn": 16, "mlp": 16}))
