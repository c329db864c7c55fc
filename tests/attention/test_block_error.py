"""Attention and the relaxed losses against oracles that share no code with them."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import attention_module
from torch.testing import assert_close

from aespa_nb.attention.forward import attend, causal_mask, merge_heads, rope_cos_sin, rope_matrices, rotate
from aespa_nb.attention.block_error import (
    attention_error_bound,
    block_loss,
    layerwise_loss,
    refined_k_loss,
    refined_q_loss,
    refined_v_loss,
    softmax_jacobian,
    true_attention_error,
)  # fmt: skip

few = settings(max_examples=25, deadline=None, derandomize=True, database=None)
shapes = st.fixed_dictionaries(
    {
        "kv": st.integers(1, 3),
        "group": st.integers(1, 3),
        "d": st.sampled_from([2, 4, 6]),
        "inp": st.integers(3, 9),
        "tok": st.integers(1, 7),
        "seed": st.integers(0, 999),
        "rotated": st.booleans(),
        "causal": st.booleans(),
    }
)


def case(seed, **shape):
    "A random attention module, its inputs and a source of changes."
    block, X, _ = attention_module(seed, seqs=2, **shape)
    g = torch.Generator().manual_seed(seed + 1)
    return block, X, lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)


def heads_as_rows(Y, n):
    "[batch heads*d tok] -> [batch heads tok d], the layout of PyTorch."
    return Y.view(len(Y), n, -1, Y.shape[-1]).transpose(-1, -2)


def turned(Y):
    "Rotary positions with complex numbers, for [batch heads tok d]."
    tok, d = Y.shape[-2:]
    angle = torch.arange(tok)[:, None] / 10000 ** (torch.arange(d // 2, dtype=Y.dtype) * 2 / d)
    z = torch.complex(*Y.split(d // 2, -1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1)


@few
@given(shapes)
def test_attend_is_torch_attention_with_complex_rotation(shape):
    block, X, _ = case(**shape)
    Q, K, V = (
        heads_as_rows(W @ X, n)
        for W, n in zip((block.W_q, block.W_k, block.W_v), (block.n_heads, block.n_kv_heads, block.n_kv_heads))
    )
    if shape["rotated"]:
        Q, K = turned(Q), turned(K)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    expected = sdpa(Q, K, V, is_causal=shape["causal"], enable_gqa=True)
    assert_close(block(X).out, expected.transpose(-1, -2), rtol=1e-10, atol=1e-12)


@few
@given(shapes)
def test_refined_losses_are_what_they_claim(shape):
    "V: the true error, exactly. Q and K: a bound, for changes of any size. O: the block's loss."
    block, X, draw = case(**shape)
    seen, size = block(X), 10.0 ** draw(()).clamp(-3, 3).item()
    dW_q, dW_k, dW_v, dW_o = (size * draw(*W.shape) for W in (block.W_q, block.W_k, block.W_v, block.W_o))
    exact = refined_v_loss(dW_v, X, seen.A, block.n_kv_heads) * shape["group"]
    assert_close(exact, true_attention_error(block, X, dW_v=dW_v), rtol=1e-9, atol=1e-25)
    for change in ({"dW_q": dW_q}, {"dW_k": dW_k}):
        assert true_attention_error(block, X, **change) <= attention_error_bound(block, X, **change) * (1 + 1e-9)
    assert_close(block_loss(block, X, dW_o=dW_o), layerwise_loss(dW_o, merge_heads(seen.out)), rtol=1e-9, atol=1e-25)


@few
@given(shapes)
def test_refined_q_and_k_are_score_changes_pair_by_pair(shape):
    "By loops over sequences, heads, queries and keys, with rotation matrices."
    block, X, draw = case(**shape)
    seen, dW_q, dW_k = block(X), draw(*block.W_q.shape), draw(*block.W_k.shape)
    d, group, tok = shape["d"], shape["group"], shape["tok"]
    R = rope_matrices(*block.rope) if block.rope else torch.eye(d, dtype=X.dtype).expand(tok, d, d)
    q = k = 0.0
    for b in range(2):
        for h in range(block.n_heads):
            kv = h // group
            for m in range(tok):
                for j in range(tok):
                    dq = R[m] @ dW_q[h * d : (h + 1) * d] @ X[b, :, m]
                    dk = R[j] @ dW_k[kv * d : (kv + 1) * d] @ X[b, :, j]
                    q += (dq @ seen.K[b, kv, :, j]) ** 2 / (2 * tok * tok)
                    k += (dk @ seen.Q[b, h, :, m]) ** 2 / (2 * tok * tok * group)
    assert_close(refined_q_loss(dW_q, X, seen.K, block.n_heads, block.rope), q, rtol=1e-9, atol=1e-12)
    assert_close(refined_k_loss(dW_k, X, seen.Q, block.n_kv_heads, block.rope), k, rtol=1e-9, atol=1e-12)


@few
@given(shapes)
def test_past_does_not_see_the_future(shape):
    block, X, draw = case(**shape | {"causal": True})
    other = X.clone()
    other[..., -1] += draw(*X.shape[:-1])
    assert_close(block(X).out[..., :-1], block(other).out[..., :-1], rtol=0, atol=0)


@few
@given(st.integers(0, 50), st.integers(2, 40), st.sampled_from([2, 8]), st.integers(0, 99))
def test_shifting_all_positions_changes_no_score(shift, tok, d, seed):
    q, k = torch.randn(2, d, tok, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cos, sin = rope_cos_sin(tok + shift, d)
    early = rotate(q, cos[:, :tok], sin[:, :tok]).T @ rotate(k, cos[:, :tok], sin[:, :tok])
    late = rotate(q, cos[:, shift:], sin[:, shift:]).T @ rotate(k, cos[:, shift:], sin[:, shift:])
    assert_close(early, late, rtol=0, atol=1e-12)


@few
@given(st.integers(1, 9), st.floats(0, 6), st.integers(0, 99))
def test_softmax_jacobian_is_a_covariance_below_one_half(n, spread, seed):
    s = spread * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    J = softmax_jacobian(s.softmax(0))
    assert_close(J, torch.func.jacrev(lambda s: s.softmax(0))(s), rtol=0, atol=1e-14)
    low, high = torch.linalg.eigvalsh(J).aminmax()
    assert -1e-14 < low and high <= 0.5 + 1e-14


def test_dtype_follows_and_arguments_stay():
    block, X, _ = case(0, rotated=False)
    before = X.clone()
    W = (block.W_q.float(), block.W_k.float(), block.W_v.float())
    seen = attend(X.float(), W, 4, 2, rope_cos_sin(5, 4, dtype=torch.float32), causal_mask(5, dtype=torch.float32))
    assert {v.dtype for v in vars(seen).values()} == {torch.float32}
    attend(X, (block.W_q, block.W_k, block.W_v), 4, 2, rope_cos_sin(5, 4), causal_mask(5))
    assert X.equal(before)
