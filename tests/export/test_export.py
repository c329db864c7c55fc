"""Checkpoints in packed formats: what is stored, that stock tools load it, and what is refused."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from aespa_nb.cli import main
from aespa_nb.data.text import load_reference
from aespa_nb.errors import AespaError
from aespa_nb.export.checkpoint import export_model, read_quantized
from aespa_nb.export.folding import snap_model
from aespa_nb.export.loading import load_model
from aespa_nb.model.blocks import linears_of, weight_of
from aespa_nb.quantize.config import AespaConfig
from aespa_nb.quantize.layer import RoundedLayer
from aespa_nb.quantize.model import quantize_model
from aespa_nb.quantize.report import QuantReport
from aespa_nb.rounding.grid import minmax_grid
from aespa_nb.rounding.packing import pack, unpack
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
KINDS = dict(
    Llama=dict(intermediate_size=64),
    OPT=dict(ffn_dim=64, word_embed_proj_dim=32),
    Gemma=dict(intermediate_size=64, head_dim=8, num_key_value_heads=4),
    Qwen2=dict(intermediate_size=64),
    Qwen3=dict(intermediate_size=64, head_dim=8, num_key_value_heads=2),
    Qwen3Moe=dict(head_dim=8, num_key_value_heads=2, num_experts=4, moe_intermediate_size=32, num_experts_per_tok=2),
)


def small_model(kind, dtype=torch.float32, **sizes):
    "A model of two narrow blocks, with norms, and biases if it has any, that are not trivial."
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL | KINDS[kind] | sizes)
    model = getattr(transformers, f"{kind}ForCausalLM")._from_config(config, dtype=dtype)
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p) if p.ndim == 1 else 0.1 * torch.randn_like(p)
    return model.eval()


def nearest(model, bits, group_size=None, symmetric=False):
    "A report of round-to-nearest for the linears in the blocks; bits may be a function of the name."
    report = QuantReport(AespaConfig.preset("rtn", group_size=group_size, symmetric=symmetric))
    for name in linears_of(model):
        if "lm_head" not in name:
            weight = weight_of(model, name).detach()
            grid = minmax_grid(weight.float(), bits(name) if callable(bits) else bits, group_size, symmetric)
            r = report.layers[name] = RoundedLayer.of(grid.codes(weight.float()), grid, loss_rtn=1.0, loss=0.5)
            weight.copy_(r.weight())
    return report


def words_of(report):
    return {name: r.words for name, r in report.layers.items()}


def same(a, b):
    "Whether two dictionaries of tensors hold the same."
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@torch.no_grad()
def logits(model, tokens=None):
    return model(torch.arange(1, 33).reshape(2, 16) if tokens is None else tokens).logits


def reloaded(jobs, tmp_path):
    "Largest difference of logits for each (folder, logits, tokens), from stock transformers in a new process."
    for i, (_, expected, tokens) in enumerate(jobs):
        save_file({"logits": expected.contiguous(), "tokens": tokens}, tmp_path / f"expected-{i}.safetensors")
    code = (
        "import sys, torch\nfrom safetensors.torch import load_file\nfrom transformers import AutoModelForCausalLM\n"
        "for i, folder in enumerate(sys.argv[2:]):\n"
        "    t = load_file(f'{sys.argv[1]}/expected-{i}.safetensors')\n"
        "    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()\n"
        "    with torch.no_grad(): print(float((model(t['tokens']).logits - t['logits']).abs().max()))\n"
        "assert 'aespa_nb' not in sys.modules\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path), *(str(folder) for folder, _, _ in jobs)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.split()]


# --- packing --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(2, 8), rows=st.integers(1, 5), inp=st.integers(1, 70), seed=st.integers(0, 99))
def test_packing_is_the_layout_of_compressed_tensors(bits, rows, inp, seed):
    codes = torch.randint(0, 2**bits, (rows, inp), generator=torch.manual_seed(seed), dtype=torch.uint8)
    words, half = pack(codes, bits), 2 ** (bits - 1)
    assert words.dtype == torch.int32 and words.shape == (rows, -(-inp * bits // 32))
    assert torch.equal(words, pack_to_int32((codes.int() - half).to(torch.int8), bits))
    assert torch.equal(unpack_from_int32(words, bits, codes.shape).int() + half, codes.int())
    assert torch.equal(unpack(words, bits, inp), codes)


def parsed(words, bits, n):
    "The first `n` codes in a string of words, from one long integer."
    string = sum((int(w) & 0xFFFFFFFF) << 32 * i for i, w in enumerate(words))
    return [string >> bits * i & (2**bits - 1) for i in range(n)]


@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("form, bits", [("gptq", 2), ("gptq", 3), ("gptq", 4), ("gptq", 8), ("awq", 4)])
def test_packed_tensors_by_an_unpacking_of_their_own(form, bits, group_size, tmp_path):
    "Bit by bit in Python integers, as the formats are described: nothing of ours is used."
    model, folder, name = small_model("Llama"), tmp_path / "out", "model.layers.1.mlp.down_proj"
    export_model(model, nearest(model, bits, group_size), folder, form, dtype=torch.float16)
    t, index = load_file(folder / "model.safetensors"), torch.arange(64) // (group_size or 64)
    words, zero_words, scales = (t[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
    if form == "gptq":  # a string of words holds the codes of an output, or the zero-points of a group
        codes = torch.tensor([parsed(column, bits, 64) for column in words.T]).T  # [inp out]
        zeros = torch.tensor([parsed(row, bits, 32) for row in zero_words])  # [groups out]
        facts = dict(checkpoint_format="gptq_v2")
        assert torch.equal(t[f"{name}.g_idx"].long(), index)
    else:  # a word holds eight outputs: 0, 2, 4, 6, 1, 3, 5, 7, lowest bits first
        eight = lambda words: torch.tensor([[parsed([w], 4, 8) for w in row] for row in words])
        codes, zeros = (eight(w)[..., [0, 4, 1, 5, 2, 6, 3, 7]].flatten(1) for w in (words, zero_words))
        facts = dict(quant_method="awq", modules_to_not_convert=["lm_head"])
    weight = scales.float()[index] * (codes - zeros[index])
    assert torch.equal(weight.T.half(), model.get_parameter(f"{name}.weight").half())
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    facts |= dict(bits=bits, group_size=group_size or -1)
    assert {k: config[k] for k in facts} == facts
    again = read_quantized(folder).report
    assert torch.equal(again.layers[name].codes, codes.T) and load_model(folder)[0].dtype == torch.float16


# --- loaded elsewhere -----------------------------------------------------------------------------------------------

LIMIT = {(2, None): 0.14, (2, 64): 0.143, (3, None): 0.21, (3, 64): 0.21, (4, None): 0.27, (4, 64): 0.27}


def bundled_models(tmp_path):
    "Of one block, in the sizes that the page promises; and in its own 32 bits."
    full, tokenizer, calib, heldout = load_reference()
    full.model.layers, full.config.num_hidden_layers = full.model.layers[:1], 1
    tokens, jobs = heldout[:1], []
    for bits, group_size, symmetric in [(*how, False) for how in LIMIT] + [(bits, 64, True) for bits in (2, 3, 4)]:
        model, folder = copy.deepcopy(full), tmp_path / f"{bits}-{group_size}-{symmetric}"
        config = AespaConfig.preset("rtn", bits, group_size=group_size, symmetric=symmetric)
        report = quantize_model(model, calib[:1, :32], config)
        done = export_model(model, report, folder, tokenizer=tokenizer, dtype=torch.float16)
        assert bits / 16 <= done.ratio <= LIMIT[bits, group_size], folder
        jobs.append((folder, logits(model, tokens), tokens))
    report = quantize_model(full, calib[:1, :32], AespaConfig.preset("rtn", 2))  # in its own 32 bits nothing is rounded
    before = logits(full, tokens)
    done = export_model(full, report, tmp_path / "own")
    assert done.scale_change == 0 and done.dtype == torch.float32
    assert torch.equal(logits(full, tokens), before)
    return [*jobs, (tmp_path / "own", before, tokens)]


def other_models(tmp_path):
    "OPT with biases, 5 and 8 bits, shapes that fill no word, experts, mixed bits, Z-Fold on both families, 16 bits."
    tokens, jobs = torch.arange(1, 33).reshape(2, 16), []

    def add(name, model, report, **options):
        done = export_model(model, report, tmp_path / name, **options)
        jobs.append((tmp_path / name, logits(model.float(), tokens), tokens))
        return done

    for name, model, how in (
        ("opt", small_model("OPT"), (3,)),
        ("five", small_model("Llama"), (5, 16)),
        ("odd", small_model("Llama", intermediate_size=44), (3,)),
        ("experts", small_model("Qwen3Moe"), (4,)),
    ):
        add(name, model, nearest(model, *how))
    for bits, symmetric in ((3, True), (8, True), (3, False)):  # without zero-points, a head may have bits of its own
        headed, name = small_model("Llama"), f"head-{bits}-{symmetric}"
        recipe = AespaConfig.preset("rtn", bits, group_size=16, symmetric=symmetric, head=8)
        done = add(name, headed, report := quantize_model(headed, tokens, recipe))
        assert done.dense == ([] if symmetric else ["lm_head"]) and report.layers["lm_head"].loss > 0
        assert ("lm_head.weight_packed" in load_file(tmp_path / name / "model.safetensors")) == symmetric
        assert 0 < (headed.lm_head.weight - small_model("Llama").lm_head.weight).abs().max() < 0.01
        export_model(*read_quantized(tmp_path / name)[:2], tmp_path / f"{name}-again", "dense" if bits == 8 else "gptq")
        again = read_quantized(tmp_path / f"{name}-again").report.layers
        assert torch.equal(again["lm_head"].codes, report.layers["lm_head"].codes)
    mixed = small_model("Llama")
    add("mixed", mixed, nearest(mixed, lambda name: 4 if "down_proj" in name else 2, 16, symmetric=True))
    config = json.loads((tmp_path / "mixed/config.json").read_text())["quantization_config"]
    assert sorted(g["weights"]["num_bits"] for g in config["config_groups"].values()) == [2, 4]
    for kind, group_size in (("Llama", None), ("OPT", 16)):
        model = small_model(kind)
        zfold = AespaConfig.preset("gptq", 3, zfold=True, group_size=group_size)
        report = quantize_model(model, tokens, zfold)
        assert any((r.zeta != 1).any() for r in report.layers.values())
        before, size = logits(model, tokens), logits(model, tokens).abs().max()
        add(f"zfold-{kind}-{group_size}", model, report)
        assert (logits(model, tokens) - before).abs().max() < 1e-5 * max(1, size)
    for dtype, bits in ((torch.float16, 4), (torch.bfloat16, 8)):
        half = small_model("Llama", dtype)
        done = add(f"half-{bits}", half, nearest(half, bits, 16))
        assert done.dtype == dtype and done.scale_change > 0
    return jobs


def test_models_are_the_same_in_a_new_process(tmp_path):
    assert max(reloaded([*bundled_models(tmp_path), *other_models(tmp_path)], tmp_path)) <= 1e-5


# --- zeta -----------------------------------------------------------------------------------------------------------


def with_zeta(model, report, *names):
    for name in names:
        r = report.layers[name]
        r = report.layers[name] = r.on(r.grid, torch.linspace(0.5, 2, r.shape[1]))
        weight_of(model, name).data.copy_(r.weight())


REFUSED = {
    "zetas differ": ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"],
    "no layer before model.layers.0.self_attn.o_proj": ["model.layers.0.self_attn.o_proj"],
}


@pytest.mark.parametrize("words", REFUSED)
def test_zeta_that_cannot_be_folded_is_refused_and_nothing_is_written(words, tmp_path):
    model = small_model("Llama", num_key_value_heads=2)
    report = nearest(model, 3)
    with_zeta(model, report, *REFUSED[words])
    state, zetas = copy.deepcopy(model.state_dict()), {n: r.zeta for n, r in report.layers.items()}
    with pytest.raises(AespaError, match=words):
        export_model(model, report, tmp_path / "out")
    assert not (tmp_path / "out").exists() and same(model.state_dict(), state)
    export_model(model, report, tmp_path / "dense", "dense")  # the way out that the message names
    assert same({n: r.zeta for n, r in read_quantized(tmp_path / "dense").report.layers.items()}, zetas)


# --- what is refused, what stays dense ------------------------------------------------------------------------------


class Other(torch.nn.Module):
    "Like a linear, but none."

    def __init__(self, weight):
        super().__init__()
        self.weight = weight


def test_conv1d_stays_dense_and_is_listed(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4)).eval()
    report = nearest(model, 3)
    with pytest.raises(AespaError, match="no layer of this model can be packed"):
        export_model(model, report, tmp_path / "out")
    model = small_model("Llama")
    report = nearest(model, 3)
    model.model.layers[0].mlp.up_proj = Other(model.model.layers[0].mlp.up_proj.weight)
    done = export_model(model, report, tmp_path / "some")
    assert done.dense == ["model.layers.0.mlp.up_proj"]
    assert "rounded, but stored dense | model.layers.0.mlp.up_proj" in (tmp_path / "some/README.md").read_text()
    assert "model.layers.0.mlp.up_proj.weight" in load_file(tmp_path / "some/model.safetensors")


def test_weights_that_were_stored_in_float8(tmp_path):
    small_model("Llama", torch.bfloat16, hidden_size=128, intermediate_size=128).save_pretrained(tmp_path)
    state, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    for name in [n for n in state if "mlp" in n]:
        state |= {name: (state[name] * 100).to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.full((1, 1), 0.01)}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    how = dict(quant_method="fp8", weight_block_size=[128, 128], modules_to_not_convert=["lm_head", "self_attn"])
    (tmp_path / "config.json").write_text(json.dumps(config | dict(quantization_config=how)))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    report = quantize_model(model, torch.arange(1, 33).reshape(2, 16), AespaConfig.preset("rtn", 4))
    for form in ("dense", "compressed-tensors"):
        export_model(model, report, tmp_path / form, form)
        loaded = logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / form))
        assert torch.equal(loaded, logits(model)) and "dequantized" in report.notes[0]


def test_code_that_comes_with_a_checkpoint(tmp_path):
    source, dense, packed = (str(tmp_path / n) for n in ("source", "dense", "packed"))
    small_model("Llama").save_pretrained(source)
    config = json.loads((tmp_path / "source/config.json").read_text())
    config |= dict(architectures=["Toy"], auto_map={"AutoModelForCausalLM": "mod.Toy"})
    (tmp_path / "source/config.json").write_text(json.dumps(config))
    (tmp_path / "source/mod.py").write_text("import transformers as t\nclass Toy(t.LlamaForCausalLM): pass\n")
    model, _ = load_model(source, trust_remote_code=True)
    export_model(model, nearest(model, 4), dense, "dense")
    assert main(["export", dense, "--out", packed]) == 2
    assert main(["export", dense, "--out", packed, "--trust-remote-code"]) == 0
    assert (tmp_path / "packed/mod.py").is_file()


def changed(report, **fields):
    "The report with another scale or zero-point for its first layer."
    name, r = next(iter(report.layers.items()))
    report.layers[name] = r.on(replace(r.grid, **{k: change(getattr(r.grid, k)) for k, change in fields.items()}))
    return report


def test_refusals(tmp_path):
    model, odd, other = small_model("Llama"), small_model("Llama", intermediate_size=44), small_model("Llama")
    other.config.num_hidden_layers = 3
    state, near = copy.deepcopy(model.state_dict()), lambda *how: nearest(copy.deepcopy(model), *how)
    for some, form, report, words in (
        (model, "zip", near(3), "unknown format"),
        (model, "gptq", near(5), "no 5-bit codes"),
        (model, "awq", near(3), "awq has no 3-bit codes, only 4"),
        (odd, "awq", nearest(odd, 4), "multiples of 32"),
        (odd, "gptq", nearest(odd, 3), "multiples of 32"),
        (small_model("OPT"), "gguf", nearest(small_model("OPT"), 3), "gguf is written for llama.* not for opt"),
        (model, "gguf", near(8), "no layer of this model can be packed as gguf"),
        (model, "compressed-tensors", near(lambda n: 2 + ("up" in n)), "symmetric=True"),
        (model, "compressed-tensors", changed(near(3), zero=lambda z: z - 9), "no code"),
        (model, "gptq", changed(near(3), scale=lambda s: s * 1e9), "is beyond torch.float16"),
        (other, "dense", nearest(other, 3), "describes another model"),
    ):
        with pytest.raises(AespaError, match=words):
            export_model(some, report, tmp_path / "out", form, dtype=torch.float16)
        assert not (tmp_path / "out").exists() and same(model.state_dict(), state)


def test_a_file_of_a_wider_type_than_the_model_holds_what_its_records_say(tmp_path):
    model = small_model("Llama", torch.bfloat16)
    export_model(model, nearest(model, 8), tmp_path / "out", "dense", dtype=torch.float32)
    again = read_quantized(tmp_path / "out").model
    assert model.dtype == torch.float32 and same(again.state_dict(), model.state_dict())


def test_mixed_bits_in_gptq_are_exceptions_in_its_config(tmp_path):
    model = small_model("Llama")
    report = nearest(model, lambda n: 4 if "down" in n else 2)
    export_model(model, report, tmp_path / "out", "gptq", dtype=torch.float16)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["bits"] == 2 and config["dynamic"] == {
        f"+:^model[.]layers[.]{i}[.]mlp[.]down_proj$": {"bits": 4, "group_size": -1} for i in range(2)
    }


def test_scales_survive_even_where_float16_underflows():
    model = small_model("Llama")
    report = changed(nearest(model, 4), scale=lambda s: torch.full_like(s, 1e-12))
    snap_model(model, report, torch.float16)
    assert all((r.grid.scale > 0).all() for r in report.layers.values())
    model.model.norm.weight.data[:2] = torch.tensor([1e5, 1 / 3])
    with pytest.raises(AespaError, match="model.norm.weight has a value beyond"):
        snap_model(model, report, torch.float16)
    assert model.model.norm.weight[1] == torch.tensor(1 / 3)


# --- the folder -----------------------------------------------------------------------------------------------------


def mixed(name):
    return 4 if "up" in name else 2


@pytest.mark.parametrize("form", ["compressed-tensors", "dense", "gptq"])
@pytest.mark.parametrize(
    "kind, bits, dtype", [("OPT", 3, torch.float32), ("Llama", 8, torch.bfloat16), ("Llama", mixed, torch.float32)]
)
def test_every_format_is_read_back(kind, bits, dtype, form, tmp_path, monkeypatch):
    "Eight-bit codes too, which the weights do not tell apart in bfloat16; the records do. In shards."
    model = small_model(kind, dtype)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=[0, 5])
    report = nearest(model, bits, 16, symmetric=callable(bits))
    report.notes, report.block_bytes, report.seconds = ["one thing"], 12345, 2.5
    words, save = words_of(report), type(model).save_pretrained
    monkeypatch.setattr(type(model), "save_pretrained", lambda *a, **k: save(*a, **k, max_shard_size="10KB"))
    export_model(model, report, tmp_path / "out", form, facts={"perplexity": 5.25})
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    back = read_quantized(tmp_path / "out")
    assert torch.equal(logits(back.model), logits(model)) and {p.dtype for p in back.model.parameters()} == {dtype}
    assert same(words_of(report), words) and same(words_of(back.report), words)
    assert all(torch.equal(r.grid.scale, r.grid.scale.to(dtype).float()) for r in report.layers.values())
    told = lambda r: {k: v for k, v in json.loads(r.to_json()).items() if k != "config"}
    assert told(back.report) == told(report)
    assert back.facts == {"perplexity": 5.25} and {r.loss for r in back.report.layers.values()} == {0.5}
    assert back.model.generation_config.temperature == 0.7 and back.model.generation_config.eos_token_id == [0, 5]


def test_damaged_and_foreign_folders_are_refused(tmp_path):
    model = small_model("Llama")
    model.save_pretrained(tmp_path / "foreign")
    with pytest.raises(AespaError, match="no quantization.json"):
        read_quantized(tmp_path / "foreign")
    with pytest.raises(AespaError, match="no folder at .*nowhere"):
        read_quantized(tmp_path / "nowhere")
    export_model(model, nearest(model, 3), tmp_path / "out", "dense")
    for file, name in (("model", "weight"), ("quantization", "scale")):
        good = load_file(tmp_path / f"out/{file}.safetensors")
        bad = good | {f"model.layers.0.mlp.up_proj.{name}": good[f"model.layers.0.mlp.up_proj.{name}"] * 1.5}
        save_file(bad, tmp_path / f"out/{file}.safetensors", {"format": "pt"})
        with pytest.raises(AespaError, match="disagree"):
            read_quantized(tmp_path / "out")
        save_file(good, tmp_path / f"out/{file}.safetensors", {"format": "pt"})
    (tmp_path / "out/quantization.safetensors").write_bytes(b"no tensors")
    with pytest.raises(AespaError, match="is damaged"):
        read_quantized(tmp_path / "out")


def test_tied_weights_are_stored_once_in_another_type(tmp_path):
    model = small_model("OPT")
    done = export_model(model, nearest(model, 4), tmp_path / "out", dtype=torch.float16)
    stored = load_file(tmp_path / "out/model.safetensors")
    assert "lm_head.weight" not in stored and stored["model.decoder.embed_tokens.weight"].dtype == torch.float16
    assert sum(t.nbytes for t in stored.values()) == sum(done.sizes.values())


def test_the_card_says_what_was_done(tmp_path):
    model = small_model("OPT")
    facts = {"base model": "facebook/opt-125m", "calibration": "wikitext2, 128 sequences", "perplexity": 27.65432}
    export_model(model, nearest(model, 3, 16), tmp_path / "out", facts=facts)
    card = (tmp_path / "out/README.md").read_text()
    head = ModelCard(card).data
    assert (head.library_name, head.base_model) == ("transformers", "facebook/opt-125m") and "3-bit" in head.tags
    rows = ("| 27.65 |", "| group_size | 16 |", "| fc1 | 2 | 0.500 | 0.500 |")
    for words in ("wikitext2, 128 sequences", *rows):
        assert words in card
    assert "OPTForCausalLM.from_pretrained" in card


# --- the command line -----------------------------------------------------------------------------------------------


BRIEF = "--preset rtn --samples 1 --seqlen 32 --eval-samples 1 --quiet --out".split()


def test_command_line_round_trip(one_block, tmp_path, capsys):
    packed, dense, again = (str(tmp_path / n) for n in ("packed", "dense", "again"))
    words = ["quantize", one_block, "--bits", "3", *BRIEF]
    assert main([*words, packed]) == 0
    assert "take 0.19" in capsys.readouterr().out
    assert main([*words, str(tmp_path / "x"), "--head", "8"]) == 2  # tied to the embeddings
    assert "no output head of its own" in capsys.readouterr().err
    assert main(["export", packed, "--format", "dense", "--out", dense]) == 0
    assert main(["export", dense, "--out", again]) == 0
    first, second = (load_file(f"{folder}/model.safetensors") for folder in (packed, again))
    assert same(first, second)
    assert {f.name for f in (tmp_path / "again").iterdir()} >= {"README.md", "tokenizer.json", "generation_config.json"}
    assert "reference, 1 sequences" in (tmp_path / "again/README.md").read_text()
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "x")]) == 2
    assert "quantization.json" in capsys.readouterr().err and not (tmp_path / "x").exists()
    for folder in (packed, dense):  # under another name, and without our file
        (Path(folder) / "quantization.json").unlink()
        words[1] = folder
        assert main([*words, str(tmp_path / "x")]) == 2
        assert "rounded already" in capsys.readouterr().err


def test_a_checkpoint_quantized_by_others_is_told(one_block, tmp_path, capsys):
    words = ["quantize", one_block, "--bits", "4", *BRIEF]
    assert main([*words, str(tmp_path / "theirs")]) == 0
    assert "note" not in capsys.readouterr().err
    (tmp_path / "theirs/quantization.json").unlink()
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    assert config.pop("quantized_with").startswith("aespa_nb")
    (tmp_path / "theirs/config.json").write_text(json.dumps(config))
    words[1] = str(tmp_path / "theirs")
    assert main([*words, str(tmp_path / "out")]) == 0
    assert "aespa_nb: note: the checkpoint was quantized" in capsys.readouterr().err


def test_a_result_that_the_format_cannot_hold_is_not_lost(tmp_path, capsys):
    words = ["quantize", "reference", "--bits", "5", *BRIEF]
    assert main([*words, str(tmp_path / "out"), "--format", "gptq"]) == 2  # known before the run
    torch.manual_seed(0)
    odd = LlamaConfig(**{**SMALL, "vocab_size": 4096}, intermediate_size=44)
    LlamaForCausalLM(odd).save_pretrained(tmp_path / "odd")
    load_reference().tokenizer.save_pretrained(tmp_path / "odd")
    words[1:4] = [str(tmp_path / "odd"), "--bits", "4"]
    capsys.readouterr()
    assert main([*words, str(tmp_path / "out"), "--format", "gptq"]) == 0
    assert "written as dense" in capsys.readouterr().err
    assert len(read_quantized(tmp_path / "out").report.layers) == 14
