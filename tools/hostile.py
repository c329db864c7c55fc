"""Damaged files and hostile input: every case ends in one line and exit code 2, or does what was asked.

    python tools/hostile.py                     every kind with 12 seeds; writes nbs/runs/hostile.json
    python tools/hostile.py --only index --seeds 3        a part, printed

Each case is a call of the command line in this process. What is watched: the exit code, standard error, all files
around `--out` before and after, a canary that writes a file if code of the checkpoint runs, memory, and time.
"""

import argparse
import contextlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")

import torch  # noqa: E402
from aespa_nb import load_model  # noqa: E402
from aespa_nb.cli import main  # noqa: E402
from aespa_nb.model.memory import resident  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

STORED = Path("nbs/runs/hostile.json")
MEMORY = 512 << 20  # bytes that a case may add
SECONDS = 120
SHORT = "--preset rtn --bits 4 --samples 2 --eval-samples 2 --seqlen 16 --quiet".split()
SIZES = dict(vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
BAD = ("traceback", "several lines", "code run", "wrote outside", "left something", "memory", "hangs")


def make_base(folder: Path) -> None:
    "A good model folder, a good text, and a folder that `quantize` has written."
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=64))
    model.save_pretrained(folder / "model")
    load_model("reference")[1].save_pretrained(folder / "model")
    model.save_pretrained(folder / "sharded", max_shard_size="200KB")
    load_model("reference")[1].save_pretrained(folder / "sharded")
    (folder / "text.txt").write_text("A tensor is an array that knows its shape, its dtype and its device. " * 80)
    with contextlib.redirect_stdout(io.StringIO()):
        main(words(folder, folder / "done"))
        main(words(folder, folder / "dense", "--format", "dense"))


def words(root: Path, out: Path | None = None, *more, model="model", text="text.txt") -> list[str]:
    "The command line of `quantize`."
    out = out or root / "out"
    return ["quantize", str(root / model), "--calibration", str(root / text), *SHORT, *more, "--out", str(out)]


# --- kinds of damage: each changes the folder `root`, and may give other words ---------------------------------------

KINDS = {}


def kind(name):
    return lambda f: KINDS.setdefault(name, f)


def garbage(rng, n=None) -> bytes:
    return rng.randbytes(rng.randrange(1, 400) if n is None else n)


def edit(path: Path, change) -> None:
    "Changes an object in a JSON file."
    found = json.loads(path.read_text())
    path.write_text(json.dumps(change(found) or found))


ODD = (None, [], {}, "", "x", -1, 0, 1.5, 10**9, 10**15, 2**70, True, [1, 2], {"a": 1}, "../../x", float("nan"), 3)
SIZED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SIZED += ("vocab_size", "head_dim", "max_position_embeddings")
CANARY = "import pathlib\npathlib.Path({!r}).write_text('run')\n"
CANARY += "from transformers import *\nC = LlamaConfig\nM = LlamaForCausalLM\n"


class Payload:
    "Unpickling it runs a command."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@kind("config: random bytes")
def _(root, rng):
    (root / "model/config.json").write_bytes(garbage(rng))


@kind("config: cut short")
def _(root, rng):
    path = root / "model/config.json"
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size - 2)])


@kind("config: a field of another type")
def _(root, rng):
    edit(root / "model/config.json", lambda c: c.update({rng.choice(sorted(c)): rng.choice(ODD)}))


@kind("config: a field missing")
def _(root, rng):
    edit(root / "model/config.json", lambda c: c.pop(rng.choice(sorted(c))) and None)


@kind("config: absurd sizes")
def _(root, rng):
    size = rng.choice([10**4, 10**6, 10**9, 10**12, 2**62, 2**63, 10**30])
    edit(root / "model/config.json", lambda c: c.update({rng.choice(SIZED): size}))


@kind("config: another kind of model")
def _(root, rng):
    kinds = "opt gpt2 mixtral bert t5 whisper clip llava nonsense gpt_oss falcon mamba bloom vit".split()
    edit(root / "model/config.json", lambda c: c.update(model_type=rng.choice(kinds)))


@kind("config: no object")
def _(root, rng):
    deep = "[" * 10**5 + "]" * 10**5
    (root / "model/config.json").write_text(
        rng.choice(["[]", "3", "null", '"x"', deep, '{"a":' * 10**5 + "1" + "}" * 10**5])
    )


@kind("config: larger than memory")
def _(root, rng):
    with open(root / "model" / rng.choice(["config.json", "tokenizer.json"]), "wb") as f:
        f.truncate(rng.choice([2**34, 2**36]))


@kind("config: quantized already")
def _(root, rng):
    method = rng.choice(["gptq", "awq", "bitsandbytes", "compressed-tensors", "fp8", "nonsense", "quanto", "aqlm"])
    block = rng.choice([{"quant_method": method, "bits": 4, "group_size": 32}, {"quant_method": method}, {}, [], "x"])
    edit(root / "model/config.json", lambda c: c.update(quantization_config=block))


@kind("code of the checkpoint's own")
def _(root, rng):
    (root / "model/mine.py").write_text(CANARY.format(str(root / "canary")))
    auto = {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M", "AutoTokenizer": ["mine.T", None]}
    change = {"auto_map": auto} | ({"model_type": "mine"} if rng.random() < 0.7 else {})
    edit(root / "model/config.json", lambda c: c.update(change))
    if rng.random() < 0.5:
        edit(root / "model/tokenizer_config.json", lambda c: c.update(auto_map=auto, tokenizer_class="T"))


@kind("weights: cut short")
def _(root, rng):
    path = root / "model/model.safetensors"
    os.truncate(path, rng.choice([0, 1, 7, 8, 9, rng.randrange(path.stat().st_size)]))


@kind("weights: header declared huge")
def _(root, rng):
    path = root / "model/model.safetensors"
    data = path.read_bytes()
    path.write_bytes(struct.pack("<Q", rng.choice([2**64 - 1, 2**63, 2**40, 10**8, 10**7, len(data)])) + data[8:])


def header(path: Path, change) -> None:
    "Rewrites the header of a safetensors file; `change` gives text, or changes the object."
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    found = json.loads(data[8 : 8 + size])
    text = change(found) or json.dumps(found)
    text = text.encode() if isinstance(text, str) else text
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def tensor(found, rng) -> dict:
    return found[rng.choice([k for k in sorted(found) if k != "__metadata__"])]


@kind("weights: header is garbage")
def _(root, rng):
    deep = '{"a":' * 10**5 + "1" + "}" * 10**5
    header(
        root / "model/model.safetensors",
        lambda h: rng.choice([garbage(rng), b"{}", b"[]", b"null", b"{" * 99, deep.encode()]),
    )


@kind("weights: offsets overlap or lie outside")
def _(root, rng):
    def change(h):
        t = tensor(h, rng)
        a, b = t["data_offsets"]
        t["data_offsets"] = rng.choice(
            [[0, b - a], [b, a], [a, b + 4], [-4, b], [2**62, 2**62 + b - a], [a, a], [a], "x"]
        )

    header(root / "model/model.safetensors", change)


@kind("weights: huge shapes declared")
def _(root, rng):
    shape = rng.choice([[2**31, 2**31], [2**63], [10**9, 32], [2**40], [-1, 32], [0], [], [32] * 70, "x"])
    header(root / "model/model.safetensors", lambda h: tensor(h, rng).update(shape=shape))


@kind("weights: a name twice")
def _(root, rng):
    def change(h):
        name = rng.choice([k for k in sorted(h) if k != "__metadata__"])
        other = dict(h[name], shape=[1]) if rng.random() < 0.5 else h[name]
        return json.dumps(h)[:-1] + f", {json.dumps(name)}: {json.dumps(other)}}}"

    header(root / "model/model.safetensors", change)


@kind("weights: another number type")
def _(root, rng):
    kinds = ["F64", "I64", "BOOL", "F8_E4M3", "F13", 7, "BF16"]
    header(root / "model/model.safetensors", lambda h: tensor(h, rng).update(dtype=rng.choice(kinds)))


def retensor(path: Path, change) -> None:
    found = load_file(path)
    change(found)
    save_file({k: v.contiguous() for k, v in found.items()}, path, {"format": "pt"})


@kind("weights: a tensor of another type or shape")
def _(root, rng):
    cast = rng.choice([lambda t: t.long(), lambda t: t > 0, lambda t: t.mT if t.ndim == 2 else t[1:], lambda t: t[:-1]])
    cast = rng.choice([cast, lambda t: t.flatten(), lambda t: t[None], lambda t: t.to(torch.uint8), lambda t: t[:0]])
    retensor(root / "model/model.safetensors", lambda f: f.update({(k := rng.choice(sorted(f))): cast(f[k]).clone()}))


@kind("weights: a tensor missing, or one too many")
def _(root, rng):
    def change(found):
        name = rng.choice(sorted(found))
        found[rng.choice(["../../x", "a" * 10**4, "model.layers.9.x.weight", ""])] = found.pop(name)

    retensor(root / "model/model.safetensors", change)


@kind("weights: NaN or Inf")
def _(root, rng):
    value = rng.choice([float("nan"), float("inf"), -float("inf"), 3e38])
    retensor(root / "model/model.safetensors", lambda f: f[rng.choice(sorted(f))].flatten()[:2].fill_(value))


@kind("weights: flipped bits")
def _(root, rng):
    path = root / "model/model.safetensors"
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 8, 500])):
        data[rng.randrange(rng.choice([8, 2000, len(data)]))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


@kind("weights: pickled")
def _(root, rng):
    (root / "model/model.safetensors").unlink()
    name = rng.choice(["pytorch_model.bin", "model.safetensors", "consolidated.00.pth", "pytorch_model.bin.index.json"])
    (root / "model" / name).write_bytes(pickle.dumps(Payload(root / "canary")))


@kind("weights: pickled beside good ones")
def _(root, rng):
    for name in ("pytorch_model.bin", "training_args.bin", "adapter_model.bin", "optimizer.pt"):
        (root / "model" / name).write_bytes(pickle.dumps(Payload(root / "canary")))


@kind("index: a way out of the folder")
def _(root, rng):
    places = ["../../../../../../etc/passwd", "/etc/passwd", "../model/model.safetensors", "..", ".", "", "a/../../x"]
    places += [str(root / "model/model.safetensors"), "x\0y", "~/x", "C:\\x", "a" * 5000]
    index = root / "sharded/model.safetensors.index.json"
    edit(index, lambda i: i["weight_map"].update({rng.choice(sorted(i["weight_map"])): rng.choice(places)}))
    return words(root, model="sharded")


@kind("index: garbage")
def _(root, rng):
    bad = ["{}", "[]", "x", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "[" * 10**5]
    bad += ['{"weight_map": {"a": ["b"]}}', '{"weight_map": null}', '{"weight_map": {"a": null}}', "\ud800"]
    path = root / "sharded/model.safetensors.index.json"
    path.write_bytes(rng.choice([*bad]).encode(errors="surrogatepass") if rng.random() < 0.9 else garbage(rng))
    return words(root, model="sharded")


@kind("index: shards missing, swapped or damaged")
def _(root, rng):
    shards = sorted((root / "sharded").glob("model-*.safetensors"))
    one, other = rng.sample(shards, 2)
    how = rng.randrange(4)
    if how == 0:
        one.unlink()
    elif how == 1:
        shutil.copy(one, other)
    elif how == 2:
        one.write_bytes(garbage(rng))
    else:
        one.unlink(), one.mkdir()
    return words(root, model="sharded")


@kind("folder: links out of it")
def _(root, rng):
    name = rng.choice(
        ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "x.txt", "model.safetensors"]
    )
    path, secret = root / "model" / name, root / "secret"
    secret.write_text("secret")
    path.unlink(missing_ok=True)
    path.symlink_to(rng.choice([secret, "../secret", "/etc/passwd", "/dev/zero", "/nowhere", name, "/"]))


@kind("folder: pipes and folders in place of files")
def _(root, rng):
    path = (
        root
        / "model"
        / rng.choice(
            ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "generation_config.json"]
        )
    )
    path.unlink(missing_ok=True)
    os.mkfifo(path) if rng.random() < 0.5 else path.mkdir()


@kind("folder: files missing")
def _(root, rng):
    files = sorted((root / "model").iterdir())
    for path in rng.sample(files, rng.randrange(1, len(files) + 1)):
        path.unlink()
    return words(root, model=rng.choice(["model", "model", "text.txt", "model/config.json", "nowhere"]))


@kind("tokenizer: garbage")
def _(root, rng):
    path = root / "model" / rng.choice(["tokenizer.json", "tokenizer_config.json"])
    text = rng.choice(
        [b"{}", b"[]", b"null", b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', b"", garbage(rng)]
    )
    path.write_bytes(text) if rng.random() < 0.7 else os.truncate(path, rng.randrange(path.stat().st_size))


@kind("tokenizer: another vocabulary")
def _(root, rng):
    def change(found):
        vocabulary = found["model"]["vocab"]
        for name in list(vocabulary):
            vocabulary[name] += rng.choice([10**6, 4096])

    edit(root / "model/tokenizer.json", change)


@kind("tokenizer: another class")
def _(root, rng):
    change = rng.choice([{"tokenizer_class": "Nonsense"}, {"tokenizer_class": "os.system"}, {"tokenizer_class": 3}])
    change = rng.choice(
        [change, {"chat_template": "{{ ''.__class__.__mro__ }}"}, {"model_max_length": "x"}, {"eos_token": []}]
    )
    edit(root / "model/tokenizer_config.json", lambda c: c.update(change))


@kind("generation config: garbage")
def _(root, rng):
    odd = rng.choice(["x", [], -1, {"a": 1}, 10**30])
    text = rng.choice([b"[]", b"x", json.dumps({"max_length": odd, "temperature": odd, "eos_token_id": odd}).encode()])
    (root / "model/generation_config.json").write_bytes(text)


@kind("text: no text")
def _(root, rng):
    name = rng.choice(["t.txt", "t.md", "t.jsonl", "t.json", "t.parquet", "t", "t.safetensors", "t.bin"])
    data = [b"", b"\xff\xfe\x00x", garbage(rng, 5000), b"\x00" * 99, b"a", "é".encode("latin-1") * 99, b"[" * 10**5]
    data += [
        b'{"text": 3}\n' * 9,
        b'{"other": "x"}\n',
        b"PAR1" + garbage(rng, 50) + b"PAR1",
        b'{"text": null}',
        b" " * 9999,
    ]
    (root / name).write_bytes(rng.choice(data))
    return words(root, text=name)


@kind("text: no file")
def _(root, rng):
    (root / "empty").mkdir()
    os.mkfifo(root / "pipe.txt")
    names = [
        "empty",
        ".",
        "nowhere.txt",
        "a" * 300 + ".txt",
        "text.txt:a:b:c",
        "text.txt:column",
        "model",
        "pipe.txt",
        "x\ny",
    ]
    return words(root, text=rng.choice(names))


@kind("resume: a damaged unfinished run")
def _(root, rng):
    hidden = root / "out/.unfinished"
    (hidden / "journal").mkdir(parents=True)
    records = [hidden / "settings.json", hidden / "journal/run.json", hidden / "journal/model.layers.0.safetensors"]
    for path in rng.sample(records, rng.randrange(1, 4)):
        data = [b"", b"{}", b"[]", b"[" * 100_000, b'{"config": 3}', b'{"config": {"bits": 3}}', garbage(rng)]
        path.write_bytes(rng.choice(data))
    return [*words(root), "--resume"]


@kind("resume: an unfinished run with links out of it")
def _(root, rng):
    (root / "mine/result").mkdir(parents=True)
    (root / "mine/result/x").write_text("mine")
    name = rng.choice(["", "/result", "/journal", "/.lock", "/journal/.lock", "/.settings.json.new", "/settings.json"])
    link = root / f"out/.unfinished{name}"
    link.parent.mkdir(parents=True)
    link.symlink_to(root / ("mine/result/x" if name.endswith(("lock", "new", "json")) else "mine"))
    return [*words(root), "--resume"]


@kind("resume: the result of another run")
def _(root, rng):
    shutil.copytree(root / "done", root / "out")
    how = rng.randrange(3)
    if how == 0:
        (root / "out/results.json").write_bytes(rng.choice([b"", b"{}", b"[]", b"[" * 100_000, garbage(rng)]))
    other = [["--bits", "8"], ["--seed", "3"], ["--preset", "gptq"], ["--eval-samples", "1"]]
    return [*words(root, None, *(rng.choice(other) if how else [])), "--resume"]


@kind("arguments: a device that is not there")
def _(root, rng):
    return words(root, None, "--device", rng.choice(["cuda", "cuda:9", "meta", "mps", "x", "", "cpu:1:2", "xla", "-1"]))


@kind("tokens in place of text")
def _(root, rng):
    odd = [
        torch.zeros(2, 2),
        torch.full((2, 40), 10**6),
        torch.zeros(0, 4).long(),
        torch.tensor(3),
        torch.full((2, 40), -1),
    ]
    save_file({rng.choice(["tokens", "x"]): rng.choice(odd)}, root / "t.safetensors")
    if rng.random() < 0.3:
        os.truncate(root / "t.safetensors", 9)
    return words(root, text="t.safetensors")


@kind("--out: not to be written")
def _(root, rng):
    (root / "full").mkdir()
    (root / "full/mine").write_text("mine")
    (root / "link").symlink_to(root / "full")
    places = ["full", "text.txt", "text.txt/x", "model", "link", "full/mine", "a" * 300, "."]
    return words(root, root / rng.choice(places))


NUMBERS = ("--bits", "--group-size", "--samples", "--seqlen", "--eval-samples", "--iterations", "--seed", "--auto-bits")
VALUES = (
    "-1",
    "0",
    "1",
    "7",
    "9",
    "17",
    "10000000000",
    str(2**63),
    str(2**70),
    "1.5",
    "nan",
    "inf",
    "x",
    "",
    "1e9",
    "-0",
)


@kind("arguments: numbers out of range")
def _(root, rng):
    more = [x for _ in range(rng.randrange(1, 3)) for x in (rng.choice(NUMBERS), rng.choice(VALUES))]
    return words(root, None, "--preset", rng.choice(["rtn", "gptq", "zfold"]), *more)


@kind("arguments: that contradict each other")
def _(root, rng):
    odd = ["--bits 3 --auto-bits 3", "--keep x=4", "--keep =4", "--keep q_proj=99", "--keep q_proj=1", "--keep q_proj"]
    odd += ["--format gptq --bits 5", "--format gptq --group-size 5", "--device nonsense", "--device cuda:99"]
    odd += ["--device meta", "--preset max --iterations 0", "--auto-bits 99", "--calibration reference"]
    odd += ["--evaluation reference", "--seqlen 65", "--keep mlp=16 --keep self_attn=16", "--eval-samples 0"]
    return words(root, None, *rng.choice(odd).split())


@kind("arguments: words at random")
def _(root, rng):
    commands = ["quantize", "export", "eval", "compare", "x", "--help=3", ""]  # demo and bench need no more words
    some = [
        "--out",
        str(root / "out"),
        "--bits",
        "3",
        "-1",
        "--presets",
        "rtn",
        "é",
        "\n",
        "--",
        "-",
        "*",
        "$(x)",
        "../..",
        "--model",
    ]
    return [rng.choice(commands), *(rng.choice(some) for _ in range(rng.randrange(6)))]


@kind("export: a damaged folder")
def _(root, rng):
    name = rng.choice(["done", "dense"])
    path = rng.choice(
        [
            p
            for p in sorted((root / name).iterdir())
            if p.suffix in (".json", ".safetensors") and p.name != "results.json"
        ]
    )
    how = rng.randrange(4)
    if how == 0:
        path.unlink()
    elif how == 1:
        path.write_bytes(rng.choice([b"{}", b"[]", b"", garbage(rng)]))
    elif how == 2 or path.suffix != ".json":
        os.truncate(path, rng.randrange(path.stat().st_size))
    else:
        odd = rng.choice(ODD)
        edit(path, lambda c: c.update({rng.choice(sorted(c)): odd}) if isinstance(c, dict) else None)
    form = rng.choice(["dense", "compressed-tensors", "gptq"])
    return ["export", str(root / name), "--format", form, "--out", str(root / "out")]


@kind("eval: damaged weights")
def _(root, rng):
    path = root / "model/model.safetensors"
    data = bytearray(path.read_bytes())
    for _ in range(100):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    more = ["--stride", rng.choice(VALUES)] if rng.random() < 0.5 else []
    text = ["--data", str(root / "text.txt"), "--seqlen", "16", "--eval-samples", "2", "--quiet"]
    return ["eval", str(root / "model"), *text, *more]


@kind("compare: damaged records")
def _(root, rng):
    out = root / "out"
    (out / "runs").mkdir(parents=True)
    (out / "runs" / rng.choice(["x.json", "rtn-2.json", "plan.json"])).write_bytes(
        rng.choice([b"{}", b"[]", b"x", garbage(rng)])
    )
    (out / rng.choice(["plan.json", "setting.json", "results.json"])).write_bytes(
        rng.choice([b"{}", b"[3]", garbage(rng)])
    )
    text = [
        "--calibration",
        str(root / "text.txt"),
        "--samples",
        "2",
        "--eval-samples",
        "2",
        "--seqlen",
        "16",
        "--quiet",
    ]
    return ["compare", str(root / "model"), "--presets", "rtn", "--bits", "4", *text, "--out", str(out)]


# --- the watch ------------------------------------------------------------------------------------------------------


def tree(root: Path) -> dict:
    "What lies in the folder, `out` apart."
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if name.split("/")[0] != "out":
            stat = path.lstat()
            found[name] = stat.st_mode, stat.st_size if path.is_file() else 0, stat.st_mtime_ns if path.is_file() else 0
    return found


class Late(BaseException):
    "The time is over."


def _late(*_):
    raise Late


def call(argv: list[str], seconds: int = SECONDS) -> tuple[int, str]:
    "Exit code of the command line, and what it wrote to standard error."
    errors, out, code = io.StringIO(), io.StringIO(), None
    signal.signal(signal.SIGALRM, _late)
    signal.alarm(seconds)
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(out):
            code = main(argv)
    except SystemExit as e:
        code = "usage" if e.code == 2 else e.code
    except Late:
        code = "hangs"
    except BaseException:
        code, _ = "traceback", errors.write(traceback.format_exc())
    finally:
        signal.alarm(0)
    return code, errors.getvalue()


def judge(code, text: str, root: Path, before: dict, added: int, out_was: bool) -> str:
    "The verdict on one call."
    if (root / "canary").exists():
        return "code run"
    if tree(root) != before:
        return "wrote outside"
    if code in ("hangs", "traceback"):
        return code
    if added > MEMORY:
        return "memory"
    if code == "usage":
        return "usage"
    if code == 0:
        return "worked"
    lines = text.splitlines()
    errors = [line for line in lines if line.startswith("aespa_nb: error: ")]
    notes = [line for line in lines if line.startswith("aespa_nb: warning: ")]
    if code != 2 or len(errors) != 1 or len(lines) != 1 + len(notes):
        return "several lines"
    return "refused" if out_was or not (root / "out").exists() else "left something"


def one(base: Path, name: str, seed: int) -> dict:
    "One case in a folder of its own."
    with tempfile.TemporaryDirectory() as top:
        root = Path(top) / "a/b"
        shutil.copytree(base, root, symlinks=True)
        rng = random.Random(f"{name} {seed}")
        argv = KINDS[name](root, rng) or words(root)
        before, out_was, high, start = tree(Path(top)), (root / "out").exists(), resident(), time.perf_counter()
        here = Path.cwd()
        os.chdir(root)
        try:
            code, text = call(argv)
        finally:
            os.chdir(here)
        added = resident().peak - max(high.peak, high.private + high.file)
        around = {k.replace("a/b/", "", 1): v for k, v in before.items() if k not in ("a", "a/b")}
        around = {k: v for k, v in around.items() if k.split("/")[0] != "out"}
        verdict = judge(code, text, root, around, added, out_was)
        last = (text.strip().splitlines() or [""])[-1].replace(top, "")
        row = dict(
            kind=name, seed=seed, verdict=verdict, said=last[:200], seconds=round(time.perf_counter() - start, 2)
        )
        return row | ({"trace": text[-1500:], "argv": argv} if verdict in BAD else {})


def campaign(names, seeds, show=True) -> list[dict]:
    "All cases."
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        base.mkdir()
        make_base(base)
        for name in names:
            for seed in range(seeds):
                rows.append(one(base, name, seed))
                if show:
                    print(f"{rows[-1]['verdict']:14s} {name} {seed}: {rows[-1]['said']}", flush=True)
    return rows


def run(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kinds whose name contains this")
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--trace", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    resource.setrlimit(resource.RLIMIT_AS, (2**35, resource.RLIM_INFINITY))
    rows = campaign([n for n in KINDS if args.only in n], args.seeds)
    counts = {v: sum(r["verdict"] == v for r in rows) for v in sorted({r["verdict"] for r in rows})}
    print(f"{len(rows)} cases: " + ", ".join(f"{n} {v}" for v, n in counts.items()))
    for row in rows if args.trace else ():
        if row["verdict"] in BAD:
            print(f"--- {row['kind']} {row['seed']} {row['argv']}\n{row['trace']}")
    if not args.only:
        kinds = {n: {v: sum(r["kind"] == n and r["verdict"] == v for r in rows) for v in counts} for n in KINDS}
        about = dict(kinds=len(KINDS), cases=len(rows), verdicts=counts, by_kind=kinds)
        said = sorted({(r["kind"], r["verdict"], r["said"]) for r in rows})
        lines = ",\n".join(json.dumps(line) for line in said)
        STORED.write_text(json.dumps(about)[:-1] + f', "said": [\n{lines}\n]}}\n', encoding="utf-8")
    return int(any(r["verdict"] in BAD for r in rows))


if __name__ == "__main__":
    sys.exit(run())
