"BRECQ: rounding variables of a block, the channels' weights, and what is refused."

import pytest
import torch
from blocks import error, nearest, tiny_task, weights
from torch.testing import assert_close

from aespa_nb.baselines.brecq import BlockRounding, brecq, fit_grids
from aespa_nb.errors import AespaError
from aespa_nb.model.block_tuning import learn_block
from aespa_nb.rounding.grid_search import fit_grid
from aespa_nb.rounding.hessian import damp


def test_it_starts_at_the_weight_and_ends_beside_it():
    t = tiny_task(8)
    W, X = t.block[0].weight, t.stream.hidden[0].T
    grid = fit_grid(W, damp(X @ X.T), 3)
    rounding = BlockRounding({"a": W}, {"a": grid})
    inside = (W > grid.values(torch.zeros_like(W))) & (W < grid.values(torch.full_like(W, 7)))
    assert_close(rounding.relaxed()["a.weight"][inside], W[inside], rtol=1e-5, atol=1e-5)
    assert torch.equal(rounding.records()["a"].weight()[inside], grid.round(W)[inside])
    assert not torch.equal(W, grid.round(W)) and 0 < rounding.penalty(2.0).item() < 1
    rounding.logits["a"].data.fill_(9)
    assert rounding.penalty(2.0).item() == 0
    assert torch.equal(rounding.relaxed()["a.weight"], rounding.records()["a"].weight())


@pytest.mark.parametrize("group_size, symmetric", [(None, False), (16, False), (8, True)])
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_weights_go_to_a_neighbour_on_grids_that_stay(task, kind, group_size, symmetric):
    t = task(kind, group_size=group_size, symmetric=symmetric, iterations=60)
    grids, old, records = fit_grids(t), weights(t), brecq(t, importance=1 + torch.rand(32))
    assert error(t, records) < 0.8 * min(error(t, nearest(t)), error(t, {n: g.round(old[n]) for n, g in grids.items()}))
    for n, r in records.items():
        grid, W = r.grid, r.weight()
        assert torch.equal(grid.scale, grids[n].scale) and torch.equal(grid.zero, grids[n].zero) and (r.zeta == 1).all()
        within = (old[n] > grid.values(torch.zeros_like(W))) & (old[n] < grid.values(torch.full_like(W, 3)))
        assert ((W - old[n]).abs() < grid.expand(W.shape[1])[0] * 1.0001)[within].all()


def test_importance_counts_channels(task):
    t = task()
    W = {f"{n}.weight": (0.9 * w).requires_grad_() for n, w in weights(t).items()}
    run = lambda **more: next(learn_block(t, lambda: W, torch.optim.SGD(W.values(), 1), 16, **more))
    each = [run(importance=torch.eye(32)[i]) for i in range(32)]
    assert sum(each) == pytest.approx(run(), rel=1e-4) and run(importance=2.0) == pytest.approx(2 * run(), rel=1e-4)


def test_a_negative_weight_is_refused(task):
    with pytest.raises(AespaError, match="weight >= 0 and 0 <= warmup < 1"):
        brecq(task(), weight=-1.0)
