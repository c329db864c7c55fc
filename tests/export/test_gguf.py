"""GGUF: blocks read by ggml's own code, files read by transformers, and what is refused."""

import copy
import json

import gguf
import numpy as np
import pytest
import torch
from aespa_nb.cli import main
from aespa_nb.data.text import load_reference
from aespa_nb.errors import AespaError
from aespa_nb.export.checkpoint import export_model, read_quantized
from aespa_nb.export.gguf_blocks import gguf_type, to_blocks, two_levels
from aespa_nb.export.gguf_file import check_gguf, split_name, write_gguf
from aespa_nb.export.loading import load_model
from aespa_nb.options import Recipe, Storage, for_engine
from aespa_nb.rounding.grid import Grid
from aespa_nb.rounding.packing import RoundedWeight
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from test_export import logits, nearest, same, small_model


def layer(bits, share, symmetric, out=3, inp=512, seed=0):
    draw = torch.Generator().manual_seed(seed)
    scale = (torch.rand(out, inp // share, generator=draw) + 0.5).half().float()
    zero = torch.randint(2**bits, scale.shape, generator=draw).float()
    grid = Grid(bits, scale, torch.full_like(zero, 2 ** (bits - 1)) if symmetric else zero)
    return RoundedWeight.of(torch.randint(2**bits, (out, inp), generator=draw), grid)


def read(blocks, kind):
    return torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.sampled_from([16, 32, 64, 256, 512]), st.booleans(), st.integers(0, 99))
def test_ggml_reads_our_weights_from_the_blocks(bits, share, symmetric, seed):
    r = layer(bits, share, symmetric, seed=seed)
    if (kind := gguf_type(r)) is None:
        assert share == 16 or bits == 8 and not symmetric
        return
    change = ((read(to_blocks(r, kind), kind) - r.weight()).abs() / r.grid.expand(512)[0]).max()
    if kind.endswith("K") and share < 256:
        assert change < 0.7  # half a step of the minima and three of the scales, of the smallest scale
    else:
        assert change == 0 or kind[-1] == "1" and change < 31 * 2**-11


def test_the_smallest_type_is_taken():
    kinds = {(2, 64, False): "Q2_K", (3, 64, True): "Q3_K", (3, 64, False): "Q4_0", (4, 32, True): "Q4_0",
             (4, 32, False): "Q4_1", (5, 32, True): "Q5_0", (5, 32, False): "Q5_1",
             (6, 32, False): "Q8_0", (8, 32, True): "Q8_0"}  # fmt: skip
    assert {how: gguf_type(layer(*how)) for how in kinds} == kinds
    assert gguf_type(layer(2, 64, False, inp=192)) == "Q4_0"  # 256 does not divide a row
    assert gguf_type(layer(3, 24, True, inp=96)) is None


def test_two_levels_keep_equal_numbers_and_zero_and_beat_the_plain_divisor():
    d, n = two_levels(np.array([[0.3] * 16, [0.0] * 16], np.float16).astype(np.float32), 15)
    assert (d * n == np.float16([[0.3], [0]])).all()
    values = np.random.default_rng(0).uniform(0.2, 1, (500, 16)).astype(np.float32)
    d, n = two_levels(values, 15)
    plain = (values.max(-1, keepdims=True) / 15).astype(np.float16).astype(np.float32)
    d, error = d.astype(np.float32), lambda found: ((found - values) ** 2).sum(-1)
    assert (error(d * n) <= error(plain * np.clip(np.rint(values / plain), 0, 15)) + 1e-7).all() and n.max() <= 15


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(2, 32, False), (3, None, False), (4, 32, False), (8, 32, True)]
)
def test_a_file_is_read_by_transformers_and_by_us(bits, group, symmetric, tmp_path):
    model = small_model("Llama", num_key_value_heads=2)
    report = nearest(model, bits, group, symmetric)
    twin, told = copy.deepcopy(model), copy.deepcopy(report)
    done = export_model(model, report, tmp_path / "out", "gguf", facts={"base model": "toy"})
    assert done.dense == [] and done.sizes["blocks"] > 0
    assert 'gguf_file="model.gguf"' in (tmp_path / "out/README.md").read_text()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    assert torch.equal(logits(stock), logits(model))
    again = read_quantized(tmp_path / "out")
    assert torch.equal(logits(again.model), logits(model)) and again.facts == {"base model": "toy"}
    export_model(again.model, again.report, tmp_path / "packed", dtype=torch.float16)  # the records lie beside the file
    export_model(twin, told, tmp_path / "direct", dtype=torch.float16)
    packed, direct = (load_file(tmp_path / f / "model.safetensors") for f in ("packed", "direct"))
    codes = lambda tensors: {name: t for name, t in tensors.items() if "weight_" in name}
    assert same(codes(packed), codes(direct))


def test_embeddings_of_8_bits_are_the_files_and_the_models(tmp_path):
    model = small_model("Llama")
    before, report = model.model.embed_tokens.weight.detach().clone(), nearest(model, 4, symmetric=True)
    done = export_model(model, report, tmp_path / "out", "gguf", embeddings=8)
    change = (model.model.embed_tokens.weight - before).abs().max() / before.abs().max()
    assert 0 < change < 2**-7 and torch.equal(logits(load_model(tmp_path / "out")[0]), logits(model))
    plain = export_model(model, report, tmp_path / "plain", "gguf")
    assert done.sizes["rest"] < plain.sizes["rest"]


def test_a_damaged_or_foreign_file_is_one_line(tmp_path):
    model = small_model("Llama")
    export_model(model, nearest(model, 4), tmp_path / "out", "gguf")
    file = tmp_path / "out/model.gguf"
    content = file.read_bytes()
    for bad in (content[:100], content[: len(content) // 2], b"", b"GGUF" + bytes(64)):
        file.write_bytes(bad)
        for path in (tmp_path / "out", file):
            with pytest.raises(AespaError, match="damaged|could not be loaded"):
                load_model(path)


def test_what_llama_cpp_cannot_be_told_is_refused(tmp_path):
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(Unigram([("a", 0.0)])))
    llama = small_model("Llama")
    with pytest.raises(AespaError, match="byte-level BPE tokenizers only"):
        check_gguf(llama, words)
    for rope in (dict(rope_type="dynamic", factor=2.0), dict(rope_type="yarn", factor=4.0)):
        with pytest.raises(AespaError, match=f"for llama with {rope['rope_type']} positions"):
            check_gguf(small_model("Llama", rope_parameters=dict(rope, rope_theta=1e4)), None)
    llama_2 = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE({"a": 0}, [], byte_fallback=True)))
    with pytest.raises(AespaError, match="byte-level BPE tokenizers only"):
        check_gguf(llama, llama_2)
    with pytest.raises(AespaError, match="llama.cpp has no qwen3 with these biases or heads"):
        check_gguf(small_model("Qwen3", attention_bias=True), None)
    with pytest.raises(AespaError, match="gelu"):
        check_gguf(small_model("Llama", hidden_act="gelu"), None)
    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    short = MistralForCausalLM(MistralConfig(**shape, num_key_value_heads=2, sliding_window=16))
    short.config._name_or_path = "some/mistral"
    write_gguf(tmp_path / "short.gguf", short, {})
    fields = gguf.GGUFReader(tmp_path / "short.gguf").fields
    assert fields["llama.context_length"].contents() == 16 and "general.name" not in fields


def test_slower_rotations_are_told(tmp_path):
    rope = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=5e5)
    model = small_model("Llama", rope_parameters=rope | dict(original_max_position_embeddings=64), head_dim=32)
    write_gguf(tmp_path / "slow.gguf", model, {})
    factors = next(t.data for t in gguf.GGUFReader(tmp_path / "slow.gguf").tensors if t.name == "rope_freqs.weight")
    turns = 5e5 ** (-np.arange(16) / 16) / factors
    assert np.allclose(turns, model.model.rotary_emb.inv_freq, rtol=1e-5) and factors.max() > 7


def test_the_tokenizer_is_told(tmp_path):
    tokenizer = load_reference().tokenizer
    write_gguf(tmp_path / "model.gguf", small_model("Llama", vocab_size=4096), {}, tokenizer)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    assert {t: i for i, t in enumerate(tokens)} == tokenizer.get_vocab()
    assert fields["tokenizer.ggml.merges"].contents() == [" ".join(m) for m in told["model"]["merges"]]
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    _, its = load_model(tmp_path / "model.gguf")
    assert its("return x").input_ids == tokenizer("return x").input_ids


def test_a_way_of_cutting_has_a_name_only_with_its_options():
    name = lambda *steps: split_name(cut(Sequence(list(steps))))

    def cut(steps):
        made = Tokenizer(BPE())
        made.pre_tokenizer = steps
        return PreTrainedTokenizerFast(tokenizer_object=made)

    plain = ByteLevel(add_prefix_space=False)
    assert split_name(cut(plain)) == name(plain) == "gpt-2" and split_name(load_reference().tokenizer) is None
    assert name(Digits(individual_digits=True), plain) == "smollm"
    assert name(Digits(individual_digits=False), plain) is name(ByteLevel(add_prefix_space=True)) is None


def test_a_cast_model_turns_as_before_and_keeps_several_templates(tmp_path):
    model, tokenizer = small_model("Qwen3", vocab_size=4096).to(torch.bfloat16), load_reference().tokenizer
    tokenizer.chat_template = {"default": "a", "tools": "b"}
    tokenizer.add_special_tokens({"pad_token": "<pad>"})  # one token more than embeddings
    write_gguf(tmp_path / "model.gguf", model, {}, tokenizer)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == "a" and "tokenizer.ggml.padding_token_id" not in fields
    write_gguf(tmp_path / "llama.gguf", small_model("Llama").half(), {})
    assert "rope_freqs.weight" not in {t.name for t in gguf.GGUFReader(tmp_path / "llama.gguf").tensors}


def test_a_number_that_float16_lacks_leaves_no_file_and_no_change(tmp_path):
    model = small_model("Qwen2")
    model.model.embed_tokens.weight.data[3, 3] = 1e6
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AespaError, match="GGUF cannot hold model.embed_tokens.weight"):
        write_gguf(tmp_path / "model.gguf", model, {})
    assert not any(tmp_path.iterdir()) and same(model.state_dict(), before)


def test_engines_choose_format_and_grids():
    recipe, storage = for_engine("llama.cpp", Recipe(bits=4), Storage())
    assert (storage.form, recipe.group_size, recipe.symmetric) == ("gguf", 32, True)
    assert for_engine("llama.cpp", Recipe(bits=3, group_size=64), Storage())[0] == Recipe(bits=3, group_size=64)
    assert for_engine("vllm", Recipe(), Storage())[0].symmetric
    assert for_engine(None, Recipe(), Storage("gptq")) == (Recipe(), Storage("gptq"))


def test_from_the_command_line_to_the_file(one_block, tmp_path, capsys):
    words = "--preset rtn --bits 3 --for llama.cpp --embeddings 8 --samples 2 --seqlen 64 --eval-samples 4 --quiet"
    assert main(["quantize", one_block, *words.split(), "--out", str(tmp_path / "out")]) == 0
    assert "llama-cli -m" in capsys.readouterr().out
    row = json.loads((tmp_path / "out/results.json").read_text())["rows"][-1]
    assert main(["eval", str(tmp_path / "out"), "--seqlen", "64", "--eval-samples", "4", "--quiet"]) == 0
    assert f"perplexity {row['perplexity']:.3f}" in capsys.readouterr().out
