"SignRound: offsets, clipping factors and signed steps; its limits, and brute force."

import itertools

import pytest
import torch
from blocks import error, nearest, nearest_grids, tiny_task
from torch.testing import assert_close

from aespa_nb.baselines.signround import LearnedRounding, SignDescent, signround
from aespa_nb.errors import AespaError
from aespa_nb.model.block_tuning import learn_block
from aespa_nb.notation import tiny_weight
from aespa_nb.rounding.grid import minmax_grid

KINDS = ("llama", "opt")


@pytest.mark.parametrize("group_size, symmetric", list(itertools.product((None, 4), (False, True))))
def test_it_starts_at_round_to_nearest(group_size, symmetric):
    W = tiny_weight(8, 16)
    W[0] = 0
    W[1] = W[1].abs()
    part, grid = LearnedRounding(W, 3, group_size, symmetric), minmax_grid(W, 3, group_size, symmetric)
    r = part.record()
    assert torch.equal(part.weight(), grid.round(W)) and torch.equal(r.weight(), grid.round(W))
    assert torch.equal(r.grid.scale, grid.scale) and torch.equal(r.grid.zero, grid.zero)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_that_reach_nothing_leave_round_to_nearest(task, kind):
    t = task(kind, bits=3, lr=1e-9, iterations=2)
    for n, r in signround(t).items():
        assert_close(r.weight(), nearest(t)[n], rtol=1e-6, atol=1e-7)
        assert torch.equal(r.grid.zero, nearest_grids(t)[n].zero)


def test_a_step_goes_exactly_as_far_as_the_learning_rate():
    t = tiny_task(iterations=8)
    part = LearnedRounding(t.block[0].weight, 2)
    learned = [part.offset, part.low, part.high]
    steps = learn_block(t, lambda: {"0.weight": part.weight()}, SignDescent(learned, 1 / 8))
    next(steps)
    signs = [p.grad.sign() for p in learned]
    next(steps)
    for p, sign, start in zip(learned, signs, (0, 1, 1)):
        assert torch.equal(p.detach(), start - sign / 8) and sign.any()


def test_offsets_can_travel_half_a_step():
    p = torch.zeros(1, requires_grad=True)
    descent = SignDescent([p], 0.0)
    for t in range(200):
        p.grad, descent.param_groups[0]["lr"] = torch.ones(1), (1 - t / 200) / 200
        descent.step()
    assert float(-p.detach()) == pytest.approx(201 / 400, rel=1e-5)


def test_never_below_all_roundings_and_mostly_there():
    both, ratios = torch.tensor(list(itertools.product((0, 1), repeat=4)), dtype=torch.float64), []
    for seed in range(8):
        t = tiny_task(4, seed, rows=1, iterations=100)  # one row: the best of all steps is kept for a matrix as a whole
        row, X = t.block[0].weight[:1].clone(), t.stream.hidden[0].T
        grid = minmax_grid(row, 2)
        every = grid.values(((row / grid.scale).floor() + both + grid.zero).clamp(0, 3))
        loss = lambda V, row=row, X=X: ((V - row) @ X).square().sum(-1)
        ratios.append(float(loss(signround(t, clip=False)["0"].weight()[:1]) / loss(every).min()))
    assert min(ratios) > 1 - 1e-9 and sum(r < 1 + 1e-9 for r in ratios) >= 5


def test_with_all_sequences_in_a_step_the_best_is_never_worse_than_nearest(task):
    t = task(bits=4, iterations=3, lr=0.4)  # leaps
    assert error(t, signround(t, batch_size=16)) <= error(t, nearest(t)) * (1 + 1e-5)


def test_clipping_only_narrows_and_without_it_the_grid_stays(task):
    t = task()
    grids, plain, clipped = nearest_grids(t), signround(t, clip=False), signround(t)
    assert all(torch.equal(plain[n].grid.scale, g.scale) for n, g in grids.items())
    ratio = torch.cat([(clipped[n].grid.scale / g.scale).flatten() for n, g in grids.items()])
    assert (ratio <= 1 + 1e-6).all() and (ratio > 1 - 31 / 60 - 1e-4).all() and (ratio < 1).any()


def test_batches_must_have_sequences(task):
    with pytest.raises(AespaError, match="batch_size"):
        signround(task(), batch_size=0)
