"GPTQ against explicit inverses, all roundings of a row, and itself in other forms."

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding.problems import layer
from torch.testing import assert_close

from aespa_nb.rounding.gptq import gptq, inverse_factor, processing_order
from aespa_nb.rounding.grid import Grid, minmax_grid
from aespa_nb.rounding.grid_search import fit_grid
from aespa_nb.rounding.hessian import quadratic_loss
from aespa_nb.errors import AespaError, NumericalError

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 10_000)


def obq(W, H, grid, order):
    "Optimal brain quantization with a fresh inverse of the free part of H at each column."
    W, codes, free = W.clone(), torch.empty_like(W), order.tolist()
    scale, zero = grid.expand(W.shape[1])
    while free:
        j, P = free[0], torch.linalg.inv(H[free][:, free])
        codes[:, j] = (torch.round(W[:, j] / scale[:, j]) + zero[:, j]).clamp(0, grid.max_code)
        err = W[:, j] - scale[:, j] * (codes[:, j] - zero[:, j])
        W[:, free] -= torch.outer(err, P[0] / P[0, 0])
        free = free[1:]
    return codes


@quick
@given(seeds, st.integers(2, 4), st.sampled_from([None, 4, 2]), st.booleans(), st.integers(1, 14))
def test_equals_obq_with_fresh_inverses(seed, bits, group_size, act_order, block_size):
    W, H = layer(seed)
    grid = minmax_grid(W, bits, group_size)
    result = gptq(W, H, grid, act_order, block_size)
    assert torch.equal(result.codes, obq(W, H, grid, processing_order(H, act_order)))
    assert torch.equal(grid.codes(result.W_comp), result.codes)


@quick
@given(seeds)
def test_between_the_best_of_all_roundings_and_bounded(seed):
    "Brute force: GPTQ is never below the optimum, and equal to it when H is diagonal."
    W, H = layer(seed, out=3, inp=6)
    grid = fit_grid(W, H, 2, n_clip=10)
    every = torch.tensor(list(itertools.product(range(4), repeat=6)), dtype=W.dtype)[:, None]

    def row_losses(codes, H):
        E = grid.values(codes) - W
        return ((E @ H) * E).sum(-1)

    best = row_losses(every.expand(-1, 3, -1), H).amin(0)
    assert (row_losses(gptq(W, H, grid).codes, H) >= best * (1 - 1e-9)).all()
    D = torch.diag(H.diagonal())
    best = row_losses(every.expand(-1, 3, -1), D).amin(0)
    assert_close(row_losses(gptq(W, D, grid).codes, D), best)
    assert torch.equal(gptq(W, D, grid).codes, grid.codes(W))


@quick
@given(seeds, st.booleans(), st.booleans())
def test_heads_in_a_batch_are_separate_problems(seed, act_order, shared):
    W, H = layer(seed, heads=(3,))
    H = H[0] if shared else H
    grid = minmax_grid(W, 3, 4)
    before = W.clone(), H.clone()
    codes, W_comp = gptq(W, H, grid, act_order, 5)
    for h in range(3):
        one = gptq(W[h], H if shared else H[h], Grid(3, grid.scale[h], grid.zero[h]), act_order, 5)
        assert torch.equal(codes[h], one.codes)
        assert_close(W_comp[h], one.W_comp)
    assert torch.equal(W, before[0]) and torch.equal(H, before[1])


def test_wins_over_nearest_on_the_whole_and_activation_order_over_left_to_right():
    def losses(seed):
        W, H = layer(seed, 8, 24)
        shuffle = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
        size = torch.logspace(0, -1, 24, dtype=W.dtype)[shuffle]
        H = H * size[:, None] * size
        grid = fit_grid(W, H, 3, n_clip=10)
        codes = grid.codes(W), gptq(W, H, grid, act_order=False).codes, gptq(W, H, grid).codes
        return [float(quadratic_loss(grid.values(c) - W, H)) for c in codes]

    nearest, plain, ordered = torch.tensor([losses(seed) for seed in range(20)]).T.log().mean(1)
    assert ordered < plain < nearest


def test_float32_follows_float64():
    W, H = layer(1, 32, 48)
    grid = minmax_grid(W, 4)
    grid32 = Grid(4, grid.scale.float(), grid.zero.float())
    a, b = gptq(W, H, grid), gptq(W.float(), H.float(), grid32)
    assert b.codes.dtype == torch.float32
    assert (a.codes == b.codes).double().mean() > 0.97


def test_factor_and_refusals():
    W, H = layer(0)
    U = inverse_factor(H)
    assert torch.equal(U, U.triu())
    assert_close(U.T @ U, torch.linalg.inv(H))
    grid = minmax_grid(W, 2)
    with pytest.raises(NumericalError, match="not positive definite"):
        gptq(W, torch.ones_like(H), grid)
    with pytest.raises(NumericalError, match="not positive definite"):
        inverse_factor(torch.stack([H, -H]))
    with pytest.raises(NumericalError, match="NaN"):
        gptq(W, H * float("nan"), grid)
    with pytest.raises(NumericalError, match="weight"):
        gptq(W * float("inf"), H, grid)
    for bad in ((W, H[:6, :6], grid), (W, H, minmax_grid(W[:2], 2)), (W, H[None], grid)):
        with pytest.raises(AespaError, match="do not fit"):
            gptq(*bad)
