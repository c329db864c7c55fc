"""Small random models that several tests share."""

import torch
from aespa_nb.model.blocks import stacks_of
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32)
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, intermediate_size=48)),
    "mha": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=48, attention_bias=True)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, intermediate_size=48)),  # q, k, v in one linear
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
}


def small(kind="llama", dtype=torch.float32):
    "A model whose blocks speak up: random ones add little to the stream."
    torch.manual_seed(0)
    model = MODELS[kind]().eval().requires_grad_(False).to(dtype)
    for p in model.get_submodule(stacks_of(model)[0]).parameters():
        p.copy_(10 * p if p.ndim == 2 else p + 0.1 * torch.randn(p.shape))
    return model
