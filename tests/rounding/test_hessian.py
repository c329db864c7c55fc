"Properties of the quadratic loss, of what H is made from, and of the grids that are fitted under it."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from aespa_nb.rounding.grid import grouped, minmax_grid
from aespa_nb.rounding.grid_search import fit_grid, group_hessians, row_loss
from aespa_nb.rounding.hessian import damp, quadratic_loss, taylor_change
from aespa_nb.errors import AespaError, NumericalError
from aespa_nb.notation import tiny_inputs, tiny_weight

quick = settings(max_examples=50, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 10_000)


def moments(inp, tok, seed):
    X = tiny_inputs(inp, tok, seed)
    return X, X @ X.T / tok


@quick
@given(seeds, st.integers(1, 8), st.integers(1, 24), st.integers(1, 40))
def test_loss_is_the_output_error(seed, out, inp, tok):
    X, H = moments(inp, tok, seed)
    dW = tiny_weight(out, inp, seed)
    assert_close(quadratic_loss(dW, H), (dW @ X).square().sum() / tok, rtol=1e-10, atol=1e-14)


@quick
@given(seeds, st.integers(1, 12))
def test_taylor_change_is_that_of_the_whole_hessian(seed, n):
    g = torch.Generator().manual_seed(seed)
    M, w, dw = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((n, n), (n,), (n,)))
    loss = lambda w: (M @ w).tanh().square().sum()
    gradient, H = torch.func.grad(loss)(w), torch.autograd.functional.hessian(loss, w)
    assert_close(taylor_change(loss, w, dw), gradient @ dw + dw @ H @ dw / 2, rtol=1e-9, atol=1e-9)


@quick
@given(seeds, st.integers(1, 20), st.sets(st.integers(0, 11), max_size=11), st.floats(1e-4, 1))
def test_damping_makes_any_gram_matrix_positive_definite(seed, tok, dead, ratio):
    X, _ = moments(12, tok, seed)
    X[list(dead)] = 0
    H = X @ X.T / tok
    kept, D = H.clone(), damp(H, ratio)
    torch.linalg.cholesky(D)
    assert torch.equal(H, kept)
    assert torch.equal(D - D.diagonal().diag(), H - H.diagonal().diag())  # only the diagonal moves
    assert (D.diagonal() > H.diagonal()).all()
    both = damp(torch.stack([H, 2 * H]), ratio)  # heads are damped one by one
    assert torch.equal(both[0], D)


def test_a_dead_input_gets_a_diagonal_of_its_own():
    X, _ = moments(6, 40, seed=2)
    X[4] = 0
    H = X @ X.T / 40
    D = damp(H, ratio=0, dead=0.25)
    H[4, 4] = 0.25
    assert torch.equal(D, H)


def test_bad_input_is_refused():
    _, H = moments(6, 20, seed=0)
    with pytest.raises(NumericalError):
        fit_grid(tiny_weight(4, 6), H * float("nan"), 2)
    with pytest.raises(AespaError, match="does not belong"):
        fit_grid(tiny_weight(4, 8), H, 2)


# --- grids fitted under H -----------------------------------------------------------------------------------------

options = st.fixed_dictionaries(
    {"bits": st.integers(2, 5), "group_size": st.sampled_from([None, 2, 4, 12]), "symmetric": st.booleans()}
)


def losses(W, H, grid, group_size):
    return row_loss(grouped(grid.round(W) - W, group_size), group_hessians(H, group_size))


@quick
@given(seeds, options)
def test_a_fitted_grid_is_never_worse_than_minmax(seed, kw):
    _, H = moments(12, 30, seed)
    W = tiny_weight(5, 12, seed + 1)
    fitted, full = fit_grid(W, H, **kw, n_clip=15), minmax_grid(W, **kw)
    assert (losses(W, H, fitted, kw["group_size"]) <= losses(W, H, full, kw["group_size"]) * (1 + 1e-12)).all()
    assert (fitted.scale <= full.scale).all()


@quick
@given(seeds, options, st.integers(-12, 12))
def test_units_do_not_change_the_codes(seed, kw, exponent):
    "Powers of two on W and on H change no digit."
    _, H = moments(12, 30, seed)
    W, scale = tiny_weight(4, 12, seed + 1), 2.0**exponent
    before, after = fit_grid(W, H, **kw, n_clip=9), fit_grid(W * scale, H / scale, **kw, n_clip=9)
    assert torch.equal(before.scale * scale, after.scale)
    assert torch.equal(before.codes(W), after.codes(W * scale))


@quick
@given(seeds, st.sampled_from([2, 3, 4, 6]))
def test_groups_are_fitted_as_weights_of_their_own(seed, size):
    _, H = moments(12, 40, seed)
    W = tiny_weight(4, 12, seed + 1)
    grid = fit_grid(W, H, 2, group_size=size, n_clip=9)
    for i, a in enumerate(range(0, 12, size)):
        alone = fit_grid(W[:, a : a + size], H[a : a + size, a : a + size], 2, n_clip=9)
        assert_close(grid.scale[:, i], alone.scale[:, 0])
        assert torch.equal(grid.zero[:, i], alone.zero[:, 0])
