"""A slice of experiments/torture.py: damaged models end in a model no worse than round-to-nearest, or in one line."""

import pytest
import torch
import torture
from aespa_nb import AespaConfig, AespaError, NumericalError, quantize_model
from aespa_nb.attention.kronecker_losses import KroneckerLoss
from aespa_nb.quantize.layer import RoundedLayer, round_layer_safely
from aespa_nb.rounding.grid import minmax_grid

ROUNDED = [
    ("llama", "dead channels: all norm weights 0", "best"),
    ("llama", "exploding channel: norm weight times 1e+08", "gptq"),
    ("llama", "constant token stream", "best"),
    ("llama", "one sequence of three tokens", "turboboa"),
    ("llama", "weights: all equal", "max"),
    ("llama", "weights: equal within rows", "max"),
    ("llama", "weights: all 0", "aespa"),
    ("llama", "one outlier of 1e+03 in each weight", "max"),
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


@pytest.fixture
def problem():
    "A weight, and the H of a loss that is as it should be."
    g = torch.Generator().manual_seed(0)
    W, X = torch.randn(8, 16, generator=g), torch.randn(16, 64, generator=g)
    return W, X @ X.T / 64


def rounded(W, H, zeta=1.0):
    "The weight that a layer ends with, its record, and what was noted."
    notes, config = [], AespaConfig.preset("gptq", 3)
    layer = round_layer_safely("x", W, KroneckerLoss(H), config, zeta * torch.ones(16), W, notes)
    return layer.weight(), layer, notes


def test_a_good_layer_is_left_alone(problem):
    W_hat, layer, notes = rounded(*problem)
    assert layer.loss < layer.loss_rtn and not notes and torch.equal(layer.grid.round(W_hat), W_hat)


@pytest.mark.parametrize(
    ("lowest", "how"), [(-0.05, "raised by 0.1"), (-0.5, "raised by 1"), (-30, "no damping helped: rounded to nearest")]
)
def test_an_indefinite_hessian_is_damped_in_visible_steps(problem, lowest, how):
    W, H = problem
    Q, values = torch.linalg.eigh(H).eigenvectors, torch.linspace(0.5, 2, 16)
    values[3] = lowest
    W_hat, layer, notes = rounded(W, Q @ torch.diag(values) @ Q.T)
    assert how in notes[0] and torch.isfinite(W_hat).all() and layer.loss <= layer.loss_rtn, notes


def test_a_solution_worse_than_round_to_nearest_is_dropped(problem, monkeypatch):
    W, H = problem
    bad = RoundedLayer.of(torch.zeros(W.shape), minmax_grid(W, 3), loss_rtn=1.0, loss=9.0)
    monkeypatch.setattr("aespa_nb.quantize.layer.round_layer", lambda *args: bad)
    W_hat, layer, notes = rounded(W, H)
    assert torch.equal(W_hat, minmax_grid(W, 3).round(W)) and layer.loss == layer.loss_rtn
    assert "rounded to nearest" in notes[0]


def test_without_a_solution_the_layer_is_rounded_to_nearest(problem, monkeypatch):
    def fails(*args):
        raise NumericalError("no: never")

    W, H = problem
    monkeypatch.setattr("aespa_nb.quantize.layer.round_layer", fails)
    W_hat, _, notes = rounded(W, H, zeta=2.0)
    assert torch.equal(W_hat, minmax_grid(W, 3).round(W)) and notes == ["x: no damping helped: rounded to nearest"]


def test_losses_beyond_float32_are_compared_in_float64(problem):
    W, H = problem
    W_hat, layer, _ = rounded(1e25 * W, H)
    assert torch.isfinite(W_hat).all() and layer.loss <= layer.loss_rtn < float("inf")


def test_nothing_to_round_is_said():
    model, tokens = torture.build("llama")
    with pytest.raises(AespaError, match="nothing to round"):
        quantize_model(model, tokens, AespaConfig(keep={"self_attn": 16, "mlp": 16}))
