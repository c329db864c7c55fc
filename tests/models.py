"""Small random models that several tests share, and what they ask of them."""

import contextlib
import copy

import pytest
import torch
from aespa_nb import AespaError
from aespa_nb.attention.block_error import AttentionBlock
from aespa_nb.attention.forward import causal_mask, rope_cos_sin, rope_matrices
from aespa_nb.attention.kronecker_losses import AttentionStatistics
from aespa_nb.model.blocks import stacks_of
from beartype import beartype
from jaxtyping import jaxtyped
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

TOKENS = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(0))
SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32)
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, intermediate_size=48)),
    "mha": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=48, attention_bias=True)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, intermediate_size=48)),  # q, k, v in one linear
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
}
EXPERTS = dict(num_key_value_heads=2, intermediate_size=16, num_local_experts=4)
POST_NORM = dict(ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False)
MORE = {  # for the tests that name them
    "opt-post-norm": lambda: OPTForCausalLM(OPTConfig(**SMALL, **POST_NORM)),
    "moe": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, **EXPERTS)),
}


def fresh(kind="llama"):
    "A model as it is initialized, the same each time."
    torch.manual_seed(0)
    return (MODELS | MORE)[kind]().eval()


def small(kind="llama", dtype=torch.float32):
    "A model whose blocks speak up: random ones add little to the stream."
    model = fresh(kind).requires_grad_(False).to(dtype)
    for p in model.get_submodule(stacks_of(model)[0]).parameters():
        p.copy_(10 * p if p.ndim == 2 else p + 0.1 * torch.randn(p.shape))
    return model


def loud(kind="llama", factor=10):
    "A small model whose predictions are far from even, so that rounding moves them."
    model = small(kind)
    model.get_output_embeddings().weight.mul_(factor)
    return model


def same(a, b):
    "Are two values equal to the last bit, with all tensors, lists and dictionaries in them?"
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@contextlib.contextmanager
def unchanged(model):
    "What happens inside leaves the model as it was: weights, what learns, no gradients, hooks, methods of modules."
    learning = lambda: [(p.requires_grad, p.grad is None) for p in model.parameters()]
    hooks = lambda: [("forward" in vars(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    before = copy.deepcopy(model.state_dict()), learning(), hooks()
    yield
    assert same(before[0], model.state_dict()), "weights have changed"
    assert (learning(), hooks()) == before[1:], "gradients, what learns, or hooks"


@contextlib.contextmanager
def refused(match=None):
    "What happens inside ends with an `AespaError` of one line."
    with pytest.raises(AespaError, match=match) as error:
        yield error
    assert "\n" not in str(error.value), error.value


def checked(module, name):
    "A function of a module that checks its annotations, the shapes of tensors included."
    return jaxtyped(typechecker=beartype)(getattr(module, name))


def attention_module(seed, kv=2, group=2, d=4, inp=6, tok=5, seqs=4, rotated=True, causal=True, scaling=None):
    "A random attention module in double precision, its inputs `[seqs inp tok]`, and a change of its `W_q`."
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    rows = kv * group * d, kv * d, kv * d
    W, W_o = [draw(r, inp) / 2 for r in rows], draw(inp, rows[0])
    rope = rope_cos_sin(tok, d) if rotated else None
    block = AttentionBlock(*W, W_o, kv * group, kv, rope, causal_mask(tok) if causal else None, scaling)
    return block, draw(seqs, inp, tok), draw(*W[0].shape)


def statistics_of(kind, block, X, sizes, **options):
    "Statistics of the class `kind` of all sequences, in batches of the given sizes; and what the block computed."
    seen, R = block(X), rope_matrices(*block.rope) if block.rope else None
    shape = block.n_heads, block.n_kv_heads, len(block.W_q) // block.n_heads, X.shape[1]
    stats = kind(shape, R, **{"dtype": X.dtype} | options)
    for X_i, Q, K, V, A in zip(*(v.split(sizes) for v in (X, seen.Q, seen.K, seen.V, seen.A))):
        stats.add(X_i, Q, K, *([V] if kind is not AttentionStatistics else []), A)
    return stats, seen
