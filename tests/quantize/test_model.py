"""quantize_model on models built from configurations: what it promises, and what it refuses."""

import contextlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from aespa_nb import AespaConfig, quantize_model
from aespa_nb.experiments.cost import TOKEN_PHASES
from aespa_nb.export.checkpoint import export_model
from aespa_nb.quantize.config import PRESETS
from aespa_nb.quantize.layer import round_layer
from aespa_nb.errors import UnsupportedModelError
from aespa_nb.model.phases import timed
from aespa_nb.model.statistics import block_losses
from aespa_nb.model.capture import capturing, capture_attention
from aespa_nb.model.stream import BlockStream
from aespa_nb.rounding.hessian import quadratic_loss
from aespa_nb.attention.kronecker_losses import KroneckerLoss
from models import TOKENS, fresh, refused, same, unchanged
from transformers import BatchEncoding, GPT2Config, GPT2LMHeadModel

CASES = [("llama", preset) for preset in PRESETS]
CASES += [(kind, preset) for kind in ("mha", "opt", "opt-post-norm") for preset in ("best", "zfold", "max", "awq")]
PHASES = {*TOKEN_PHASES, "end to end", *"other survey target grid gptq descent adam tuning block".split()}
OWN_PHASE = {"gptq": "gptq", "adaround": "adam", "aespa": "attention", "best": "descent", "max": "end to end"}


def quick(preset="aespa", **changes):
    few = dict(end_to_end=3) if preset == "max" else {}
    return AespaConfig.preset(preset, **{"bits": 3, "iterations": 30, **few, **changes})


@pytest.mark.parametrize(("kind", "preset"), CASES)
def test_every_preset_on_every_kind(kind, preset):
    model = fresh(kind)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with timed() as seconds:
        report = quantize_model(model, TOKENS, quick(preset, bits=2))
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}
    assert set(report.layers) == linears
    assert preset != "zfold" or any((r.zeta != 1).any() for r in report.layers.values())
    for name, r in report.layers.items():
        assert r.codes.max() <= 3 and (preset != "aespa" or r.loss < r.loss_rtn)
        assert torch.equal(r.weight(), model.get_submodule(name).weight)
        assert not torch.equal(before[name + ".weight"], model.get_submodule(name).weight)
    tuned = {k for k in before if "norm" in k and k.endswith("weight") and report.config.end_to_end}
    untouched = {k for k in before if k.removesuffix(".weight") not in linears} - tuned
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items() if k in untouched)
    assert torch.isfinite(model(TOKENS).logits).all()
    if kind == "llama":  # every phase has its seconds
        assert set(seconds) <= PHASES and all(s >= 0 for s in seconds.values())
        whole = report.config.method != "layers"  # rounds a block at once
        assert {"embed", "hand-over", OWN_PHASE.get(preset, "embed")} <= set(seconds)
        assert ({"block"} if whole else {"forward", "hessians", "grid"}) <= set(seconds)


def test_same_seed_same_bits_and_seeds_matter():
    weights = []
    for seed, inference in ((0, False), (0, True), (1, False)):
        model = fresh()
        with torch.inference_mode(inference):  # derivatives are taken nevertheless
            quantize_model(model, TOKENS, quick("best", samples=4, seed=seed))
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_batch_size_changes_nothing_but_rounding_errors():
    reports = [
        quantize_model(fresh("llama").double(), TOKENS, quick("gptq", batch_size=b, dtype=torch.float64))
        for b in (1, 8)
    ]
    assert same(*({name: r.codes for name, r in report.layers.items()} for report in reports))


@pytest.mark.parametrize("group_size, symmetric", [(8, False), (16, True), (None, True)])
def test_groups_and_symmetric_grids(group_size, symmetric):
    report = quantize_model(fresh("llama"), TOKENS, quick(group_size=group_size, symmetric=symmetric))
    for r in report.layers.values():
        out, inp = r.shape
        assert r.grid.scale.shape == (out, 1 if group_size is None else inp // group_size)
        assert not symmetric or (r.grid.zero == 4).all()


def test_attention_and_training_mode_are_put_back():
    model = fresh("llama").train()
    model.model.norm.eval()
    before = model.config._attn_implementation
    quantize_model(model, TOKENS, quick("rtn"))
    assert model.training and not model.model.norm.training and model.config._attn_implementation == before
    with refused("tokenizer"):
        quantize_model(model, TOKENS + 64, quick("rtn"))
    assert model.config._attn_implementation == before


def test_tuning_changes_no_code_of_the_block_that_it_tunes():
    plain, tuned = (quantize_model(fresh(), TOKENS, quick("gptq", tuning=n)).layers for n in (0, 3))
    first = [name for name in plain if "layers.0." in name]
    assert first and all(torch.equal(plain[name].words, tuned[name].words) for name in first)
    assert any(not torch.equal(plain[name].grid.scale, tuned[name].grid.scale) for name in first)


def test_losses_of_a_layer_are_its_output_error():
    model = fresh("opt")
    block = model.model.decoder.layers[0]
    seen = []
    with torch.no_grad(), capturing(model), contextlib.closing(BlockStream(model, TOKENS)) as stream:
        losses = block_losses(model, block, stream).losses
        hook = block.fc2.register_forward_pre_hook(lambda m, a: seen.append(a[0].flatten(0, -2)))
        stream.run(block)
        hook.remove()
    dW = torch.randn(32, 48)
    error = (torch.cat(seen) @ dW.T).pow(2).sum() / TOKENS.numel()
    torch.testing.assert_close(losses["fc2"](dW), error, rtol=1e-4, atol=0)


def test_round_layer_reports_the_loss_it_reaches():
    W, H = torch.randn(8, 16), torch.eye(16)
    zeta = torch.linspace(0.5, 2, 16)
    r = round_layer(W, KroneckerLoss(H), quick("gptq"), zeta)
    assert r.loss == pytest.approx(float(quadratic_loss(r.weight() - W, H)), rel=1e-4)
    assert torch.equal(r.zeta, zeta)


SOURCES = {}
SOURCES["wide"] = """
sizes = dict(hidden_size=384, intermediate_size=768, num_attention_heads=8, num_key_value_heads=4)
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=1, max_position_embeddings=64, **sizes))
tokens = torch.randint(0, 256, (32, 64))
"""
SOURCES["bundled"] = """
model, _, tokens, _ = load_reference()
model.model.layers, tokens = model.model.layers[:1], tokens[:, :128]
"""
MEASURE = """
import torch
from aespa_nb import AespaConfig, load_reference, quantize_model
from transformers import LlamaConfig, LlamaForCausalLM
torch.set_num_threads({threads})
config = AespaConfig.preset("{preset}", samples=8, iterations=5{changes})
small = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
small = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=1, max_position_embeddings=64, **small))
quantize_model(small, torch.randint(0, 256, (8, 64)), config)  # all that is loaded at first use is there now
{model}
with torch.no_grad():
    model(tokens[:1])
report = quantize_model(model, tokens, config)
print(report.peak_bytes, report.budget_bytes, report.block_bytes)
"""


CASES = [("wide", "aespa", 4), ("wide", "best", 1), ("bundled", "max", 1)]


@pytest.mark.parametrize("model, preset, threads", CASES)
def test_peak_memory_stays_below_the_budget(model, preset, threads):
    "In a fresh process; of three, since what else a process keeps differs by some percent."
    # more passes or starts need no more memory
    changes = {"best": ", tuning=2", "max": ", end_to_end=4"}.get(preset, "")
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed arrays go back to the system at once
    given = dict(model=SOURCES[model], preset=preset, changes=changes, threads=threads)
    command = [sys.executable, "-c", MEASURE.format(**given)]
    for _ in range(3):
        out = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
        peak, budget, block = map(int, out.split())
        print(f"peak {peak / 2**20:.1f} MiB, budget {budget / 2**20:.1f} MiB")
        if peak < budget:
            break
    assert block / 2 < peak < budget


BAD = dict(bits=[1, 9, 2.5], iterations=[0], group_size=[0], samples=[0], batch_size=[0], tuning=[-1])
BAD |= dict(objective=["block"], solver=["adam"], grid=["mse"], dtype=[torch.float16], iteration=[3])
BAD |= dict(lr=[-1.0, float("inf")], damping=[-0.1, float("nan")], pseudo_tokens=[-1.0], correction=[1.5])
BAD |= dict(seed=[-1, 2**64], device=["gpu", "cuda:x"])
BAD |= dict(keep=[{"down_proj": 1}, {"down_proj": 12}])
BAD_FIELDS = [{field: value} for field in BAD for value in BAD[field]] + [dict(grid="minmax", zfold=True)]


@pytest.mark.parametrize("bad", BAD_FIELDS, ids=lambda b: "-".join(f"{k}={v}" for k, v in b.items()))
def test_bad_fields_are_refused(bad):
    with refused():
        AespaConfig(**bad)


BAD_TOKENS = {
    "empty": (TOKENS[:0], "at least one"),
    "float": (TOKENS.float(), "int64"),
    "flat": (TOKENS[0], r"\[seq tok\]"),
    "outside": (TOKENS + 60, "tokenizer"),
    "negative": (TOKENS - 10, "tokenizer"),
    "long": (TOKENS.view(2, 64), "lower seqlen"),
}


@pytest.mark.parametrize("case", BAD_TOKENS)
def test_bad_tokens_are_refused_and_the_model_is_left_alone(case):
    model, (tokens, message) = fresh("llama"), BAD_TOKENS[case]
    with unchanged(model), refused(message):
        quantize_model(model, tokens, quick())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with refused("finds no GPU"):
        quantize_model(fresh(), TOKENS, quick("rtn", device="cuda:0"))


def test_unknown_architectures_are_refused():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=32))
    with refused("gpt2") as error:
        quantize_model(gpt2, TOKENS, quick(zfold=True))
    assert isinstance(error.value, UnsupportedModelError)


def test_models_that_are_not_as_they_were_loaded_are_refused(tmp_path):
    adapted, hot, rounded, spread = fresh(), fresh(), fresh(), fresh()
    adapted.lm_head.base_layer = adapted.lm_head.weight
    hot.generation_config.temperature = 0.7
    rounded.config._name_or_path = str(tmp_path)
    (tmp_path / "quantization.json").touch()
    spread.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    cases = dict(module=torch.nn.Sequential(fresh()), offloaded=fresh().to("meta"), adapters=adapted, do_sample=hot)
    for words, model in (cases | dict(rounded=rounded, spread=spread)).items():
        with refused(words):
            quantize_model(model, TOKENS, quick())
    with refused("do_sample"):
        export_model(hot, None, tmp_path / "out")


@pytest.mark.parametrize("preset", ["best", "awq"])
def test_a_weight_in_several_blocks_is_rounded_once(preset, tmp_path):
    for _ in range(2):  # the second restores
        model = fresh()
        model.model.layers[1].mlp = model.model.layers[0].mlp
        report = quantize_model(model, TOKENS, quick(preset, bits=2), journal=tmp_path)
        assert "model.layers.1: 3 linears are those of model.layers.0: rounded there" in report.notes
        assert len(report.layers) == 11 and "model.layers.1.mlp.up_proj" not in report.layers
        assert all(torch.equal(r.weight(), model.get_submodule(n).weight) for n, r in report.layers.items())


def test_kept_layers_have_their_own_bits():
    model = fresh("opt")
    before = model.model.decoder.layers[0].fc1.weight.clone()
    report = quantize_model(model, TOKENS, quick("gptq", keep={"fc2": 5, "layers.0.fc1": 16}))
    assert torch.equal(model.model.decoder.layers[0].fc1.weight, before)
    bits = {name: r.grid.bits for name, r in report.layers.items()}
    assert bits == {n: 5 if "fc2" in n else 3 for n in bits} and "model.decoder.layers.0.fc1" not in bits
    assert all(r.codes.max() < 2**r.grid.bits for r in report.layers.values())
    with refused("no linear's name"):
        quantize_model(model, TOKENS, quick(keep={"down_proj": 4}))
    assert quantize_model(fresh("opt"), TOKENS, quick("gptq", group_size=32, keep={"fc2": 16})).layers  # 48 inputs


def test_a_dictionary_of_inputs_is_as_good_as_tokens():
    models = [fresh("llama"), fresh("llama")]
    for model, inputs in zip(models, (TOKENS, BatchEncoding(dict(input_ids=TOKENS)))):
        quantize_model(SimpleNamespace(_orig_mod=model), inputs, quick("gptq"))  # as torch.compile wraps it
    assert same(*(dict(model.named_parameters()) for model in models))
    for bad, words in ((TOKENS + 64, "tokenizer"), (TOKENS.tolist(), "is a list")):
        with refused(words):
            quantize_model(models[0], dict(input_ids=bad), quick("gptq"))
    with refused("can't be called with numbers"):
        quantize_model(models[0], dict(numbers=TOKENS), quick("gptq"))
    with refused("same number"):
        quantize_model(models[0], dict(input_ids=TOKENS, attention_mask=TOKENS[:2]), quick("gptq"))


def padded(seqs):
    "The same text twice: 12 tokens of each sequence, and with 4 of padding behind them."
    mask = (torch.arange(16) < 12).long().expand(seqs, -1)
    return TOKENS[:seqs, :12], dict(input_ids=TOKENS[:seqs] * mask, attention_mask=mask)


@pytest.mark.parametrize("preset", ["gptq", "best"])
def test_padding_changes_no_code(preset):
    models = [fresh("llama"), fresh("llama")]
    for model, inputs in zip(models, padded(4)):
        quantize_model(model, inputs, quick(preset))
    assert same(*(dict(model.named_parameters()) for model in models))


def test_padding_that_counts_is_noted_and_a_sequence_of_it_is_refused():
    _, inputs = padded(4)
    notes = quantize_model(fresh("llama"), inputs, quick("signround", iterations=1)).notes
    assert any("padding counts as text" in note for note in notes)
    nothing = inputs["attention_mask"].clone().index_fill(0, torch.tensor(3), 0)
    with refused("sequence 3 is nothing but padding"):
        quantize_model(fresh("llama"), inputs | dict(attention_mask=nothing), quick())


def test_attention_that_is_not_heard_is_an_error():
    model, heard = fresh("llama"), []
    with torch.no_grad(), capture_attention(lambda *args: heard.append(args)):
        model(TOKENS)
        assert not heard  # stock attention
        with capturing(model):
            model(TOKENS)
    assert len(heard) == len(model.model.layers)
