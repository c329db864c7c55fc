"""Hidden states on their way through the blocks: as the model has them, or refused in words."""

import contextlib

import pytest
import torch
from models import small
from torch.testing import assert_close
from transformers import Gemma2Config, Gemma2ForCausalLM, T5Config, T5ForConditionalGeneration

from aespa_nb.errors import UnsupportedModelError
from aespa_nb.model.capture import capturing
from aespa_nb.model.statistics import survey
from aespa_nb.model.stream import BlockStream, as_inputs, open_stream

TOKENS = torch.randint(3, 64, (6, 12), generator=torch.Generator().manual_seed(0))
SIZE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def through(model, inputs, stack, norm):
    "What the blocks make of each sequence, two at a time, behind the norm that follows them."
    with torch.no_grad(), capturing(model), contextlib.closing(BlockStream(model, inputs, 2, stack=stack)) as stream:
        for block in model.get_submodule(stack):
            stream.run(block, keep=True)
        return model.get_submodule(norm)(stream.hidden), stream.own.keys()


def with_gap(at):
    mask = torch.ones_like(TOKENS)
    mask[at, 5] = 0
    return dict(input_ids=TOKENS, attention_mask=mask)


@pytest.mark.parametrize("inputs", [dict(input_ids=TOKENS), with_gap(0), with_gap(3)], ids=["plain", "first", "fourth"])
def test_a_mask_with_gaps_is_that_of_its_sequence(inputs):
    model = small("llama", torch.float64)
    found, own = through(model, inputs, "model.layers", "model.norm")
    with torch.no_grad(), capturing(model):
        assert_close(found, model.model(**inputs).last_hidden_state, rtol=1e-9, atol=1e-9)
    assert bool(own) == ("attention_mask" in inputs)


@pytest.mark.parametrize("at", [0, 3])
def test_positions_of_one_sequence_are_refused(at):
    positions = torch.arange(12).repeat(6, 1)
    positions[at] *= 3
    with pytest.raises(UnsupportedModelError, match="another position_embeddings"):
        through(small("llama"), dict(input_ids=TOKENS, position_ids=positions), "model.layers", "model.norm")


def test_masks_with_gaps_that_differ_from_block_to_block_are_refused():
    kinds = dict(num_key_value_heads=2, head_dim=8, sliding_window=4, query_pre_attn_scalar=8)
    model = Gemma2ForCausalLM(Gemma2Config(**SIZE, **kinds)).eval()
    through(model, dict(input_ids=TOKENS), "model.layers", "model.norm")
    with pytest.raises(UnsupportedModelError, match="a mask with gaps"):
        through(model, with_gap(0), "model.layers", "model.norm")


def test_a_decoder_reads_its_own_encoder_states_also_where_the_first_two_texts_are_one():
    size = dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model, texts = T5ForConditionalGeneration(T5Config(**size)).double().eval(), TOKENS.clone()
    texts[1] = texts[0]
    inputs = dict(input_ids=texts, decoder_input_ids=TOKENS)
    found, _ = through(model, inputs, "decoder.block", "decoder.final_layer_norm")
    with torch.no_grad(), capturing(model):
        assert_close(found, model(**inputs, output_hidden_states=True).decoder_hidden_states[-1], rtol=1e-9, atol=1e-9)


def test_a_forward_that_somebody_has_put_there_stays():
    model = small("llama")
    block = model.model.layers[0]
    block.forward = forward = block.forward
    with contextlib.closing(open_stream(model, as_inputs(TOKENS), 2)):
        pass
    assert block.forward is forward


def test_idle_experts_join_those_that_read_the_same():
    "Experts as modules of their own, whose first two linears read one input; the last of three gets no token."
    model = small("llama")
    block = model.model.layers[0]
    block.mlp = Experts()
    with torch.no_grad(), capturing(model), contextlib.closing(open_stream(model, as_inputs(TOKENS), 2)) as stream:
        found = survey(model, block, stream)
    assert not found.idle and {f"mlp.experts.2.{name}" for name in ("gate", "up", "down")} <= found.routed


class Experts(torch.nn.Module):
    "Every other token to the first of three experts, the rest to the second."

    def __init__(self):
        super().__init__()
        linears = lambda: dict(gate=torch.nn.Linear(32, 8), up=torch.nn.Linear(32, 8), down=torch.nn.Linear(8, 32))
        self.experts = torch.nn.ModuleList(torch.nn.ModuleDict(linears()) for _ in range(3))

    def forward(self, x):
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts[:2]):
            mine = x[:, i::2]
            out[:, i::2] = expert["down"](expert["gate"](mine) * expert["up"](mine))
        return out
