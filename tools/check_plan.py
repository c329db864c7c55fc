"""Holds `aespa_nb plan` against the runs it speaks of: `quantize` in fresh processes, one thread each.

    python tools/check_plan.py                    every preset, on the bundled model and on one ten times larger
    python tools/check_plan.py --presets gptq     some of them

Writes nbs/runs/plan.json, which the chapter on planning a run shows; runs that it holds already are not done again.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig

sys.path.append("experiments")
from peak_memory import write_shards  # noqa: E402

STORED = Path("nbs/runs/plan.json")
PRESETS = ("rtn", "gptq", "aespa", "best", "max")
OPTIONS = "--samples 16 --seqlen 256 --eval-samples 8 --iterations 100 --quiet".split()
SHAPE = dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=8, vocab_size=57344)
HEADS = dict(num_attention_heads=6, num_key_value_heads=2, head_dim=64, max_position_embeddings=512)


def make(folder, n_shards=3):
    "A LLaMA of 57 million weights in bfloat16, in shards, with the bundled tokenizer."
    config = LlamaConfig(**SHAPE, **HEADS, tie_word_embeddings=False, dtype="bfloat16")
    write_shards(folder, config, n_shards, draw)
    AutoTokenizer.from_pretrained(str(files("aespa_nb") / "reference"), local_files_only=True).save_pretrained(folder)


def draw(shape, rng):
    "Weights with inputs and directions of unequal size, as training leaves them; ones for a norm."
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    rows, inp = shape
    W = torch.randn(rows, inp, generator=rng) * torch.exp(0.5 * torch.randn(inp, generator=rng))
    some = torch.randn(rows, 16, generator=rng) @ torch.randn(16, inp, generator=rng) / 4
    return ((W + some) * inp**-0.5).bfloat16()


# A small process between: Linux counts what a process was forked from as memory of its own.
WATCH = """
import json, resource, subprocess, sys
code, used = subprocess.call(sys.argv[1:]), resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([code, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024]))
"""


def measured(words):
    "Output, CPU seconds, wall-clock seconds and peak resident bytes of a fresh process."
    start = time.perf_counter()
    watched, env = [sys.executable, "-c", WATCH, *words], {**os.environ, "OMP_NUM_THREADS": "1"}
    text = subprocess.run(watched, stdout=subprocess.PIPE, text=True, env=env, check=True).stdout
    text, _, found = text.rstrip("\n").rpartition("\n")
    code, cpu, peak = json.loads(found)
    if code:
        sys.exit(f"{' '.join(map(str, words))} ended with code {code}")
    return text, cpu, time.perf_counter() - start, peak


def row(name, model, preset, work):
    "The plan beside what happened."
    command = [sys.executable, "-m", "aespa_nb"]
    options = [model, "--preset", preset, *OPTIONS]
    said = measured([*command, "plan", *options, "--json"])[0]
    plan = json.loads(said.splitlines()[-1])
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    _, cpu, seconds, peak = measured([*command, "quantize", *options, "--out", str(out)])
    disk = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    shutil.rmtree(out)
    planned = dict(cpu=plan["cpu"], seconds=plan["seconds"], peak=plan["peak"], disk=plan["rows"][-1]["disk"])
    happened = dict(cpu=cpu, seconds=seconds, peak=peak, disk=disk)
    return dict(model=name, preset=preset, planned=planned, measured=happened, trial_seconds=plan["trial_seconds"])


def stored():
    "The runs that are known."
    return json.loads(STORED.read_text()) if STORED.exists() else []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    parser.add_argument("--models", nargs="+", default=["reference", "ten times"])
    parser.add_argument("--work", type=Path, default=Path("build/plan"), help="keeps the larger model")
    args = parser.parse_args()
    large = args.work / "large"
    if not (large / "model.safetensors.index.json").exists():
        large.mkdir(parents=True, exist_ok=True)
        make(large)
    for name, preset in itertools.product(args.models, args.presets):
        if any((r["model"], r["preset"]) == (name, preset) for r in stored()):
            continue
        new = row(name, "reference" if name == "reference" else f"./{large}", preset, args.work)
        STORED.write_text(json.dumps([*stored(), new], indent=1) + "\n")
        p, m = new["planned"], new["measured"]
        ratios = "  ".join(f"{k} {p[k] / m[k]:.2f}" for k in m)
        print(f"{name:10s} {preset:6s} planned / measured: {ratios}   ({m['cpu']:.0f} CPU seconds)", flush=True)


if __name__ == "__main__":
    main()
