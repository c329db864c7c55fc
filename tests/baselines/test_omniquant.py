"Learned clipping and OmniQuant: their limits, their gradient, and where scales are free."

import torch
from torch.testing import assert_close

from aespa_nb.baselines.learned_clipping import LearnedClip, free_groups, free_scales
from aespa_nb.baselines.omniquant import omniquant
from aespa_nb.model.blocks import reading_inputs


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
    by_scale = torch.where(low, -zero, torch.where(high, 3 - zero, (W / scale).round() - W / scale))
    # at the ends the zero-point counts too: it is share * below / scale, rounded
    by_zero = torch.where(low | high, -scale, 0.0)
    dscale = torch.stack([below, above]) / 3 * share * (1 - share)  # of sigmoid(0)
    ideal = share * below / scale[:, 0]
    slope = below * share * (1 - share)  # of the learned end below
    dzero = torch.stack([slope - ideal * dscale[0], -ideal * dscale[1]]) / scale[:, 0]
    expected = dscale * (weigh * by_scale).sum(1) + dzero * (weigh * by_zero).sum(1)
    assert_close(g[..., 0], expected)
    inner = ~(low | high) & (W != W.amin(1, True)) & (W != W.amax(1, True))
    assert_close(gW[inner], weigh[inner])


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
    assert ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj") not in free_groups(t)
    assert all((r.zeta == 1).all() == ("self_attn" in n) for n, r in omniquant(t).items())


def test_with_alpha_1_all_inputs_reach_equally_far(task):
    t, seen = task("opt"), []
    scales = free_scales(t, free_groups(t), 1.0)["fc1"].detach()
    with reading_inputs(t.block, ["fc1"], lambda name, x: seen.append(x.abs().flatten(0, -2).amax(0))):
        t.stream.run(t.block)
    reach = torch.stack(seen).amax(0) * scales.exp()
    assert_close(reach, reach.mean().expand(32))
    assert abs(float(scales.mean())) < 1e-5
