"""Pre-computed losses against brute force, and the promise about memory."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from aespa_nb.attention.block_error import refined_v_loss
from aespa_nb.attention.forward import rope_cos_sin, rope_matrices
from aespa_nb.attention.kronecker_losses import AttentionStatistics, KroneckerLoss, mean_rotated
from models import attention_module, statistics_of

few = settings(max_examples=20, deadline=None, derandomize=True, database=None)
float64 = torch.float64


def collect(block, X, sizes):
    return statistics_of(AttentionStatistics, block, X, sizes)


@few
@given(st.integers(0, 99), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.lists(st.integers(1, 3), max_size=3))
def test_statistics_in_any_batches_are_sums_over_tokens(seed, kv, group, rotated, sizes):
    "Every matrix, token by token and head by head."
    seqs = sum(sizes) + 1
    block, X, _ = attention_module(seed, kv, group, seqs=seqs, rotated=rotated)
    stats, seen = collect(block, X, [*sizes, 1])
    H, n = torch.zeros(6, 6, dtype=float64), seqs * 5
    kk, qq, hv = (torch.zeros(kv, s, s, dtype=float64) for s in (4, 4, 6))
    for b in range(seqs):
        for m in range(5):
            H += X[b, :, m].outer(X[b, :, m]) / n
            for h in range(kv * group):
                q, mixed = seen.Q[b, h, :, m], X[b] @ seen.A[b, h, m]
                qq[h // group] += q.outer(q) / (n * group)
                hv[h // group] += mixed.outer(mixed) / (n * group)
            for h in range(kv):
                kk[h] += seen.K[b, h, :, m].outer(seen.K[b, h, :, m]) / n
    if rotated:
        R = rope_matrices(*block.rope)
        kk, qq = (sum(r.T @ M @ r for r in R) / 5 for M in (kk, qq))
    losses = stats.losses()
    for got, expected in ((losses["q"].H, H), (losses["k"].H, H), (losses["k"].G, qq), (losses["v"].H, hv)):
        assert_close(got, expected, rtol=1e-10, atol=1e-12)
    for h in range(kv * group):
        assert_close(losses["q"].G[h], kk[h // group], rtol=1e-10, atol=1e-12)
    assert losses["v"].G is None


@few
@given(st.integers(0, 99), st.sampled_from(["H", "G", "both", "none", "only H"]), st.integers(1, 3))
def test_kronecker_loss_is_the_quadratic_form_of_the_kronecker_product(seed, batched, heads):
    g = torch.Generator().manual_seed(seed)
    heads = 1 if batched == "none" else heads
    B = torch.randn(2, heads, 5, 5, generator=g, dtype=float64)
    H, G = B[0] @ B[0].mT, (B[1] @ B[1].mT)[:, :3, :3]
    H = H if batched in ("H", "both", "only H") else H[0]
    G = None if batched == "only H" else G if batched in ("G", "both") else G[0]
    loss = KroneckerLoss(H, G)
    d = torch.randn(3 * heads, 5, generator=g, dtype=float64, requires_grad=True)
    expected = 0
    for h, rows in enumerate(d.split(3)):
        H_h = H if H.ndim == 2 else H[h]
        G_h = torch.eye(3, dtype=float64) if G is None else G if G.ndim == 2 else G[h]
        expected = expected + rows.flatten() @ torch.kron(G_h, H_h) @ rows.flatten()
    assert_close(loss(d), expected, rtol=1e-10, atol=1e-12)
    assert_close(loss(loss.split(d)), expected, rtol=1e-10, atol=1e-12)
    assert_close(*(torch.autograd.grad(v, d)[0] for v in (loss(d), expected)), rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(loss, d)


@few
@given(st.integers(0, 99))
def test_q_loss_is_a_mean_over_all_inputs_keys_and_rotations(seed):
    "What the independence assumption means, by loops."
    block, X, dW = attention_module(seed, kv=1, group=1, d=4, tok=3, seqs=2)
    stats, seen = collect(block, X, [2])
    tokens, keys = X.transpose(0, 1).flatten(1).T, seen.K[:, 0].transpose(0, 1).flatten(1).T
    triples = [(k @ r @ dW @ x) ** 2 for r in rope_matrices(*block.rope) for x in tokens for k in keys]
    assert_close(stats.losses()["q"](dW), torch.stack(triples).mean(), rtol=1e-10, atol=1e-12)


def test_v_loss_keeps_value_and_gradient_of_the_data_form():
    block, X, dW = attention_module(0)
    stats, seen = collect(block, X, [3, 1])
    d = dW[:8].clone().requires_grad_()
    ours, data = stats.losses()["v"](d), refined_v_loss(d, X, seen.A, 2)
    assert_close(ours, data, rtol=1e-10, atol=0)
    assert_close(*(torch.autograd.grad(v, d)[0] for v in (ours, data)), rtol=1e-10, atol=1e-12)


class Largest(TorchDispatchMode):
    "Remembers the largest storage that an operation newly makes."

    numel, known = 0, ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for o in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(o, torch.Tensor) and o.untyped_storage().data_ptr() not in self.known:
                self.numel = max(self.numel, o.numel())
        return out


def test_no_intermediate_grows_with_tokens_times_heads():
    seqs, heads, inp, tok, d = 2, 16, 24, 32, 4
    X, Q, K, A = (torch.rand(seqs, *s) for s in ((inp, tok), (heads, d, tok), (heads, d, tok), (heads, tok, tok)))
    stats = AttentionStatistics((heads, heads, d, inp))
    with Largest() as seen:
        seen.known = [t.untyped_storage().data_ptr() for t in (X, Q, K, A, stats.hv, stats.kk, stats.qq)]
        stats.add(X, Q, K, A)
    assert seen.numel <= seqs * max(inp * tok, heads * d * tok)
    assert seen.numel < seqs * heads * inp * tok / 4


def test_mean_rotated_keeps_trace_and_symmetry_and_takes_any_heads():
    R = rope_matrices(*rope_cos_sin(9, 6))
    B = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=float64)
    M = B @ B.mT
    out = mean_rotated(M, R)
    assert_close(out, torch.stack([r.T @ M @ r for r in R]).mean(0))
    assert_close(out, out.mT)
    assert_close(out.diagonal(dim1=-2, dim2=-1).sum(-1), M.diagonal(dim1=-2, dim2=-1).sum(-1))
    assert_close(mean_rotated(M[0, 0], R), out[0, 0])


def test_half_precision_activations_are_summed_in_single():
    block, X, _ = attention_module(1)
    seen = block(X)
    stats = AttentionStatistics((4, 2, 4, 6), rope_matrices(*block.rope))
    stats.add(*(v.half() for v in (X, seen.Q, seen.K, seen.A)))
    exact = collect(block, X, [4])[0].losses()
    for name, loss in stats.losses().items():
        assert loss.H.dtype == torch.float32
        assert_close(loss.H.double(), exact[name].H, rtol=1e-2, atol=1e-2)
    assert_close(stats.losses()["q"].G.double(), exact["q"].G, rtol=1e-2, atol=1e-1)


def test_damping_makes_both_sides_positive_definite():
    v = torch.ones(5, 1, dtype=float64)
    loss = KroneckerLoss(v @ v.T, (v @ v.T)[:3, :3])
    damped = loss.damped(0.01)
    assert torch.linalg.eigvalsh(damped.H)[0] > 0.009 and torch.linalg.eigvalsh(damped.G)[0] > 0.009
    assert loss.H.equal(v @ v.T)


@few
@given(st.integers(0, 99), st.sampled_from([(1, 0), (3, 0), (1, 1), (3, 3), (1, 3)]))
def test_curvature_is_the_loss_of_single_weights(seed, heads):
    g, (h, w) = torch.Generator().manual_seed(seed), heads
    root = lambda n, size: torch.randn(*((n,) if n > 1 else ()), size, size, generator=g, dtype=float64)
    H, G = root(h, 4), root(w, 2) if w else None
    loss = KroneckerLoss(H @ H.mT, None if G is None else G @ G.mT)
    rows = 2 * loss.heads
    each = torch.eye(rows * 4, dtype=float64).view(-1, rows, 4)
    found = loss.curvature.expand_as(loss.split(each[0])).reshape(-1)
    assert_close(found, torch.stack([loss(dW) for dW in each]))
