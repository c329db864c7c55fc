"""Damaged files and hostile input: every case ends in one line and exit code 2, or does what was asked.

    python experiments/hostile.py                              every kind, 12 seeds; nbs/runs/hostile.json
    python experiments/hostile.py --only index --seeds 3       a part, printed

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
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import torch
from aespa_nb.cli import main
from aespa_nb.model.memory import resident
from common import make_model, measured
from safetensors.torch import load_file, save_file

MEMORY, SECONDS = 512 << 20, 120  # bytes that a case may add, and its time
SHORT = "--bits 4 --samples 2 --eval-samples 2 --seqlen 16 --quiet".split()
BAD = ("traceback", "several lines", "code run", "wrote outside", "left something", "memory", "hangs")


def make_base(folder: Path) -> None:
    "A good model folder, whole and in shards, a good text, and folders that `quantize` has written."
    model, tokenizer = make_model(folder, 32, 48, 2)
    model.save_pretrained(folder / "sharded", max_shard_size="200KB")
    tokenizer.save_pretrained(folder / "sharded")
    with contextlib.redirect_stdout(io.StringIO()):
        main(words(folder, out=folder / "done"))
        main(words(folder, "--format", "dense", out=folder / "dense"))


def words(root: Path, *more, model="model", text="text.txt", out=None) -> list[str]:
    "The command line of `quantize`."
    head = ["quantize", str(root / model), "--calibration", str(root / text), "--preset", "rtn", *SHORT, *more]
    return [*head, "--out", str(out or root / "out")]


# --- kinds of damage: each changes the folder `r`, drawing from `g`, and may give other words ------------------------

CONFIG, WEIGHTS, INDEX = "model/config.json", "model/model.safetensors", "sharded/model.safetensors.index.json"
DEEP = ("[" * 10**5 + "]" * 10**5, '{"a":' * 10**5 + "1" + "}" * 10**5)
JUNK = ("", "{}", "[]", "null", "3", '"x"', "[" * 10**5, "\ud800", "\x8f\0" * 99, '{"text": 3}\n' * 9, " " * 999, *DEEP)
JUNK += ('{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"model": {"type": "BPE", "vocab": {}, "merges": []}}')
ODD = (None, [], {}, "", "x", -1, 0, 1.5, 10**9, 10**15, 2**70, True, [1, 2], {"a": 1}, "../../x", float("nan"), 3)
AWAY = ("../../../../../../etc/passwd", "/etc/passwd", "../model/model.safetensors", "..", ".", "", "a/../../x")
NUMBERS = "--bits --group-size --samples --seqlen --eval-samples --iterations --seed --auto-bits".split()
VALUES = ("-1", "0", "1", "7", "9", "17", "1" + "0" * 10, str(2**63), str(2**70), "1.5", "nan", "inf", "x", "", "-0")
DEVICES = ("cuda", "cuda:9", "meta", "mps", "x", "", "cpu:1:2", "xla", "-1")
CONTRARY = "--bits 3 --auto-bits 3|--keep x=4|--keep =4|--keep q_proj=99|--keep q_proj=1|--keep q_proj|--auto-bits 99|"
CONTRARY += "--format gptq --bits 5|--format gptq --group-size 5|--preset max --iterations 0|--calibration reference|"
CONTRARY += "--evaluation reference|--seqlen 65|--keep mlp=16 --keep self_attn=16"
LOOSE = ("--bits", "3", "-1", "--presets", "rtn", "é", "\n", "--", "-", "*", "$(x)", "../..", "--model")
KINDS_OF_MODELS = "opt gpt2 mixtral bert t5 whisper clip llava nonsense gpt_oss falcon mamba bloom vit".split()
ALREADY = "gptq awq bitsandbytes compressed-tensors fp8 nonsense quanto aqlm".split()
CASTS = (torch.Tensor.long, torch.Tensor.bool, torch.Tensor.flatten, lambda t: t[:-1], lambda t: t[None])
SHAPES = ([2**31, 2**31], [2**63], [10**9, 32], [2**40], [-1, 32], [0], [], [32] * 70, "x")
SPANS = ([0, 2**20], [8, 4], [-4, 4], [2**62, 2**62 + 8], [0, 0], [0], "x")
TOKENS = (torch.zeros(2, 2), torch.full((2, 40), 10**6), torch.full((2, 40), -1), torch.zeros(0, 4).long())
CANARY = "import pathlib\npathlib.Path({!r}).write_text('run')\n"
CANARY += "from transformers import *\nC = LlamaConfig\nM = LlamaForCausalLM\n"
AUTO = dict(auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M", "AutoTokenizer": ["mine.T", None]})


def put(path: Path, content) -> None:
    "Writes bytes, or text, into a file whose folder may be missing."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode(errors="surrogatepass") if isinstance(content, str) else content)


def damage(path: Path, g) -> None:
    "What happens to files: garbage, cut short, flipped bits, missing, or a folder in their place."
    data, how = path.read_bytes() if path.exists() else b"", g.randrange(6)
    if how == 0:
        put(path, g.choice(JUNK))
    elif how == 1:
        put(path, g.randbytes(g.randrange(1, 400)))
    elif how == 2:
        put(path, data[: g.choice([1, 7, 8, 9, g.randrange(len(data) + 1)])])
    elif how == 3:
        bits = [(g.randrange(len(data)), 1 << g.randrange(8)) for _ in range(g.choice([1, 8, 500])) if data]
        put(path, bytes(b ^ dict(bits).get(i, 0) for i, b in enumerate(data)) if len(data) < 10**5 else data[:-1])
    else:
        path.unlink(missing_ok=True)
        how == 5 and path.mkdir(parents=True)


def edit(path: Path, change) -> None:
    "Changes an object in a JSON file."
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def odd(path: Path, g, *names) -> None:
    "A field of a JSON file is missing, or has a value of another kind."
    put_in = lambda c, name: c.pop(name, None) if g.random() < 0.3 else c.update({name: g.choice(ODD)})
    edit(path, lambda c: put_in(c, g.choice(names or sorted(c))))


def header(path: Path, g, *changes) -> None:
    "Rewrites the header of a safetensors file: one tensor's entry is changed, or named twice."
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    found = json.loads(data[8 : 8 + size])
    name = g.choice([k for k in sorted(found) if k != "__metadata__"])
    new = json.dumps(found | {name: found[name] | g.choice(changes)}).encode()
    if g.random() < 0.1:
        new = new[:-1] + f", {json.dumps(name)}: {json.dumps(found[name])}}}".encode()
    put(path, struct.pack("<Q", len(new)) + new + data[8 + size :])


def tensors(path: Path, change) -> None:
    "Changes the tensors of a safetensors file, a dictionary."
    found = load_file(path)
    change(found)
    save_file({k: v.contiguous() for k, v in found.items()}, path, {"format": "pt"})


class Payload:
    "Unpickling it runs a command."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def pickled(r, g, *names, beside):
    beside or (r / WEIGHTS).unlink()
    for name in names if beside else [g.choice(names)]:
        put(r / "model" / name, pickle.dumps(Payload(r / "canary")))


def own_code(r, g):
    put(r / "model/mine.py", CANARY.format(str(r / "canary")))
    edit(r / CONFIG, lambda c: c.update(AUTO | ({"model_type": "mine"} if g.random() < 0.7 else {})))
    edit(r / "model/tokenizer_config.json", lambda c: g.random() < 0.5 and c.update(AUTO, tokenizer_class="T"))


def another_run(r, g):
    shutil.copytree(r / "done", r / "out")
    more = g.choice(["", "--bits 8", "--seed 3", "--preset gptq", "--eval-samples 1"])
    more or put(r / "out/results.json", g.choice(JUNK))
    return words(r, *more.split(), "--resume")


def out_taken(r, g):
    put(r / "full/mine", "mine")
    (r / "link").symlink_to(r / "full")
    return words(r, out=r / g.choice(["full", "text.txt", "text.txt/x", "model", "link", "full/mine", "a" * 300, "."]))


def unfinished(r, g):
    names = ("settings.json", "journal/run.json", "journal/model.layers.0.safetensors")
    for name in g.sample(names, g.randrange(1, 4)):
        put(r / "out/.unfinished" / name, g.choice([*JUNK, '{"config": 3}', '{"config": {"bits": 3}}']))
    return words(r, "--resume")


def bad_records(r, g):
    put(r / "out/runs" / g.choice(["x.json", "rtn-4b-row-s0.json"]), g.choice(JUNK))
    put(r / "out/setting.json", g.choice(JUNK))
    text = ["--calibration", str(r / "text.txt"), *SHORT, "--out", str(r / "out")]
    return ["compare", str(r / "model"), "--presets", "rtn", *text]


def export(r, g, change):
    name, form = g.choice(["done", "dense"]), g.choice(["dense", "compressed-tensors", "gptq"])
    change(g.choice(sorted(p for p in (r / name).iterdir() if p.suffix in (".json", ".safetensors"))))
    return ["export", str(r / name), "--format", form, "--out", str(r / "out")]


def evaluate(r, g):
    data = ["--data", str(r / "text.txt"), "--seqlen", "16", "--eval-samples", "2", "--quiet"]
    return ["eval", str(r / "model"), *data, *(["--stride", g.choice(VALUES)] if g.random() < 0.5 else [])]


def text_named(r, g, name):
    damage(r / name, g)
    return words(r, text=name)


pick = lambda r, g, pattern: g.choice(sorted(r.glob(pattern)))
KINDS = {
    "config: a damaged file": lambda r, g: damage(r / CONFIG, g),
    "config: odd or missing fields": lambda r, g: odd(r / CONFIG, g),
    "config: absurd sizes": lambda r, g: edit(r / CONFIG, lambda c: c.update({g.choice(
        [k for k in sorted(c) if "size" in k or "num_" in k]): g.choice([10**4, 10**6, 10**9, 10**12, 10**30])})),
    "config: another kind of model": lambda r, g: edit(
        r / CONFIG, lambda c: c.update(model_type=g.choice(KINDS_OF_MODELS))),
    "config: quantized already": lambda r, g: edit(r / CONFIG, lambda c: c.update(quantization_config=g.choice(
        [{"quant_method": g.choice(ALREADY), "bits": 4, "group_size": 32}, {"quant_method": "x"}, {}, [], "x"]))),
    "code of the checkpoint's own": own_code,
    "weights: a damaged file": lambda r, g: damage(r / WEIGHTS, g),
    "weights: a header too long": lambda r, g: put(
        r / WEIGHTS, struct.pack("<Q", g.choice([2**64 - 1, 2**63, 2**40, 10**8])) + (r / WEIGHTS).read_bytes()[8:]),
    "weights: a header that lies": lambda r, g: header(
        r / WEIGHTS, g, *(dict(shape=s) for s in SHAPES), *(dict(data_offsets=s) for s in SPANS),
        *(dict(dtype=d) for d in ("F64", "I64", "BOOL", "F8_E4M3", "F13", 7, "BF16"))),
    "weights: a tensor of another type or shape": lambda r, g: tensors(
        r / WEIGHTS, lambda f: f.update({(k := g.choice(sorted(f))): g.choice(CASTS)(f[k]).clone()})),
    "weights: a tensor missing, or one too many": lambda r, g: tensors(r / WEIGHTS, lambda f: f.update(
        {g.choice(["../../x", "a" * 10**4, "model.layers.9.x.weight", ""]): f.pop(g.choice(sorted(f)))})),
    "weights: NaN or Inf": lambda r, g: tensors(r / WEIGHTS, lambda f: f[g.choice(sorted(f))].flatten()[:2].fill_(
        g.choice([float("nan"), float("inf"), -float("inf"), 3e38]))),
    "weights: pickled": lambda r, g: pickled(r, g, "pytorch_model.bin", "model.safetensors", "consolidated.00.pth",
        "pytorch_model.bin.index.json", beside=False),
    "weights: pickled beside good ones": lambda r, g: pickled(
        r, g, "pytorch_model.bin", "training_args.bin", "adapter_model.bin", "optimizer.pt", beside=True),
    "weights: damaged, to be scored": lambda r, g: damage(r / WEIGHTS, g) or evaluate(r, g),
    "shards: a damaged file": lambda r, g: damage(pick(r, g, "sharded/model-*"), g) or words(r, model="sharded"),
    "shards: one in place of another": lambda r, g: shutil.copy(
        *g.sample(sorted((r / "sharded").glob("model-*")), 2)) and words(r, model="sharded"),
    "index: a damaged file": lambda r, g: damage(r / INDEX, g) or words(r, model="sharded"),
    "index: a way out of the folder": lambda r, g: edit(r / INDEX, lambda i: i["weight_map"].update(
        {g.choice(sorted(i["weight_map"])): g.choice([*AWAY, "x\0y", "~/x", "C:\\x", str(r / WEIGHTS)])}))
        or words(r, model="sharded"),
    "folder: files missing": lambda r, g: [p.unlink() for p in sorted((r / "model").iterdir()) if g.random() < 0.4] and
        words(r, model=g.choice(["model", "model", "text.txt", "model/config.json", "nowhere"])),
    "tokenizer: a damaged file": lambda r, g: damage(pick(r, g, "model/tokenizer*.json"), g),
    "tokenizer: odd or missing fields": lambda r, g: odd(
        r / "model/tokenizer_config.json", g, "tokenizer_class", "chat_template", "model_max_length", "eos_token"),
    "tokenizer: another vocabulary": lambda r, g: edit(r / "model/tokenizer.json", lambda t: t["model"].update(
        vocab={k: i + 10**6 for k, i in t["model"]["vocab"].items()})),
    "generation config: a damaged file": lambda r, g: damage(r / "model/generation_config.json", g),
    "generation config: odd or missing fields": lambda r, g: odd(
        r / "model/generation_config.json", g, "max_length", "temperature", "eos_token_id"),
    "text: a damaged file": lambda r, g: text_named(
        r, g, g.choice("t.txt t.md t.jsonl t.json t.parquet t t.safetensors t.bin text.txt".split())),
    "text: no file": lambda r, g: words(
        r, text=g.choice([".", "nowhere.txt", "a" * 300 + ".txt", "text.txt:a:b", "text.txt:column", "model", "x\ny"])),
    "tokens in place of text": lambda r, g: save_file(
        {g.choice(["tokens", "x"]): g.choice(TOKENS)}, r / "t.safetensors") or words(r, text="t.safetensors"),
    "resume: a damaged unfinished run": unfinished,
    "resume: the result of another run": another_run,
    "--out: not to be written": out_taken,
    "arguments: a device that is not there": lambda r, g: words(r, "--device", g.choice(DEVICES)),
    "arguments: numbers out of range": lambda r, g: words(r, "--preset", g.choice(["rtn", "gptq", "zfold"]), *(
        x for _ in range(g.randrange(1, 3)) for x in (g.choice(NUMBERS), g.choice(VALUES)))),
    "arguments: that contradict each other": lambda r, g: words(r, *g.choice(CONTRARY.split("|")).split()),
    "arguments: words at random": lambda r, g: [g.choice(["quantize", "export", "eval", "compare", "x", "--help=3"]),
        *(g.choice([*LOOSE, "--out", str(r / "out")]) for _ in range(g.randrange(6)))],
    "export: a damaged folder": lambda r, g: export(r, g, lambda path: damage(path, g)),
    "export: odd or missing fields": lambda r, g: export(
        r, g, lambda path: odd(path if path.name == "config.json" else path.parent / "config.json", g)),
    "compare: damaged records": bad_records,
}  # fmt: skip


# --- the watch ------------------------------------------------------------------------------------------------------


def tree(top: Path, out: Path) -> dict:
    "What lies in the folder, `out` apart."
    there = [p for p in sorted(top.rglob("*")) if out not in (p, *p.parents)]
    about = lambda s, file: (s.st_mode, *((s.st_size, s.st_mtime_ns) if file else ()))
    return {str(p): about(p.lstat(), p.is_file()) for p in there}


def call(argv: list[str], seconds: int = SECONDS) -> tuple[int | str, str]:
    "Exit code of the command line, and what it wrote to standard error."
    errors = io.StringIO()
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(seconds)
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            code = main(argv)
    except SystemExit as e:
        code = "usage" if e.code == 2 else e.code
    except BaseException as e:
        code, _ = "hangs" if isinstance(e, KeyboardInterrupt) else "traceback", errors.write(traceback.format_exc())
    finally:
        signal.alarm(0)
    return code, errors.getvalue()


def judge(code, text: str, left: bool) -> str:
    "The verdict on an exit code and what was said; `left`: there is an `--out` that was not there before."
    if code in ("hangs", "traceback", "usage", 0):
        return code or "worked"
    warnings, lines = r"(aespa_nb: warning: .*\n)*", "".join(f"{line}\n" for line in text.splitlines())
    if code != 2 or not re.fullmatch(warnings + r"aespa_nb: error: .*\n" + warnings, lines):
        return "several lines"
    return "left something" if left else "refused"


def one(base: Path, name: str, seed: int) -> dict:
    "One case in a folder of its own."
    with tempfile.TemporaryDirectory() as top:
        root = Path(top) / "a/b"
        shutil.copytree(base, root, symlinks=True)
        argv, out = KINDS[name](root, random.Random(f"{name} {seed}")) or words(root), root / "out"
        before, out_was, high = tree(Path(top), out), out.exists(), resident()
        with contextlib.chdir(root) if sys.version_info >= (3, 11) else contextlib.nullcontext():
            code, text = call(argv)
        verdict = judge(code, text, out.exists() and not out_was)
        if resident().peak - max(high.peak, high.private + high.file) > MEMORY:
            verdict = "memory"
        if tree(Path(top), out) != before:
            verdict = "code run" if (root / "canary").exists() else "wrote outside"
        said = (text.strip().splitlines() or [""])[-1].replace(top, "")[:200]
        return dict(verdict=verdict, said=said) | (dict(trace=text[-1500:], argv=argv) if verdict in BAD else {})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="kinds whose name contains this: printed, not stored")
    parser.add_argument("--seeds", type=int, default=12)
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (2**35, resource.RLIM_INFINITY))
    with tempfile.TemporaryDirectory() as folder:
        make_base(Path(folder))

        def run(job):
            rows = [one(Path(folder), job["kind"], seed) for seed in range(args.seeds)]
            print(*(row for row in rows if args.only is not None or row["verdict"] in BAD), sep="\n")
            return dict(verdicts=Counter(r["verdict"] for r in rows), said=sorted({r["said"] for r in rows}))

        rows = measured("hostile", [dict(kind=kind) for kind in KINDS], run, args.only)
    sys.exit(any(verdict in BAD for row in rows for verdict in row["verdicts"]))
