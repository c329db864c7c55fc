"BoA: the Kronecker system solved by brute force, the limit of GPTQ, blocks of rows, scales, and whole models."

import pytest
import torch
from blocks import TOKENS, error, nearest
from rounding.problems import correlated, draw
from torch.testing import assert_close

from aespa_nb.quantize.config import AespaConfig
from aespa_nb.quantize.layer import round_layer
from aespa_nb.quantize.model import quantize_model
from aespa_nb.baselines.turboboa import BoaResult, boa, refine_scales
from aespa_nb.rounding.gptq import gptq
from aespa_nb.rounding.grid import Grid
from aespa_nb.rounding.grid_search import fit_grid
from aespa_nb.errors import AespaError, NumericalError
from aespa_nb.attention.kronecker_losses import KroneckerLoss
from aespa_nb.model.block_tuning import block_error


class Problem:
    "Random weights of some heads, with matrices far from the identity."

    def __init__(self, heads=2, rows=4, inp=6, each=True, bits=2, group_size=None, seed=0):
        self.W, self.G = draw(seed, heads, rows, inp), correlated(seed + 2, rows, (heads,), 0.05)
        self.H = correlated(seed + 1, inp, (heads,) if each else (), 0.05)
        self.grid = fit_grid(self.W, self.H, bits, group_size)
        self.fit = lambda W: fit_grid(W, self.H, bits, group_size)

    def loss(self, codes, grid):
        return float(KroneckerLoss(self.H, self.G)(grid.values(codes) - self.W))

    def solve(self, **options) -> BoaResult:
        return boa(self.W, self.H, self.grid, self.G, **{"rounds": 0, **options})


def brute(W, H, G, grid, order):
    "Weight by weight: those still free are set to the solution of their least-squares problem."
    K, goal, now = torch.kron(G, H), W.flatten(), W.flatten().clone()
    scale, zero = (t.flatten() for t in grid.expand(W.shape[1]))
    codes = torch.empty_like(now)
    for k, p in enumerate(order):
        codes[p] = (torch.round(now[p] / scale[p]) + zero[p]).clamp(0, grid.max_code)
        now[p] = scale[p] * (codes[p] - zero[p])
        done, free = order[: k + 1], order[k + 1 :]
        error = now[done] - goal[done]
        now[free] = goal[free] - torch.linalg.solve(K[free][:, free], K[free][:, done] @ error)
    return codes.view_as(W)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("by_rows", [True, False])
def test_every_free_weight_stands_at_the_least_squares_solution(by_rows, act_order):
    "Row by row or column by column, with the costly rows and columns first or not."
    p = Problem(heads=1)
    costs = lambda M: M[0].diagonal() if act_order else -torch.arange(len(M[0]))
    rows, columns = (costs(M).argsort(descending=True) for M in (p.G, p.H))
    order = rows[:, None] * len(columns) + columns
    order = (order if by_rows else order.T).flatten()
    found = p.solve(act_order=act_order).codes[0]
    assert torch.equal(found, brute(p.W[0], p.H[0], p.G[0], Grid(2, p.grid.scale[0], p.grid.zero[0]), order))


@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("act_order", [True, False])
def test_without_coupled_rows_it_is_gptq(each, group_size, act_order):
    p = Problem(3, 8, 136, each, group_size=group_size)  # more columns than a block has
    expected = gptq(p.W, p.H, p.grid, act_order).codes
    p.G = torch.eye(8, dtype=torch.float64)
    assert torch.equal(p.solve(act_order=act_order, rows=3).codes, expected)
    assert torch.equal(boa(p.W, p.H, p.grid, None, rounds=0, act_order=act_order).codes, expected)


def test_heads_do_not_meet():
    p, options = Problem(3, 8, 24), dict(rounds=2, rows=4)
    together = p.solve(fit=p.fit, **options)
    for h in range(3):
        grid = Grid(2, p.grid.scale[h], p.grid.zero[h])
        alone = boa(p.W[h], p.H[h], grid, p.G[h], fit=lambda W, h=h: fit_grid(W, p.H[h], 2), **options)
        assert torch.equal(alone.codes, together.codes[h])
        assert_close(alone.grid.scale, together.grid.scale[h])


@pytest.mark.parametrize("coupled", [True, False])
def test_steps_reach_the_joint_optimum(coupled):
    p = Problem(2, 4, 16, group_size=8)
    codes, G = p.grid.codes(p.W), p.G if coupled else None
    found = refine_scales(p.W, codes, p.grid, p.H, G, rounds=300)
    units = (codes - p.grid.expand(16)[1]).view(2, 4, p.grid.scale.shape[-1], -1)
    for h in range(2):
        eye = torch.block_diag(*units[h].flatten(0, 1).split(1))  # a scale is a linear unknown
        columns = [torch.zeros(4, 16, dtype=torch.float64) for _ in eye]
        for k, E in enumerate(columns):
            E.view(-1)[:] = eye[k]
        K = torch.kron(p.G[h] if coupled else torch.eye(4).double(), p.H[h])
        B = torch.stack([E.flatten() for E in columns])
        best = torch.linalg.solve(B @ K @ B.T, B @ K @ p.W[h].flatten()).view_as(found.scale[h])
        if (best > 0.2 * p.grid.scale[h]).all():
            assert_close(found.scale[h], best, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_refining_never_hurts_and_steps_stay_positive(seed):
    p = Problem(2, 8, 16, group_size=4, seed=seed)
    codes = p.grid.codes(p.W + 0.3 * p.W.flip(-1))
    losses = [p.loss(codes, refine_scales(p.W, codes, p.grid, p.H, p.G, rounds=k)) for k in range(5)]
    assert all(b <= a * (1 + 1e-12) for a, b in zip(losses, losses[1:]))
    assert (refine_scales(p.W, codes, p.grid, p.H, p.G).scale > 0).all()


def test_dead_codes_leave_their_steps():
    p = Problem(1, 2, 4)
    codes = p.grid.zero.expand_as(p.W).clone()  # every weight is 0
    assert torch.equal(refine_scales(p.W, codes, p.grid, p.H, p.G).scale, p.grid.scale)


def test_the_callers_tensors_stay_and_runs_repeat():
    p = Problem(2, 8, 16)
    kept = [t.clone() for t in (p.W, p.H, p.G, p.grid.scale, p.grid.zero)]
    a, b = (p.solve(fit=p.fit, rounds=2, rows=2) for _ in range(2))
    assert torch.equal(a.codes, b.codes) and torch.equal(a.grid.scale, b.grid.scale)
    assert all(torch.equal(x, y) for x, y in zip(kept, (p.W, p.H, p.G, p.grid.scale, p.grid.zero)))


def test_what_does_not_fit_is_refused():
    p = Problem()
    for change in (dict(rows=0), dict(rounds=-1)):
        with pytest.raises(AespaError, match="rows >= 1"):
            p.solve(**change)
    for H, G in ((p.H[..., :5, :5], p.G), (p.H, p.G[..., :3, :3]), (p.H, p.G[:1].expand(5, -1, -1))):
        with pytest.raises(AespaError, match="do not fit"):
            boa(p.W, H, p.grid, G)
    with pytest.raises(NumericalError, match="NaN"):
        boa(p.W * float("nan"), p.H, p.grid, p.G)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [None, 8])
def test_round_layer_takes_it(group_size, symmetric):
    p = Problem(2, 8, 16)
    config = AespaConfig.preset("turboboa", 2, group_size=group_size, symmetric=symmetric)
    r = round_layer(p.W.reshape(16, 16), KroneckerLoss(p.H, p.G), config)
    assert r.codes.max() <= 3 and r.loss < r.loss_rtn and (not symmetric or (r.grid.zero == 2).all())
    assert r.grid.scale.shape == (16, 2 if group_size else 1)


@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_whole_models(task, kind, group_size):
    t = task(kind, group_size=group_size)
    rtn = error(t, nearest(t))
    report = quantize_model(t.model, TOKENS, AespaConfig.preset("turboboa", 2, group_size=group_size))
    assert block_error(t.block, t.stream, t.target) < 0.9 * rtn
    assert all(int(r.codes.max()) <= 3 for r in report.layers.values())
