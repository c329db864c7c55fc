"""Loading with weights that stay in files: same model, little memory, plain errors."""

import copy
import json
import os
import subprocess
import sys
from unittest import mock

import hostile
import pytest
import torch
from aespa_nb import AespaConfig, AespaError, quantize_model
from aespa_nb.model.checkpoint import load_checkpoint
from aespa_nb.model.memory import give_back, in_file, resident, sampled, to_file, working_on
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4)),
}
TOKENS = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


def stored(folder, kind="llama", dtype=torch.bfloat16, shard="20KB"):
    torch.manual_seed(0)
    MODELS[kind]().to(dtype).save_pretrained(folder, max_shard_size=shard)
    return str(folder)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", MODELS)
def test_through_the_blocks(tmp_path, kind, dtype):
    model, tokenizer = load_checkpoint(stored(tmp_path / "in", kind, dtype))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype=dtype)
    assert tokenizer is None and not model.training and same(model, plain)
    blocks = lambda m: next(x for x in m.modules() if isinstance(x, torch.nn.ModuleList))
    for a, b in zip(blocks(model), blocks(plain)):
        before = [in_file(p) for p in a.parameters()]
        with working_on(a, "cpu", torch.float64), torch.no_grad():
            for p, q in zip(a.parameters(), b.parameters()):
                assert p.dtype == torch.float64 and not in_file(p)
                p.mul_(2), q.mul_(2)
        assert [in_file(p) for p in a.parameters()] == before and any(before)
    assert same(model, plain)
    model.save_pretrained(tmp_path / "stock")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype="auto"), plain)


@pytest.mark.parametrize("preset", ["gptq", "max"])
def test_quantized_as_a_model_in_memory(tmp_path, preset):
    source = stored(tmp_path / "in")
    mapped, _ = load_checkpoint(source)
    plain = copy.deepcopy(mapped)
    assert not any(in_file(p) for p in plain.parameters())
    head = mapped.lm_head.weight.clone()
    config = AespaConfig.preset(preset, 3, **({"end_to_end": 3} if preset == "max" else {}))
    reports = [quantize_model(m, TOKENS, config) for m in (mapped, plain)]
    assert same(mapped, plain) and torch.equal(mapped.lm_head.weight, head)
    assert all(in_file(p) for p in mapped.parameters()) and not any(in_file(p) for p in plain.parameters())
    for name, r in reports[0].layers.items():
        assert torch.equal(r.weight().bfloat16(), mapped.get_submodule(name).weight)
        assert r.loss == reports[1].layers[name].loss


def test_another_number_type_is_a_copy_in_memory(tmp_path):
    model, _ = load_checkpoint(stored(tmp_path), dtype=torch.float32)
    assert model.dtype == torch.float32 and not any(in_file(p) for p in model.parameters())


def test_other_kinds_of_models(tmp_path):
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32)
    model = ViTForImageClassification(config)
    model.save_pretrained(tmp_path / "vit", max_shard_size="20KB")
    assert same(load_checkpoint(str(tmp_path / "vit"), auto=AutoModelForImageClassification)[0], model)


def test_a_failed_block_goes_back_too(tmp_path):
    model, _ = load_checkpoint(stored(tmp_path))
    with pytest.raises(ZeroDivisionError), working_on(model.model.layers[0], "cpu", torch.float32):
        raise ZeroDivisionError
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with working_on(torch.nn.Identity(), "cpu", torch.float32):  # nothing to move
        pass
    linear, no_room = torch.nn.Linear(2, 2), mock.Mock(side_effect=[False, torch.OutOfMemoryError])
    with mock.patch("aespa_nb.model.memory.in_file", no_room), pytest.raises(torch.OutOfMemoryError):
        with working_on(linear, "cpu", torch.float64):  # fails behind the first of its tensors
            pass
    assert linear.weight.dtype == torch.float32


def test_number_types_of_a_block_are_kept_apart():
    block = torch.nn.Sequential(torch.nn.Linear(2, 2).half(), torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    before = {k: v.dtype for k, v in block.state_dict().items()}
    with working_on(block, "cpu", torch.float64):
        assert block[0].weight.dtype == block[2].running_mean.dtype == torch.float64
        assert block[2].num_batches_tracked.dtype == torch.int64
    assert {k: v.dtype for k, v in block.state_dict().items()} == before


@linux
def test_a_full_disk_is_told_before_anything_is_written(monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(AespaError, match="TMPDIR"):
        to_file(torch.ones(3))


@linux
def test_giving_back_frees_pages_and_keeps_changes(tmp_path):
    n = 2**24
    save_file({"weight": torch.ones(1, n)}, tmp_path / "w.safetensors")
    private, shared = torch.nn.Linear(n, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    private.weight.data = load_file(tmp_path / "w.safetensors")["weight"]
    shared.weight.data = to_file(private.weight.data)
    for module in (private, shared):
        module.weight.data[0, 0] = 7
        assert module.weight.sum() == n + 6
        before = resident().file
        give_back(module)
        assert before - resident().file > 0.9 * 4 * n
        assert module.weight.data[0, 0] == 7 and module.weight.sum() == n + 6


WALK = """
import sys, torch
from aespa_nb.model.checkpoint import load_checkpoint
from aespa_nb.model.memory import resident, working_on
start = resident().peak
model, _ = load_checkpoint(sys.argv[1])
for block in model.model.layers:
    with working_on(block, "cpu", torch.float32), torch.no_grad():
        for p in block.parameters():
            p.mul_(0.5)
print(resident().peak - start, sum(p.nbytes for p in model.parameters()))
"""


@linux
def test_a_whole_model_in_the_memory_of_a_few_blocks(tmp_path):
    sizes = dict(vocab_size=256, hidden_size=512, intermediate_size=4096, num_hidden_layers=10, num_attention_heads=4)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    model.save_pretrained(tmp_path / "in", max_shard_size="50MB")
    words = [sys.executable, "-c", WALK, tmp_path / "in"]
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    growth, size = map(float, done.stdout.split())
    assert size > 140e6 and 20e6 < growth < 0.7 * size, (growth, size)


def shard(folder):
    return sorted(folder.glob("model-*.safetensors"))[1]


def configured(**fields):
    return lambda folder: hostile.edit(folder / "config.json", lambda config: config.update(fields))


def a_way_out(folder):
    path = f"../{folder.name}/{shard(folder).name}"
    hostile.edit(folder / INDEX, lambda index: index["weight_map"].update({WEIGHT: path}))


def only_pickled(folder):
    for file in [*folder.glob("model-*.safetensors"), folder / INDEX]:
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def without_a_weight(folder):
    path = folder / json.loads((folder / INDEX).read_text())["weight_map"][WEIGHT]
    hostile.tensors(path, lambda tensors: tensors.pop(WEIGHT))


def huge(folder):
    with open(folder / "tokenizer.json", "wb") as file:
        file.truncate(2**28 + 1)


INDEX, WEIGHT = "model.safetensors.index.json", "model.layers.1.mlp.up_proj.weight"
OWN_CODE = {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}
BROKEN = {  # what is done to the folder, and what is said
    "shard": (lambda f: shard(f).unlink(), r"model-00002-of-\d+.safetensors is missing \(1 of \d+ shards\); download"),
    "short": (lambda f: shard(f).write_bytes(shard(f).read_bytes()[:-100]), "a shard is damaged"),
    "garbage": (lambda f: shard(f).write_bytes(b"\xff" * 99), "a shard is damaged"),
    "way out": (a_way_out, "names no files of this folder"),
    "index": (lambda f: (f / INDEX).write_text("{}"), f"{INDEX} names no files of this folder"),
    "layers": (configured(num_hidden_layers=10**9), "1000000000 num_hidden_layers in"),
    "width": (configured(hidden_size=10**9), "config.json asks for"),
    "pipe": (lambda f: os.mkfifo(f / "tokenizer.json"), "tokenizer.json is no plain file"),
    "dead link": (lambda f: (f / "x.txt").symlink_to("nowhere"), "x.txt is no plain file"),
    "huge": (huge, "takes more than 256 MiB"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config": (lambda f: (f / "config.json").write_bytes(b"\x8f\xe0"), "config.json is damaged"),
    "pickle": (only_pickled, "no .safetensors weights"),
    "weight": (without_a_weight, f"lacks {WEIGHT}"),
    "code": (configured(model_type="mine", auto_map=OWN_CODE), "allow it: trust_remote_code=True"),
}


BROKEN |= {source: (source, "no model folder") for source in ("./nowhere", "/nowhere", "a/b/c")}
BROKEN["nobody/nothing"] = "nobody/nothing", "could not be loaded"


@pytest.mark.parametrize("how", BROKEN)
def test_errors_say_what_to_do(tmp_path, how):
    damage, said = BROKEN[how]
    if callable(damage):
        stored(tmp_path)
        damage(tmp_path)
    with pytest.raises(AespaError, match=said) as e:
        load_checkpoint(str(tmp_path) if callable(damage) else damage)
    assert "\n" not in str(e.value)


def test_links_are_as_good_as_files(tmp_path):
    stored(tmp_path / "home")
    (tmp_path / "links").mkdir()
    for path in (tmp_path / "home").iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    models = [load_checkpoint(str(tmp_path / name))[0] for name in ("home", "links")]
    assert same(*models) and all(in_file(p) for p in models[1].parameters())


@linux
def test_memory_is_told_apart(tmp_path):
    n = 2**24
    start = resident()
    with sampled(lambda: resident().private) as highest:
        mine = torch.ones(n)
        mapped = to_file(mine)
        mapped.sum()
        now = resident()
    for rise in (now.private - start.private, highest[0] - start.private, now.file - start.file):
        assert 0.9 * 4 * n < rise < 1.5 * 4 * n
    assert now.peak >= now.private + now.file - 2**22
