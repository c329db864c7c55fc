"AffineQuant: the function stays, the matrices stay invertible, without them it is OmniQuant."

import pytest
import torch
from blocks import error
from models import MODELS
from torch.testing import assert_close

from aespa_nb.baselines import affinequant as module
from aespa_nb.baselines.affinequant import AffineLinears, affinequant, gradual_mask
from aespa_nb.baselines.omniquant import omniquant
from aespa_nb.model.block_tuning import block_error

PAIRS = {
    "llama": ("self_attn.v_proj", "self_attn.o_proj"),
    "mha": ("self_attn.v_proj", "self_attn.o_proj"),
    "opt": ("self_attn.v_proj", "self_attn.out_proj"),
    "neox": ("attention.query_key_value", "attention.dense"),
    "bloom": ("self_attention.query_key_value", "self_attention.dense"),
}


def randomize(linears, size=0.05):
    "Random matrices, open masks."
    generator = torch.Generator().manual_seed(1)
    for m in linears.mixings:
        m.done = 1.0
        m.off.data = size * torch.randn(m.off.shape, generator=generator).to(m.off)
        m.log_d.data = 0.3 * torch.randn(m.log_d.shape, generator=generator).to(m.log_d)


@pytest.mark.parametrize("kind", MODELS)
def test_the_function_stays(task, kind):
    t = task(kind, dtype=torch.float64)
    linears = AffineLinears(t, 0.25)
    assert [(m.pair.v, m.pair.o) for m in linears.mixings] == [PAIRS[kind]]
    randomize(linears)
    full, bias = linears.changed()
    changed = {f"{n}.weight": W.detach() for n, W in full.items()} | {n: b.detach() for n, b in bias.items()}
    assert all(not torch.allclose(W, t.block.get_parameter(n), rtol=0.01) for n, W in changed.items())
    assert block_error(t.block, t.stream, t.target, changed) < (1e-12 if kind in ("llama", "mha", "neox") else 1e-20)


def test_the_mask_opens_as_a_band():
    assert not gradual_mask(6, 0.0).any()
    assert torch.equal(gradual_mask(6, 1.0), ~torch.eye(6, dtype=torch.bool))
    half = gradual_mask(6, 0.5)
    assert half[0].tolist() == [False, True, True, True, False, False] and torch.equal(half, half.T)


def test_dominance_holds_after_each_step(task, monkeypatch):
    seen, plain = [], module.dominant
    spy = lambda *args: seen.append(plain(*args)) or seen[-1]
    monkeypatch.setattr(module, "dominant", spy)
    affinequant(task(iterations=20), lr=5.0)
    assert len(seen) == 21
    for A in seen:
        diagonal = A.detach().diagonal(dim1=-2, dim2=-1)
        assert (A.detach().abs().sum(-1) <= 1.9001 * diagonal).all()
    assert torch.equal(seen[0].detach().count_nonzero((-2, -1)), torch.tensor([8, 8]))


@pytest.mark.parametrize("kind", ["mha", "opt"])
def test_without_the_matrix_it_is_omniquant(task, kind):
    "Diagonal matrices are per-input scales of the output projection."
    one, other = task(kind, iterations=12), task(kind, iterations=12)
    omni, affine, (v, o) = omniquant(one), affinequant(other, mix=False), PAIRS[kind]
    assert error(other, affine) == pytest.approx(error(one, omni), rel=1e-3)
    assert_close(omni[v].grid.zero, affine[v].grid.zero)
    ratio = (omni[v].weight() / affine[v].weight()).nanmedian(1).values
    assert_close(affine[o].weight() / ratio, omni[o].weight(), rtol=1e-3, atol=1e-4)


def test_with_its_partner_kept_a_linear_keeps_its_basis(task):
    said = []
    t = task("mha", announce=said.append)
    del t.bits["self_attn.o_proj"]
    bias = t.block.self_attn.v_proj.bias.clone()
    assert affinequant(t).keys() == t.bits.keys() and torch.equal(t.block.self_attn.v_proj.bias, bias)
    assert said[0].startswith("per-input scales only")
