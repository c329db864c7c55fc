"""Models of every family in experiments/families.py, one that is written here, and random ones."""

import copy
import sys

import families
import pytest
import torch
from aespa_nb import AespaConfig, quantize_model
from aespa_nb.export.checkpoint import export_model, read_quantized
from aespa_nb.export.formats import FORMATS
from aespa_nb.model.blocks import linears_of, weight_of
from aespa_nb.model.roles import map_block
from aespa_nb.model.statistics import parts_of, survey
from aespa_nb.errors import AespaError, UnsupportedModelError
from torch import nn
from transformers import CLIPVisionConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlavaConfig, PretrainedConfig
from transformers import LlavaForConditionalGeneration, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own


@pytest.mark.parametrize("name", families.FAMILIES)
def test_what_is_captured_is_what_happens_and_every_linear_is_quantized_or_named(name):
    model, data = families.build(name), families.inputs(name, 3)
    exact = copy.deepcopy(model).double()
    in_double = {k: v.double() if v.is_floating_point() else v for k, v in data.items()}
    assert families.reproduction(exact, in_double) < 1e-5
    assert families.value_loss(exact, in_double) < 1e-5
    report = quantize_model(model, data, AespaConfig.preset("aespa", bits=3, iterations=2))
    assert not families.accounted_for(model, report)
    for r in report.layers.values():
        torch.testing.assert_close(r.grid.values(r.codes.float()) * r.zeta, r.weight(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["Mixtral", "Gemma3", "GPT-2", "DeepSeek-V3", "gpt-oss", "ViT", "T5"])
def test_a_checkpoint_can_be_read_back_or_is_refused(name, tmp_path):
    model = families.build(name)
    report = quantize_model(model, families.inputs(name, 3), AespaConfig.preset("rtn", bits=4))
    for form in FORMATS.keys() - {"gguf"}:  # written for none of these
        try:
            export_model(copy.deepcopy(model), copy.deepcopy(report), tmp_path / form, form)
        except AespaError as e:
            assert form != "dense" and str(e).endswith(("export as dense", "compressed-tensors"))
            assert not (tmp_path / form).exists()
            continue
        back = read_quantized(tmp_path / form)
        for layer, r in back.report.layers.items():
            assert torch.equal(r.codes, report.layers[layer].codes)


def test_images_and_text_alone(tmp_path):
    small = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2)
    text = LlamaConfig(**small, vocab_size=64, max_position_embeddings=32)
    vision = CLIPVisionConfig(**small, image_size=16, patch_size=8)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    tokens = torch.randint(0, 63, (4, 16), generator=torch.Generator().manual_seed(0))
    images = dict(input_ids=tokens.index_fill(1, torch.arange(2, 6), 63), pixel_values=torch.randn(4, 3, 16, 16))
    for inputs, count in ((images, 26), (tokens, 14)):
        model = LlavaForConditionalGeneration(config).eval()
        report = quantize_model(model, inputs, AespaConfig.preset("gptaq", bits=4))
        export_model(model, report, tmp_path / str(count))
        loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / str(count)).eval()
        assert len(report.layers) == count and torch.equal(loaded(**images).logits, model(**images).logits)
    assert "did not run, left as it is" in report.notes[0]
    with pytest.raises(AespaError, match="lower seqlen"):
        quantize_model(model, tokens.repeat(1, 3), AespaConfig.preset("gptq", bits=4))


@pytest.mark.parametrize("name", ["LLaMA", "Qwen3"])
def test_refined_losses_lower_the_attention_error(name, monkeypatch):
    monkeypatch.setattr(families, "RECIPES", {name: families.RECIPES[name] for name in ("gptq", "aespa", "best")})
    errors = families.attention_errors(name, seed=0, iterations=30)
    assert errors["aespa"] < errors["gptq"] and errors["best"] < errors["gptq"]


@pytest.mark.parametrize(
    "name, dtype", [("LLaMA", torch.float16), ("GPT-J", torch.bfloat16), ("Qwen3-MoE", torch.bfloat16)]
)
def test_half_precision_models_keep_their_dtype_and_their_codes(name, dtype):
    model = families.build(name).to(dtype)
    report = quantize_model(model, families.inputs(name, 3), AespaConfig.preset("best", bits=4, batch_size=3))
    assert {p.dtype for p in model.parameters()} == {dtype} and not families.accounted_for(model, report)
    assert all(torch.equal(r.weight().to(dtype), weight_of(model, n)) for n, r in report.layers.items())


def test_what_is_handed_to_blocks_may_grow_with_the_batch():
    model = families.build("Falcon", num_kv_heads=4, new_decoder_architecture=False, multi_query=False, alibi=True)
    model.set_attn_implementation("eager")
    report = quantize_model(model, families.inputs("Falcon", 5), AespaConfig.preset("best", bits=4, batch_size=3))
    assert not families.accounted_for(model, report)


@pytest.mark.parametrize("seed", [*range(7), 14])
def test_random_cases_work_or_say_why(seed):
    families.try_case(seed)


class OddConfig(PretrainedConfig):
    "Nothing here has a name that anybody uses."

    model_type = "odd"

    def __init__(self, width=32, count=4, depth=2, words=64, **kwargs):
        self.hidden_size, self.num_attention_heads, self.num_hidden_layers, self.vocab_size = width, count, depth, words
        super().__init__(**kwargs)


class OddMixer(nn.Module):
    "Attention: one matrix makes values, queries and keys in this order; half of each head is turned."

    is_causal = True

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.count = config, layer_idx, config.num_attention_heads
        self.stir = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.pour = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, mask):
        v, q, k = self.stir(x).view(*x.shape[:2], 3, self.count, -1).permute(2, 0, 3, 1, 4)
        angle = torch.arange(x.shape[1]).to(x) / 7
        turn = lambda t: torch.cat(
            [t[..., :1] * angle.cos()[:, None] - t[..., 1:2] * angle.sin()[:, None],
             t[..., :1] * angle.sin()[:, None] + t[..., 1:2] * angle.cos()[:, None], t[..., 2:]], -1)  # fmt: skip
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, _ = attend(self, turn(q), turn(k), v, mask, scaling=0.4)
        return self.pour(out.flatten(-2))


class OddBlock(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.before, self.mix = nn.LayerNorm(config.hidden_size), OddMixer(config, layer_idx)
        self.after, self.think = nn.LayerNorm(config.hidden_size), nn.Linear(config.hidden_size, 48)
        self.speak = nn.Linear(48, config.hidden_size)

    def forward(self, x, mask):
        x = x + self.mix(self.before(x), mask)
        return x + self.speak(nn.functional.silu(self.think(self.after(x))))


class OddModel(PreTrainedModel):
    config_class = OddConfig
    _supports_sdpa = _supports_attention_backend = True

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.storeys = nn.ModuleList(OddBlock(config, i) for i in range(config.num_hidden_layers))
        self.guess = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        x = self.words(input_ids)
        mask = create_causal_mask(self.config, x, None, past_key_values=None, position_ids=None)
        for storey in self.storeys:
            x = storey(x, mask)
        return CausalLMOutput(logits=self.guess(x))


@pytest.fixture
def odd():
    torch.manual_seed(0)
    return OddModel(OddConfig()).eval()


def test_a_model_that_nobody_knows(odd):
    tokens = torch.randint(0, 64, (6, 12), generator=torch.Generator().manual_seed(0))
    found = families.first_block(odd, dict(input_ids=tokens), lambda block, stream: survey(odd, block, stream))
    (attention,) = found.attentions
    assert attention.o == "mix.pour" and attention.scaling == 0.4 and attention.registered
    assert attention.roles["v"].rows.flatten().tolist() == list(range(32))
    assert attention.roles["q"].rows.flatten().tolist() == list(range(32, 64))
    assert attention.roles["k"].position == "measured" and attention.roles["v"].position == "none"
    assert found.readers == {"mix.pour": "before", "speak": "after"}
    assert {"mix.stir[q]", "mix.stir[k]", "mix.stir[v]", "think"} < set(parts_of(odd.storeys[0], found))
    report = quantize_model(odd, tokens, AespaConfig.preset("best", bits=3))
    assert set(report.layers) == {f"storeys.{i}.{n}" for i in range(2) for n in linears_of(odd.storeys[0])}
    assert not report.notes and torch.isfinite(odd(tokens).logits).all()


def test_attention_that_does_more_than_we_know_is_refused(odd, monkeypatch):
    tokens = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))

    def eager(module, query, key, value, mask, **kwargs):
        return torch.tanh(value).transpose(1, 2), None

    monkeypatch.setattr(sys.modules[__name__], "ALL_ATTENTION_FUNCTIONS", {**ALL_ATTENTION_FUNCTIONS, "eager": eager})
    with pytest.raises(families.AespaError, match="OddBlock does more"):
        quantize_model(odd, tokens, AespaConfig.preset("aespa", bits=3))


def test_a_block_without_attention_has_layer_wise_losses():
    block = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    x = torch.randn(1, 5, 8)
    found = map_block(block, lambda: block(x), tok=5)
    assert found.groups == (("0",), ("2",)) and not found.attentions and not found.idle
    assert torch.is_grad_enabled()


def test_a_block_that_fails_by_itself_is_named_in_one_line():
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, reorder_and_upcast_attn=True)
    model = GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()
    tokens = torch.randint(64, (2, 16))
    with pytest.raises(UnsupportedModelError, match="GPT2Block") as caught:
        quantize_model(model, tokens, AespaConfig.preset("best", dtype=torch.float64))
    assert "\n" not in str(caught.value)
