"Z-Fold: the linear system, the scaled Hessian, and that taking turns never loses."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding.problems import correlated, draw
from torch.testing import assert_close

from aespa_nb.rounding.grid_search import fit_grid
from aespa_nb.rounding.hessian import quadratic_loss
from aespa_nb.errors import AespaError
from aespa_nb.rounding.zfold import scale_hessian, solve_zeta, zfold

quick = settings(max_examples=30, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 10_000)


def layers(seed, large=1.0):
    "Three layers that read one input of 12: two plain ones and one with two heads and an H for each."
    H, Ws = correlated(seed, 12, (3,)), [draw(seed + 1, 6, 12), draw(seed + 2, 4, 12), draw(seed + 3, 2, 3, 12)]
    for W in Ws:
        W[..., [1, 5]] *= large
    return Ws, [H[0], H[0], H[1:]]


def total(zeta, Bs, Ws, Hs):
    return sum(quadratic_loss(B * zeta - W, H) for B, W, H in zip(Bs, Ws, Hs))


@quick
@given(seeds)
def test_solution_is_stationary_and_the_least(seed):
    Ws, Hs = layers(seed)
    Bs = [fit_grid(W, H, 3, n_clip=5).round(W) for W, H in zip(Ws, Hs)]
    zeta = solve_zeta(Bs, Ws, Hs, pull=1e-12)
    free = zeta.clone().requires_grad_()
    (grad,) = torch.autograd.grad(total(free, Bs, Ws, Hs), free)
    assert grad.abs().max() < 1e-6 * total(0 * zeta, Bs, Ws, Hs)
    least = total(zeta, Bs, Ws, Hs)
    for other in (torch.ones_like(zeta), zeta * 1.01, zeta + 0.01 * torch.sin(torch.arange(12.0))):
        assert least <= total(other, Bs, Ws, Hs)


def test_a_column_without_codes_gets_one():
    Ws, Hs = layers(1)
    Bs = [fit_grid(W, H, 3, n_clip=5).round(W) for W, H in zip(Ws, Hs)]
    for B in Bs:
        B[..., 3] = 0
    assert_close(solve_zeta(Bs, Ws, Hs)[3], torch.tensor(1.0, dtype=torch.float64))
    assert_close(solve_zeta([torch.zeros_like(B) for B in Bs], Ws, Hs), torch.ones(12, dtype=torch.float64))


@quick
@given(seeds)
def test_scaled_hessian_measures_the_same_error(seed):
    (W, *_), (H, *_) = layers(seed)
    zeta = torch.linspace(0.3, 3, 12, dtype=W.dtype)
    B = fit_grid(W / zeta, scale_hessian(H, zeta), 2, n_clip=5).round(W / zeta)
    assert_close(quadratic_loss(B - W / zeta, scale_hessian(H, zeta)), quadratic_loss(B * zeta - W, H))


@settings(quick, max_examples=12)
@given(seeds, st.integers(2, 4), st.sampled_from([None, 4]), st.booleans(), st.sampled_from([0.1, 0.5, 1.0]))
def test_never_loses_and_more_rounds_never_lose(seed, bits, group_size, symmetric, min_zeta):
    Ws, Hs = layers(seed, large=3.0)
    before = [T.clone() for T in (*Ws, *Hs)]
    losses = []
    for rounds in range(4):
        zeta, grids = zfold(Ws, Hs, bits, group_size, symmetric, rounds, min_zeta, n_clip=8)
        assert ((zeta >= min_zeta) & (zeta <= 1 / min_zeta)).all()
        losses.append(float(total(zeta, [g.round(W / zeta) for g, W in zip(grids, Ws)], Ws, Hs)))
    plain = [fit_grid(W, H, bits, group_size, symmetric, n_clip=8).round(W) for W, H in zip(Ws, Hs)]
    assert_close(losses[0], float(total(1.0, plain, Ws, Hs)))
    assert losses == sorted(losses, reverse=True)
    if losses[-1] == losses[0]:
        assert torch.equal(zeta, torch.ones_like(zeta))
    assert all(torch.equal(a, b) for a, b in zip(before, (*Ws, *Hs)))


def test_large_columns_gain():
    def ratio(seed):
        Ws, Hs = layers(seed, large=5.0)
        loss = [total(z, [g.round(W / z) for g, W in zip(gs, Ws)], Ws, Hs)
                for z, gs in (zfold(Ws, Hs, 2, rounds=r, n_clip=20) for r in (0, 3))]  # fmt: skip
        return float(loss[1] / loss[0])

    assert torch.tensor([ratio(seed) for seed in range(10)]).mean() < 0.8


def test_heads_that_share_one_hessian_are_rows():
    (W, *_), (H, *_) = layers(2, large=3.0)
    zeta, (grid,) = zfold([W], [H], 2, n_clip=10)
    zeta_heads, (grid_heads,) = zfold([W.view(2, 3, 12)], [H], 2, n_clip=10)
    assert_close(zeta, zeta_heads)
    assert_close(grid.scale, grid_heads.scale.view(6, 1))


def test_refusals():
    Ws, Hs = layers(0)
    with pytest.raises(AespaError, match="one H for each"):
        zfold(Ws, Hs[:2], 2)
    for options in (dict(rounds=-1), dict(min_zeta=0.0), dict(min_zeta=2.0)):
        with pytest.raises(AespaError, match="zfold needs"):
            zfold(Ws, Hs, 2, **options)
    with pytest.raises(AespaError, match="bits"):
        zfold(Ws, Hs, 9)
