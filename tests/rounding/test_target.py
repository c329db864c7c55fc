"Aiming at the full-precision network: the statistics of two streams, the target, and how far to go."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from aespa_nb.rounding.hessian import quadratic_loss
from aespa_nb.errors import AespaError, NumericalError
from aespa_nb.notation import tiny_inputs, tiny_weight
from aespa_nb.rounding.target import PairedGram, best_share, error_map, full_precision_target

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 10_000)


def streams(inp, tok, seed, size=0.3):
    "Inputs, and what they should have been: partly a linear map of them, partly not."
    X = tiny_inputs(inp, tok, seed)
    return X, X + size * (tiny_weight(inp, inp, seed + 1) @ X + tiny_inputs(inp, tok, seed + 2).cos())


def paired(X, X_full, dtype=torch.float64):
    gram = PairedGram(X.shape[-2], dtype=dtype)
    gram.add_pair(X, X_full)
    return gram.mean(), gram.error()


def output_error(V, W, X, X_full):
    return (V @ X - W @ X_full).square().sum() / X.shape[1]


@quick
@given(seeds, st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any))
def test_a_stream_gives_the_same_matrices_however_it_is_cut(seed, sizes):
    X, X_full = streams(7, sum(sizes), seed)
    gram = PairedGram(7, dtype=torch.float64)
    for x, x_full in zip(X.split(sizes, dim=1), X_full.split(sizes, dim=1)):
        gram.add_pair(x, x_full)
    assert gram.tokens == sum(sizes)
    assert_close(gram.mean(), X @ X.T / sum(sizes), rtol=0, atol=1e-12)
    assert_close(gram.error(), (X_full - X) @ X.T / sum(sizes), rtol=0, atol=1e-12)


def test_streams_take_batches_and_lower_precision_and_leave_them_as_they_are():
    X, X_full = streams(8, 60, seed=3)
    kept = X.clone(), X_full.clone()
    H, D = paired(*(T.reshape(8, 3, 20).transpose(0, 1) for T in (X, X_full)))  # seq inp tok
    assert_close((H, D), paired(X, X_full), rtol=0, atol=1e-12)
    assert_close(paired(X.float(), X_full.float(), torch.float32)[0].double(), H, rtol=1e-5, atol=1e-6)
    assert torch.equal(X, kept[0]) and torch.equal(X_full, kept[1])


def test_without_an_error_the_target_is_the_weight():
    X, W = tiny_inputs(9, 50), tiny_weight(4, 9)
    H, D = paired(X, X)
    S = error_map(H, D)
    assert torch.equal(full_precision_target(W, S), W)
    assert best_share(W, S, H, D) == 0


@quick
@given(seeds, st.integers(1, 8), st.integers(1, 12), st.integers(30, 80))
def test_the_closed_form_is_least_squares(seed, out, inp, tok):
    X, X_full = streams(inp, tok, seed)
    W = tiny_weight(out, inp, seed + 3)
    best = torch.linalg.lstsq(X.T, (W @ X_full).T).solution.T
    assert_close(full_precision_target(W, error_map(*paired(X, X_full), damping=0)), best, rtol=1e-7, atol=1e-7)


@quick
@given(seeds, st.integers(1, 6), st.integers(1, 10))
def test_the_square_is_completed(seed, out, inp):
    X, X_full = streams(inp, 60, seed)
    W, other = tiny_weight(out, inp, seed), tiny_weight(out, inp, seed + 1)
    H, D = paired(X, X_full)
    aim = full_precision_target(W, error_map(H, D, damping=0))
    constant = output_error(aim, W, X, X_full)
    assert_close(output_error(other, W, X, X_full), quadratic_loss(other - aim, H) + constant, rtol=1e-8, atol=1e-8)


@quick
@given(seeds, st.integers(1, 60), st.floats(1e-3, 10))
def test_on_its_own_tokens_the_target_never_loses(seed, tok, damping):
    X, X_full = streams(12, tok, seed)
    W = tiny_weight(5, 12, seed)
    S = error_map(*paired(X, X_full), damping)
    errors = [output_error(full_precision_target(W, S, a), W, X, X_full) for a in (0, 0.5, 1)]
    assert errors[2] <= errors[1] * (1 + 1e-9) and errors[1] <= errors[0] * (1 + 1e-9)


def test_share_goes_from_the_weight_to_the_full_target():
    X, X_full = streams(8, 90, seed=1)
    W = tiny_weight(4, 8)
    kept, S = W.clone(), error_map(*paired(X, X_full))
    none, half, full = (full_precision_target(W, S, a) for a in (0, 0.5, 1))
    assert torch.equal(none, W) and torch.equal(W, kept)
    assert_close(half, (W + full) / 2)
    assert torch.equal(full, full_precision_target(W, S))


@quick
@given(seeds, st.integers(4, 40), st.integers(1, 30), st.floats(1e-3, 1))
def test_the_share_is_that_of_a_grid_search(seed, tok, held, damping):
    X, X_full = streams(10, tok + held, seed)
    W = tiny_weight(6, 10, seed)
    S = error_map(*paired(X[:, :tok], X_full[:, :tok]), damping)
    x, x_full = X[:, tok:], X_full[:, tok:]
    share = best_share(W, S, *paired(x, x_full))
    shares = torch.linspace(0, 1, 501).tolist()
    tried = torch.stack([output_error(full_precision_target(W, S, a), W, x, x_full) for a in shares])
    assert 0 <= share <= 1
    assert abs(shares[tried.argmin()] - share) <= 0.002
    assert output_error(full_precision_target(W, S, share), W, x, x_full) <= tried.min() * (1 + 1e-9)


@pytest.mark.parametrize("factor, share", [(-1, 0.0), (10, 1.0), (0, 0.0), (1, pytest.approx(1))])
def test_the_share_stays_between_0_and_1_and_is_1_on_tokens_it_has_seen(factor, share):
    H, D = paired(*streams(8, 200, seed=2))
    assert best_share(tiny_weight(5, 8), error_map(H, D, damping=0), H, factor * D) == share


def test_inputs_that_never_fire_stay_out_unless_rounding_has_silenced_them():
    X, X_full = streams(8, 100, seed=4)
    X[[1, 6]] = X_full[[1, 6]] = X[3] = 0
    S = error_map(*paired(X, X_full))
    assert torch.isfinite(S).all() and not S[:, [1, 3, 6]].any() and not S[[1, 6]].any()
    assert S[3].count_nonzero() == 5  # guessed from the others


def test_fewer_tokens_than_inputs():
    X, X_full = streams(16, 3, seed=5)
    S = error_map(*paired(X, X_full))
    assert torch.isfinite(S).all()
    with pytest.raises(NumericalError, match="raise the damping"):
        error_map(*paired(X, X_full), damping=0)


def test_single_precision_follows_double():
    X, X_full = streams(12, 300, seed=6)
    W = tiny_weight(5, 12)
    H, D = paired(X.float(), X_full.float(), torch.float32)
    S = error_map(H, D)
    aim, share = full_precision_target(W.float(), S, 0.7), best_share(W.float(), S, H, D)
    exact_H, exact_D = paired(X, X_full)
    exact = error_map(exact_H, exact_D)
    assert aim.dtype == S.dtype == torch.float32 and isinstance(share, float)
    assert_close(aim.double(), full_precision_target(W, exact, 0.7), rtol=1e-4, atol=1e-4)
    assert share == pytest.approx(best_share(W, exact, exact_H, exact_D), abs=1e-4)


def test_a_small_error_survives_single_precision():
    X, X_full = streams(12, 2000, seed=7, size=1e-3)
    D = paired(X.float(), X_full.float(), torch.float32)[1].double()
    true = paired(X.float().double(), X_full.float().double())[1]
    assert (D - true).norm() < 1e-5 * true.norm()


def test_bad_input_is_named_and_leaves_no_trace():
    X, X_full = streams(6, 20, seed=0)
    gram = PairedGram(6, dtype=torch.float64)
    with pytest.raises(AespaError, match="expected inputs"):
        gram.add_pair(X[1:], X_full[1:])
    for pair in ((X, X_full / 0), (X / 0, X_full)):
        with pytest.raises(NumericalError, match="NaN or Inf"):
            gram.add_pair(*pair)
    assert gram.tokens == 0 and not gram.total.any() and not gram.cross.any()
    for empty in (gram.mean, gram.error):
        with pytest.raises(AespaError, match="no tokens"):
            empty()


def test_what_cannot_be_is_refused():
    eye = torch.eye(4, dtype=torch.float64)
    for share in (-0.01, 1.01, float("nan")):
        with pytest.raises(AespaError, match="between 0 and 1"):
            full_precision_target(eye, eye, share)
    with pytest.raises(NumericalError):
        error_map(eye * float("nan"), eye)
    with pytest.raises(AespaError):
        error_map(eye, eye, damping=-1)


def test_sums_beyond_half_precision_are_no_infinity():
    X = torch.full((64, 4096), 0.5, dtype=torch.float16)  # their sum is twice what float16 holds
    gram = PairedGram(64)
    gram.add_pair(X, X)
    assert gram.error().abs().max() == 0 and (gram.mean() == 0.25).all()
