"""How much memory a checkpoint takes that is quantized in a fresh process: held in memory, and mapped.

    python experiments/peak_memory.py FOLDER

Writes nbs/runs/loading.json, which the chapter on memory draws. FOLDER keeps the checkpoint for the next time; the
temporary folder (TMPDIR) needs its size once more.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from aespa_nb import AespaConfig, quantize_model
from aespa_nb.model.checkpoint import load_checkpoint
from aespa_nb.model.memory import resident, sampled
from common import RUNS, fresh, stamp, write_record
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = AespaConfig.preset("rtn", 4)


def make(folder, size=10**9, n_blocks=24):
    "A LLaMA checkpoint of about `size` bytes in bfloat16, in shards."
    width = int((size / 2 / n_blocks / 12) ** 0.5) // 128 * 128
    inner = (size // 2 // n_blocks - 4 * width**2) // (3 * width) // 64 * 64
    shape = dict(hidden_size=width, intermediate_size=inner, num_attention_heads=width // 128, vocab_size=2048)
    model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=n_blocks)).bfloat16()
    model.save_pretrained(folder, max_shard_size=size // 8)


def work(folder, way):
    "One run in this process, as a dictionary of numbers; ten times a second what is resident."
    start, samples = time.perf_counter(), []
    now = lambda: samples.append((round(time.perf_counter() - start, 1), *(n >> 20 for n in resident()[:2]))) or 0
    with sampled(now, every=0.1):
        model, _ = load_checkpoint(str(folder))
        if way == "in memory":
            for p in model.parameters():
                p.data = p.data.clone()
        tokens = torch.randint(0, 2048, (2, 128), generator=torch.Generator().manual_seed(0))
        report = quantize_model(model, tokens, CONFIG)
    sizes = dict(peak=resident().peak, statistics=report.statistics_bytes, block=report.block_bytes)
    return dict(way=way, **{f"{k}_MiB": n >> 20 for k, n in sizes.items()}, samples=samples[:: len(samples) // 150 + 1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(work(args.folder, args.way)))
        sys.exit()
    if not (args.folder / "config.json").exists():
        make(args.folder)
    runs = [fresh(__file__, args.folder, "--way", way) for way in ("in memory", "mapped")]
    print(*({k: v for k, v in run.items() if k != "samples"} for run in runs), sep="\n")
    size = sum(f.stat().st_size for f in args.folder.glob("*.safetensors")) >> 20
    write_record(RUNS / "loading.json", dict(made=stamp(CONFIG), checkpoint_MiB=size, runs=runs))
