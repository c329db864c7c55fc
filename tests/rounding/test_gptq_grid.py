"The grid that is fitted to the weights as GPTQ rounds them."

import pytest
import torch
from rounding.problems import layer

from aespa_nb.rounding.gptq import column_prices, fit_compensated, gptq
from aespa_nb.rounding.grid_search import fit_grid, fit_weighted
from aespa_nb.rounding.hessian import quadratic_loss


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("bits", [2, 3])
def test_loss_is_the_priced_sum_of_rounding_errors(bits, group_size, act_order):
    W, H = layer(bits, 8, 24)
    grid = fit_grid(W, H, bits, group_size)
    codes, W_comp = gptq(W, H, grid, act_order)
    paid = column_prices(H, act_order) * (W_comp - grid.values(codes)).square()
    torch.testing.assert_close(paid.sum(), quadratic_loss(grid.values(codes) - W, H))


def test_prices_are_schur_complements():
    "The price of a column is 1 / [F^-1]_jj, F being H of the columns not rounded before it."
    _, H = layer(3, 8, 24)
    order = H.diagonal().argsort(descending=True)
    prices = column_prices(H)
    for i, j in enumerate(order):
        free = order[i:]
        torch.testing.assert_close(prices[j], 1 / torch.linalg.inv(H[free][:, free])[0, 0])


@pytest.mark.parametrize("group_size", [None, 6])
def test_weighted_search_is_the_search_under_a_diagonal(group_size):
    W, H = layer(5, 8, 24)
    same, priced = fit_grid(W, H.diagonal().diag(), 2, group_size), fit_weighted(W, H.diagonal(), 2, group_size)
    torch.testing.assert_close(priced.scale, same.scale)
    assert torch.equal(priced.zero, same.zero)


def test_without_correlations_nothing_is_compensated():
    "Under a diagonal H GPTQ rounds to nearest, and both grids are one."
    W, H = layer(7, 8, 24)
    H = H.diagonal().diag()
    torch.testing.assert_close(fit_compensated(W, H, 2).scale, fit_grid(W, H, 2).scale)


def test_heads_are_problems_of_their_own():
    (W0, H0), (W1, H1) = layer(8, 8, 24), layer(9, 8, 24)
    both = fit_compensated(torch.stack([W0, W1]), torch.stack([H0, H1]), 2, 8)
    for i, (W, H) in enumerate(((W0, H0), (W1, H1))):
        torch.testing.assert_close(both.scale[i], fit_compensated(W, H, 2, 8).scale)
