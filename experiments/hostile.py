"""Damaged files and hostile input: every case ends in one line and exit code 2, or does what was asked.

Every kind with 12 seeds, to nbs/runs/hostile.json; `one(base, kind, seed)` is one of them. Each case is a call of the
command line in this process. What is watched: the exit code, standard error, all files around `--out` before and
after, a canary that writes a file if code of the checkpoint runs, memory, and time.
"""

import contextlib
import io
import json
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import torch
from aespa_nb.cli import main
from aespa_nb.model.memory import resident
from common import make_model, resume
from safetensors.torch import load_file, save_file

MEMORY, SECONDS = 512 << 20, 120  # bytes that a case may add, and its time
SHORT = "--bits 4 --samples 2 --eval-samples 2 --seqlen 16 --quiet".split()
BAD = ("traceback", "several lines", "code run", "wrote outside", "left something", "memory", "hangs")


def make_base(folder: Path) -> None:
    "A good model folder, whole and in shards, a good text in many formats, and a folder that `quantize` has written."
    model, tokenizer = make_model(folder, 32, 48, 2)
    model.save_pretrained(folder / "sharded", max_shard_size="200KB")
    tokenizer.save_pretrained(folder / "sharded")
    with contextlib.redirect_stdout(io.StringIO()):
        main(words(folder, out=folder / "done"))
    for suffix in ".md .jsonl .json .parquet .safetensors .bin".split():
        shutil.copy(folder / "text.txt", folder / f"text{suffix}")


def words(root: Path, *more, model="model", text="text.txt", out=None) -> list[str]:
    "The command line of `quantize`."
    head = ["quantize", str(root / model), "--calibration", str(root / text), "--preset", "rtn", *SHORT, *more]
    return [*head, "--out", str(out or root / "out")]


# --- what happens to a file: its new content, or None for a file that is gone ----------------------------------------

NAN, INF = float("nan"), float("inf")
JUNK = ("", "{}", "[]", "null", "3", '"x"', "\ud800", "\x8f\0" * 99, '{"text": 3}\n' * 9, " " * 999, "[" * 10**5)
JUNK += ("[" * 10**5 + "]" * 10**5, '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"config": {"bits": 3}}')
ODD = (None, [], {}, "", "x", -1, 0, 1.5, 10**9, 10**15, 2**70, True, [1, 2], {"a": 1}, "../../x", NAN, 3)


def garbage(data: bytes, g) -> bytes:
    return g.choice([*(junk.encode(errors="surrogatepass") for junk in JUNK), g.randbytes(g.randrange(1, 400))])


def cut_short(data: bytes, g) -> bytes | None:
    return g.choice([data[: g.choice([1, 7, 8, 9, g.randrange(len(data) + 1)])], None])


def flipped_bits(data: bytes, g) -> bytes:
    "In the first bytes: of a safetensors file, the length of its header and the header."
    head = bytearray(data[:3000])
    for i in g.choices(range(len(head)), k=g.choice([1, 8, 500])):
        head[i] ^= 1 << g.randrange(8)
    return head + data[3000:]


def odd_field(data: bytes, g) -> bytes:
    "A field of a JSON object is missing, or has a value of another kind."
    fields = json.loads(data)
    name = g.choice(sorted(fields))
    return json.dumps({k: v for k, v in fields.items() if k != name} | g.choice([{}, {name: g.choice(ODD)}])).encode()


def resumed(r, *more):
    (r / "done").rename(r / "out")
    return words(r, *more, "--resume")


# what is damaged -> its files, and the words of the command that reads them, which is given one of them
FILES = {
    "config": ("model/config.json", lambda r, path: words(r)),
    "generation config": ("model/generation_config.json", lambda r, path: words(r)),
    "tokenizer": ("model/tokenizer*.json", lambda r, path: words(r)),
    "weights": ("model/*.safetensors", lambda r, path: words(r)),
    "shards": ("sharded/*.safetensors", lambda r, path: words(r, model="sharded")),
    "index": ("sharded/*.index.json", lambda r, path: words(r, model="sharded")),
    "text": ("text*", lambda r, path: words(r, text=path.name)),
    "weights to be scored": ("model/*.safetensors", lambda r, path: [
        "eval", str(r / "model"), "--data", str(r / "text.txt"), *"--seqlen 16 --eval-samples 2 --quiet".split()]),
    "result to be exported": ("done/*.*", lambda r, path: [
        "export", str(r / "done"), "--format", "dense", "--out", str(r / "out")]),
    "result to be resumed": ("done/results.json", lambda r, path: resumed(r)),
}  # fmt: skip


def on_file(pattern: str, way, command):
    "The kind of case in which one of these files is damaged in this way."

    def change(r, g):
        path = g.choice(sorted(r.glob(pattern)))
        content = way(path.read_bytes(), g)
        path.unlink() if content is None else path.write_bytes(content)
        return command(r, path)

    return change


KINDS = {
    f"{what}: {way.__name__.replace('_', ' ')}": on_file(pattern, way, command)
    for what, (pattern, command) in FILES.items()
    for way in (garbage, cut_short, flipped_bits, *([odd_field] if pattern.endswith("json") else []))
}


# --- other kinds: each changes the folder `r`, drawing from `g`, and gives the words of the command -------------------

NUMBERS = "--bits --group-size --samples --seqlen --eval-samples --iterations --seed --auto-bits".split()
VALUES = ("-1", "0", "1", "7", "9", "17", "1" + "0" * 10, str(2**63), str(2**70), "1.5", "nan", "inf", "x", "", "-0")
CONTRADICTIONS = (
    "--bits 3 --auto-bits 3|--keep x=4|--keep =4|--keep q_proj=99|--keep q_proj=1|--keep q_proj|--auto-bits 99|"
    "--format gptq --bits 5|--format gptq --group-size 5|--preset max --iterations 0|--calibration reference|"
    "--evaluation reference|--seqlen 65|--keep mlp=16 --keep self_attn=16|--device cuda:9|--device cpu:1:2"
).split("|")
OTHERS = [dict(model_type=name) for name in "gpt2 mixtral bert t5 whisper clip gpt_oss mamba vit nonsense".split()]
OTHERS += [dict(quantization_config=dict(quant_method=name, bits=4)) for name in "gptq awq fp8 nonsense aqlm".split()]
OTHERS += [dict(hidden_size=10**6), dict(vocab_size=10**9), dict(num_hidden_layers=10**9), dict(head_dim=10**30)]
AWAY = ("../../../../../../etc/passwd", "/etc/passwd", "../model/model.safetensors", "..", ".", "", "x\0y", "~/x")
CASTS = [torch.Tensor.long, torch.Tensor.bool, torch.Tensor.flatten, lambda t: t[:-1], lambda t: t[None]]
CASTS += [lambda t, value=value: t.index_fill(0, torch.tensor([0]), value) for value in (NAN, INF, -INF, 3e38)]
TOKENS = (torch.zeros(2, 2), torch.full((2, 40), 10**6), torch.full((2, 40), -1), torch.zeros(0, 4).long())
PICKLE = "cos\nsystem\n(Vtouch {}\ntR."  # one that runs a command when it is read
CANARY = "import pathlib\npathlib.Path({!r}).write_text('run')\n"
CANARY += "from transformers import *\nC = LlamaConfig\nM = LlamaForCausalLM\n"
AUTO = dict(auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M", "AutoTokenizer": ["mine.T", None]})


def edit(path: Path, change) -> None:
    "Changes an object in a JSON file."
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def tensors(path: Path, change) -> None:
    "Changes the tensors of a safetensors file, a dictionary."
    found = load_file(path)
    change(found)
    save_file({k: v.contiguous() for k, v in found.items()}, path, {"format": "pt"})


def another_model(r, g):
    edit(r / "model/config.json", lambda config: config.update(g.choice(OTHERS)))
    return words(r)


def own_code(r, g):
    (r / "model/mine.py").write_text(CANARY.format(str(r / "canary")))
    edit(r / "model/config.json", lambda c: c.update(AUTO | ({"model_type": "mine"} if g.random() < 0.7 else {})))
    edit(r / "model/tokenizer_config.json", lambda c: g.random() < 0.5 and c.update(AUTO, tokenizer_class="T"))
    return words(r)


def other_tensor(r, g):
    "One of the tensors has another type, shape, content or name."

    def change(found):
        name = g.choice(sorted(found))
        new_name = g.choice([name, name, "../../x", "a" * 10**4, "model.layers.9.x.weight", ""])
        found[new_name] = g.choice(CASTS)(found.pop(name))

    tensors(r / "model/model.safetensors", change)
    return words(r)


def pickled(r, g):
    "In place of the weights, or beside them."
    if g.random() < 0.5:
        (r / "model/model.safetensors").unlink()
    for name in g.sample(["pytorch_model.bin", "model.safetensors", "training_args.bin", "consolidated.00.pth"], 2):
        (r / "model" / name).write_text(PICKLE.format(r / "canary"))
    return words(r)


def other_shard(r, g):
    "The index says that a tensor is in another shard, or out of the folder."
    places = [*AWAY, *(p.name for p in sorted((r / "sharded").glob("model-*")))]
    change = lambda index: index["weight_map"].update({g.choice(sorted(index["weight_map"])): g.choice(places)})
    edit(r / "sharded/model.safetensors.index.json", change)
    return words(r, model="sharded")


def tokens_as_text(r, g):
    save_file({g.choice(["tokens", "x"]): g.choice(TOKENS)}, r / "t.safetensors")
    return words(r, text="t.safetensors")


def no_text(r, g):
    return words(r, text=g.choice([".", "a" * 300 + ".txt", "text.txt:a:b", "text.txt:column", "model", "x\ny"]))


def garbage_in(folder, g, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(garbage(b"", g))


def unfinished(r, g):
    names = ("settings.json", "journal/run.json", "journal/model.layers.0.safetensors")
    garbage_in(r / "out/.unfinished", g, *g.sample(names, g.randrange(1, 4)))
    return words(r, "--resume")


def another_setting(r, g):
    return resumed(r, *g.choice(["--bits 8", "--seed 3", "--preset gptq"]).split())


def out_taken(r, g):
    (r / "link").symlink_to(r / "sharded")
    return words(r, out=r / g.choice(["sharded", "text.txt", "text.txt/x", "model", "link", "a" * 300, "."]))


def senseless_options(r, g):
    numbers = [word for name in g.sample(NUMBERS, 2) for word in (name, g.choice(VALUES))]
    return words(r, *g.choice([numbers, g.choice(CONTRADICTIONS).split()]))


def damaged_records(r, g):
    garbage_in(r / "out", g, "setting.json", g.choice(["runs/x.json", "runs/rtn-4b-row-s0.json"]))
    return ["compare", *words(r)[1:4], "--presets", "rtn", *SHORT, "--out", str(r / "out")]


OTHER_KINDS = (another_model, own_code, other_tensor, pickled, other_shard, tokens_as_text, no_text, unfinished)
OTHER_KINDS += (another_setting, out_taken, senseless_options, damaged_records)
KINDS |= {change.__name__.replace("_", " "): change for change in OTHER_KINDS}


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
        argv, out = KINDS[name](root, random.Random(f"{name} {seed}")), root / "out"
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
    resource.setrlimit(resource.RLIMIT_AS, (2**35, resource.RLIM_INFINITY))
    with tempfile.TemporaryDirectory() as folder:
        make_base(Path(folder))

        def run(job):
            rows = [one(Path(folder), job["kind"], seed) for seed in range(12)]
            print(*(row for row in rows if row["verdict"] in BAD), sep="\n")
            return dict(verdicts=Counter(r["verdict"] for r in rows), said=sorted({r["said"] for r in rows}))

        rows = resume("hostile", [dict(kind=kind) for kind in KINDS], run, whole=True)
    sys.exit(any(verdict in BAD for row in rows for verdict in row["verdicts"]))
