"OmniQuant: its limits, its gradient, its grids, and what it gains."

import copy
from dataclasses import replace

import pytest
import torch
from models import small
from torch.testing import assert_close

from aespa_nb.quantize.config import AespaConfig
from aespa_nb.quantize.model import quantize_model
from aespa_nb.baselines.omniquant import omniquant
from aespa_nb.model.blocks import stacks_of
from aespa_nb.model.capture import capturing
from aespa_nb.model.stream import BlockStream
from aespa_nb.model.blocks import linears_of
from aespa_nb.rounding.grid import minmax_grid
from aespa_nb.errors import AespaError, NumericalError
from aespa_nb.baselines.learned_clipping import (
    ClippedLinears,
    LearnedClip,
    free_groups,
    free_scales,
    input_reach,
    straight_through,
)
from aespa_nb.model.block_tuning import BlockTask, block_error

KINDS = ("llama", "mha", "opt", "neox")
TOKENS = torch.randint(0, 64, (16, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def task():
    made = []

    def make(kind="llama", bits=2, **options):
        model = small(kind)
        block = model.get_submodule(stacks_of(model)[0])[0]
        streams = [BlockStream(model, TOKENS, dtype=torch.float32) for _ in range(2)]
        made.extend(streams)
        streams[1].run(block, keep=True)
        options = {"iterations": 40, **options}
        return BlockTask(model, block, {n: bits for n in linears_of(block)}, streams[0], streams[1].hidden, **options)

    yield make
    for stream in made:
        stream.close()


def nearest(task):
    "Round-to-nearest weights."
    grid = lambda W, b: minmax_grid(W, b, task.group_size, task.symmetric)
    weight = lambda n: task.block.get_submodule(n).weight
    return {f"{n}.weight": grid(weight(n), b).round(weight(n)) for n, b in task.bits.items()}


def check_codes(task, rounded):
    assert rounded.keys() == task.bits.keys()
    for n, (grid, zeta) in rounded.items():
        W = task.block.get_submodule(n).weight
        scale, zero = grid.expand(W.shape[1])
        codes = W / zeta / scale + zero
        assert_close(codes, codes.round(), rtol=0, atol=1e-3)
        assert codes.round().min() >= 0 and codes.round().max() <= grid.max_code == 2 ** task.bits[n] - 1
        assert (zeta > 0).all() and grid.scale.shape[-1] == (W.shape[1] // task.group_size if task.group_size else 1)
        assert not task.symmetric or (grid.zero == 2 ** (grid.bits - 1)).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [None, 8])
def test_with_full_shares_and_no_scales_it_is_nearest(task, group_size, symmetric):
    t = task(group_size=group_size, symmetric=symmetric)
    linears = ClippedLinears(t, {})
    for clip in linears.clips.values():
        clip.logit.data.fill_(50.0)
    for name, W in nearest(t).items():
        assert_close(linears.weights()[name].detach(), W, rtol=1e-6, atol=1e-7)


def test_the_gradient_is_the_one_on_paper():
    W = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    weigh = torch.randn(3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    clip = LearnedClip(W, 2, logit=0.0)
    gW, g = torch.autograd.grad((clip.round(W) * weigh).sum(), (W, clip.logit))
    share, below, above = 0.5, -W.amin(1), W.amax(1)
    scale = (share * (below + above) / 3)[:, None]
    zero = (share * below[:, None] / scale).round()
    codes = (W / scale).round() + zero
    low, high = codes < 0, codes > 3
    by_step = torch.where(low, -zero, torch.where(high, 3 - zero, (W / scale).round() - W / scale))
    # at the ends the zero-point counts too: it is share * below / scale, rounded
    by_zero = torch.where(low | high, -scale, 0.0)
    dstep = torch.stack([below, above]) / 3 * share * (1 - share)  # of sigmoid(0)
    ideal = share * below / scale[:, 0]
    slope = below * share * (1 - share)  # of the learned end below
    dzero = torch.stack([slope - ideal * dstep[0], -ideal * dstep[1]]) / scale[:, 0]
    expected = dstep * (weigh * by_step).sum(1) + dzero * (weigh * by_zero).sum(1)
    assert_close(g[..., 0], expected)
    inner = ~(low | high) & (W != W.amin(1, True)) & (W != W.amax(1, True))
    assert_close(gW[inner], weigh[inner])


def test_rounding_is_exact_and_gradients_pass():
    x = torch.linspace(-9, 9, 10001, requires_grad=True)
    assert torch.equal(straight_through(x), x.round())
    straight_through(x).sum().backward()
    assert (x.grad == 1).all()


def test_one_free_share_agrees_with_a_line_search():
    "A symmetric grid on one row, squared error of the weight itself."
    W = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))
    clip = LearnedClip(W, 2, symmetric=True)
    adam = torch.optim.Adam([clip.logit], lr=0.05)
    for i in range(300):
        adam.param_groups[0]["lr"] = 0.05 * (1 - i / 300)
        adam.zero_grad()
        (clip.round(W) - W).square().mean().backward()
        adam.step()
    error = lambda c: float((replace(c.grid(W)).round(W) - W).square().mean())
    tries = [LearnedClip(W, 2, symmetric=True, logit=x) for x in torch.linspace(-3, 4, 400).tolist()]
    assert error(clip) <= 1.01 * min(map(error, tries)) < 0.7 * error(LearnedClip(W, 2, symmetric=True))


@pytest.mark.parametrize("kind", KINDS)
def test_better_than_nearest_at_two_bits(task, kind):
    t = task(kind)
    rtn = block_error(t.block, t.stream, t.target, nearest(t))
    rounded = omniquant(t)
    assert block_error(t.block, t.stream, t.target) < 0.8 * rtn
    check_codes(t, rounded)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits, group_size", [(2, 8), (3, None), (4, 16)])
def test_codes_are_on_the_grid(task, bits, group_size, symmetric):
    t = task("mha", bits, group_size=group_size, symmetric=symmetric, iterations=5)
    check_codes(t, omniquant(t))


def test_scales_are_shared_where_they_are_free_and_announced_where_not(task):
    said = []
    rounded = omniquant(task("llama", iterations=3))
    assert torch.equal(rounded["self_attn.q_proj"].zeta, rounded["self_attn.v_proj"].zeta)
    assert (rounded["mlp.down_proj"].zeta != 1).any() and (rounded["self_attn.o_proj"].zeta == 1).all()
    rounded = omniquant(task("neox", iterations=3, announce=said.append))
    assert all((r.zeta == 1).all() for r in rounded.values())
    assert said[0].startswith("no per-input scales") and set(said[1:]) == set(rounded)


def test_a_linear_that_is_kept_takes_its_group_out(task):
    t = task()
    del t.bits["self_attn.k_proj"]
    old = t.block.self_attn.k_proj.weight.clone()
    assert ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj") not in free_groups(t)
    check_codes(t, omniquant(t))
    assert torch.equal(t.block.self_attn.k_proj.weight, old)


def test_scales_start_where_alpha_says(task):
    t = task("opt")
    groups = free_groups(t)
    by_weight, by_input = (free_scales(t, groups, alpha)["fc1"].detach() for alpha in (0.0, 1.0))
    columns = t.block.fc1.weight.abs().amax(0) / by_weight.exp()
    assert_close(columns, columns.mean().expand(32))  # all reach equally far
    reach = input_reach(t, ["fc1"])["fc1"] * by_input.exp()
    assert_close(reach, reach.mean().expand(32))
    assert abs(float(by_weight.mean())) < 1e-5 and abs(float(by_input.mean())) < 1e-5


def test_same_seed_same_weights(task):
    runs = [torch.cat([p.flatten() for p in t.block.parameters()]) for t in map(run, [task(seed=s) for s in (0, 0, 1)])]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def run(task):
    omniquant(task)
    return task


@pytest.mark.parametrize("options", [dict(lr=-1.0), dict(iterations=0)])
def test_bad_options_are_refused_and_the_block_stays(task, options):
    t = task(**options)
    old = copy.deepcopy(t.block.state_dict())
    with pytest.raises(AespaError, match="needs"):
        omniquant(t)
    assert all(torch.equal(v, old[k]) for k, v in t.block.state_dict().items())


def test_nan_and_groups_that_do_not_fit_are_refused(task):
    t = task()
    t.target = t.target * float("nan")
    with pytest.raises(NumericalError, match="NaN or Inf"):
        omniquant(t)
    with pytest.raises(AespaError, match="does not divide"):
        omniquant(task(group_size=7))


@pytest.mark.parametrize("kind", ["llama", "neox"])
def test_the_preset_rounds_a_model(kind):
    model, whole = small(kind), small(kind)
    config = AespaConfig.preset("omniquant", 3, iterations=5, keep={"0.": 4})
    report = quantize_model(model, TOKENS, config)
    assert len(report.layers) == sum(len(linears_of(b)) for b in model.get_submodule(stacks_of(model)[0]))
    for name, r in report.layers.items():
        assert_close(r.grid.values(r.codes.float()) * r.zeta, r.weight, rtol=1e-4, atol=1e-5)
        assert r.grid.bits == (4 if ".0." in name else 3)
    with capturing(model), torch.no_grad():
        assert (model(TOKENS).logits - whole(TOKENS).logits).abs().max() > 0
