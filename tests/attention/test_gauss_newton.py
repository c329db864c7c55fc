"""Gauss-Newton statistics against derivatives, loops and a trained model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from aespa_nb.attention.block_error import AttentionBlock, moved
from aespa_nb.attention.forward import repeat_kv, rope_matrices, rotate, split_heads
from aespa_nb.attention.gauss_newton import GaussNewtonStatistics, output_change, output_metric, query_strides
from aespa_nb.errors import AespaError, NumericalError
from models import attention_module, statistics_of

few = settings(max_examples=15, deadline=None, derandomize=True, database=None)
float64 = torch.float64


def module(seed, kv=2, group=2, tok=7, **options):
    return attention_module(seed, kv, group, tok=tok, **options)[:2]


def collect(block, X, sizes, **options):
    return statistics_of(GaussNewtonStatistics, block, X, sizes, **{"scaling": block.scaling} | options)


@few
@given(st.integers(0, 99), st.integers(1, 2), st.integers(1, 3), st.booleans(), st.sampled_from(["W_q", "W_k"]))
def test_output_change_is_the_derivative_of_attention(seed, kv, group, rotated, name):
    block, X = module(seed, kv, group, rotated=rotated)
    d = torch.randn(getattr(block, name).shape, generator=torch.Generator().manual_seed(seed), dtype=float64)
    seen, n = block(X), kv * group
    turn = (lambda Y: rotate(Y, *block.rope)) if rotated else (lambda Y: Y)
    dY = repeat_kv(turn(split_heads(d @ X, n if name == "W_q" else kv)), n)
    dS = dY.mT @ repeat_kv(seen.K, n) if name == "W_q" else seen.Q.mT @ dY
    ours = output_change(seen.A, repeat_kv(seen.V, n), dS / 4**0.5)
    out = lambda s: moved(block, **{name: s * d})(X).out
    at, along = torch.tensor([0.0, 1.0], dtype=float64)
    assert_close(ours, torch.autograd.functional.jvp(out, at, along)[1], rtol=1e-10, atol=1e-12)
    assert_close(ours, (out(1e-5) - out(-1e-5)) / 2e-5, rtol=1e-6, atol=1e-8)


@few
@given(st.integers(0, 99), st.integers(1, 2), st.integers(1, 3), st.booleans(), st.booleans(), st.integers(1, 3))
def test_matrices_are_the_formulas_query_by_query(seed, kv, group, rotated, metric, stride):
    block, X = module(seed, kv, group, rotated=rotated, seqs=2)
    M = output_metric(block.W_o, kv * group) if metric else torch.eye(4, dtype=float64).expand(kv * group, 4, 4)
    stats, seen = collect(block, X, [1, 1], stride=stride, coarse=1, metric=M if metric else None)
    R = rope_matrices(*block.rope) if rotated else torch.eye(4, dtype=float64).expand(7, 4, 4)
    gq, gk, hk = (torch.zeros_like(t) for t in (stats.gq, stats.gk, stats.hk))
    queries = range(stride // 2, 7, stride)
    for b in range(2):
        for h in range(kv * group):
            k = h // group
            for m in queries:
                q, C = seen.Q[b, h, :, m], torch.zeros(4, 4, dtype=float64)
                for j in range(m + 1):
                    e, u = seen.V[b, k, :, j] - seen.out[b, h, :, m], R[j].T @ q
                    C += seen.A[b, h, m, j] * e.outer(seen.K[b, k, :, j])
                    w = seen.A[b, h, m, j] * (e @ M[h] @ e)
                    gk[k] += w * u.outer(u)
                    hk[k] += w * (q @ q) * X[b, :, j].outer(X[b, :, j])
                gq[h] += R[m].T @ C.T @ M[h] @ C @ R[m]
    losses = stats.losses()
    assert_close(losses["q"].G, gq / (4 * 2 * len(queries)), rtol=1e-9, atol=1e-11)
    for got, expected in ((losses["k"].G, gk), (losses["k"].H, hk)):
        trace = [t.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None] for t in (got, expected)]
        assert_close(got / trace[0], expected / trace[1], rtol=1e-9, atol=1e-11)
    assert (losses["v"].G is None) == (not metric)


@few
@given(st.integers(0, 99), st.lists(st.integers(1, 3), max_size=3), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_streamed_in_any_batches_and_any_tiles(seed, sizes, stride, coarse, rotated):
    block, X = module(seed, seqs=sum(sizes) + 1, rotated=rotated)
    options = dict(stride=stride, coarse=coarse)
    one, _ = collect(block, X, [len(X)], **options)

    class Small(GaussNewtonStatistics):
        budget = 60

    other, _ = statistics_of(Small, block, X, [*sizes, 1], **options)
    for a, b in zip(one.losses().values(), other.losses().values()):
        assert_close(a.H, b.H, rtol=1e-10, atol=1e-12)
        assert a.G is None or torch.allclose(a.G, b.G, rtol=1e-10, atol=1e-12)


def test_without_a_causal_mask_and_with_a_window():
    block, X = module(3)
    far = torch.ones(7, 7, dtype=float64).triu(3) + torch.ones(7, 7, dtype=float64).tril(-3)
    for mask in (None, far * -1e9):
        block = AttentionBlock(block.W_q, block.W_k, block.W_v, block.W_o, 4, 2, block.rope, mask)
        stats, seen = collect(block, X, [4], stride=1, coarse=1)
        from_mean = repeat_kv(seen.V, 4).mT[:, :, None] - seen.out.mT[..., None, :]
        C = torch.einsum("bhmj,bhmjv,bhkj->bhmvk", seen.A, from_mean, repeat_kv(seen.K, 4))
        C = C @ rope_matrices(*block.rope)
        assert_close(stats.losses()["q"].G, (C.mT @ C).sum((0, 2)) / (4 * 28), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rotated", [True, False])
def test_losses_have_the_size_of_the_first_order_error(rotated):
    "Mean over random changes; for k the mean over a group of query heads."
    block, X = module(0, inp=24, tok=16, seqs=8, rotated=rotated, d=8)
    losses, g = collect(block, X, [8], stride=1, coarse=1)[0].losses(), torch.Generator().manual_seed(1)
    for role, share in (("q", 1), ("k", 2)):
        W, true, ours = getattr(block, f"W_{role}"), 0, 0
        for _ in range(60):
            d = 1e-4 * torch.randn(W.shape, generator=g, dtype=float64)
            out = moved(block, **{f"W_{role}": d})(X).out - block(X).out
            true, ours = true + out.square().sum((1, 2)).mean() / share, ours + losses[role](d)
        assert 0.8 < ours / true < 1.25


def test_scaling_and_single_precision():
    block, X = module(2, scaling=0.25)
    exact, seen = collect(block, X, [4])
    rough, _ = collect(block, X, [4], dtype=torch.float32)
    assert_close(exact.losses()["q"].G.float(), rough.losses()["q"].G, rtol=1e-4, atol=1e-6)
    half = GaussNewtonStatistics((4, 2, 4, 6), rope_matrices(*block.rope), scaling=0.25)
    half.add(*(v.half() for v in (X, seen.Q, seen.K, seen.V, seen.A)))
    assert half.losses()["k"].G.dtype == torch.float32
    double, _ = collect(block, X, [4], scaling=0.5)
    for role in "qk":
        d = torch.ones(16 if role == "q" else 8, 6, dtype=float64)
        assert_close(double.losses()[role](d), 4 * exact.losses()[role](d))


def test_errors_and_a_single_token():
    with pytest.raises(AespaError, match="at least 1"):
        GaussNewtonStatistics((4, 2, 4, 6), coarse=0)
    block, X = module(0, tok=1)
    stats, seen = collect(block, X, [4])
    assert stats.losses()["q"].G.abs().max() < 1e-20 and stats.losses()["k"].H.abs().max() < 1e-20
    with pytest.raises(NumericalError, match="NaN or Inf"):
        stats.add(X / 0, seen.Q, seen.K, seen.V, seen.A)


@pytest.mark.parametrize("d", [16, 64, 128])
def test_of_few_tokens_every_query_counts(d):
    found = [query_strides(tokens, d) for tokens in (1, 24 * d, 300 * d, 10**7)]
    assert found == [(1, 1), (1, 1), (8, 2), (8, 2)]
    for tokens in range(1, 600 * d, 7 * d):
        stride, coarse = query_strides(tokens, d)
        assert stride == 1 or tokens / stride >= 32 * d
        assert coarse == 1 or tokens / (stride * coarse) >= 16 * d
