"AWQ: clipping alone, free scales that are free, and groups."

import pytest
import torch
from blocks import nearest, weights
from models import SMALL, small
from torch.testing import assert_close
from transformers import OPTConfig, OPTForCausalLM

from aespa_nb.baselines.awq import Group, Reader, awq, candidate_scales, column_sizes, read_inputs, scale_groups
from aespa_nb.errors import AespaError, UnsupportedModelError
from aespa_nb.model.block_tuning import block_error
from aespa_nb.model.blocks import stacks_of, zeta_groups
from aespa_nb.rounding.grid_search import fit_grid


def uneven(kind):
    "A model in which some inputs are larger than others."
    model = small(kind)
    for block in model.get_submodule(stacks_of(model)[0]):
        for norm in (m for n, m in block.named_modules() if n.endswith("norm")):
            norm.weight *= 1 + 4 * torch.rand(32) ** 4
    return model


def weight(task, name):
    return task.block.get_submodule(name).weight


def test_clipping_alone_is_the_grid_search(task):
    t = task("opt", model=uneven("opt"))
    (group,) = [g for g in scale_groups(t) if g.linears == ("fc1",)]
    (inputs,) = read_inputs(t, [group])
    expected = fit_grid(weight(t, "fc1"), inputs.gram.mean(), 2, n_clip=20, min_clip=0.5)
    found = awq(t, points=1, divide=False)["fc1"].grid
    assert_close(found.scale, expected.scale)
    assert_close(found.zero, expected.zero)


def test_dead_inputs_have_scales():
    scales = list(candidate_scales(torch.tensor([1.0, 4.0, 16.0, 0.0]), torch.tensor([0.5, 0.5, 1.0, 1.0]), 3))
    assert len(scales) == 6 and all((s > 0).all() and s.isfinite().all() for s in scales)


def test_column_sizes():
    W = torch.tensor([[1.0, -2.0, 0.0, 4.0], [0.0, 0.0, -3.0, 1.0]])
    assert_close(column_sizes([W]), torch.tensor([0.125, 0.25, 0.5, 2 / 3]))
    assert_close(column_sizes([W, W], 2), torch.tensor([0.25, 0.5, 0.5, 2 / 3]))
    assert (column_sizes([torch.zeros(2, 4)]) == 0).all()


@pytest.mark.parametrize("kind", ["llama", "mha", "opt"])
def test_free_scales_are_free(task, kind):
    t = task(kind, model=uneven(kind))
    for source, names in zeta_groups(t.model):
        s, before = torch.rand(weight(t, names[0]).shape[1]) + 0.5, block_error(t.block, t.stream, t.target)
        for n in names:
            weight(t, n).mul_(s)
        module = t.block.get_submodule(source)
        for p in (module.weight, getattr(module, "bias", None)):
            if p is not None:
                p.div_(s if p.ndim == 1 else s[:, None])
        assert block_error(t.block, t.stream, t.target) < before + 1e-9


def test_where_scales_are_free():
    gelu = OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, activation_function="gelu"))
    free = lambda model: [s for s, _ in zeta_groups(model)]
    assert "self_attn.v_proj" not in free(small("llama")) and "self_attn.v_proj" in free(small("mha"))
    assert free(small("opt-post-norm")) == ["self_attn.v_proj", "fc1"] and "fc1" not in free(gelu)


def test_groups_share_their_scales(task):
    t = task("llama", model=uneven("llama"))
    groups = scale_groups(t)
    assert [g.reader for g in groups] == ["self_attn", "mlp", "mlp.down_proj", "self_attn.o_proj"]
    assert [g.free for g in groups] == [True, True, True, False]  # o_proj: heads share values
    assert Group(("a", "b"), True).reader == ""
    records = awq(t, points=5)
    for group in groups:
        zetas = [records[n].zeta for n in group.linears]
        assert all(torch.equal(zetas[0], zeta) for zeta in zetas) and group.free == bool((zetas[0] != 1).any())
    t = task("opt")
    del t.bits["self_attn.k_proj"]
    assert scale_groups(t)[0].linears == ("self_attn.q_proj", "self_attn.v_proj")
    assert len(awq(t, points=2)) == 5


@pytest.mark.parametrize("name", ["self_attn", "mlp", ""])
def test_a_reader_sees_what_the_block_does(task, name):
    t = task("llama")
    reader = Reader(t, name, sequences=6)
    inside = {n: W for n, W in weights(t).items() if n.startswith(name)}
    assert len(reader.calls) == 2 and reader.error(inside) < 1e-6  # batches of 4
    assert reader.error({n: W * 1.1 for n, W in inside.items()}) > 1e-3
    if not name:
        rounded = nearest(t)
        error = block_error(t.block, t.stream, t.target, {f"{n}.weight": W for n, W in rounded.items()})
        found = Reader(t, "", sequences=16).error(rounded) / float(t.target.square().sum())
        assert found == pytest.approx(error, rel=1e-4)


def test_what_cannot_work_is_refused(task):
    for change in (dict(min_clip=1.5), dict(sequences=0)):
        with pytest.raises(AespaError, match="points >= 1"):
            awq(task(), **change)
    with pytest.raises(UnsupportedModelError, match="gpt_neox"):
        awq(task("neox"))
