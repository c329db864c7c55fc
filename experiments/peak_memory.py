"""How much memory a checkpoint takes that is quantized in a fresh process: held in memory, and mapped.

    python experiments/peak_memory.py FOLDER [--gigabytes 1]

Writes nbs/runs/loading.json, which the chapter on memory draws. FOLDER keeps the checkpoint for the next time; the
temporary folder (TMPDIR) needs its size once more.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from aespa_nb import AespaConfig, quantize_model
from aespa_nb.experiments.records import stamp, write_record
from aespa_nb.model.checkpoint import load_checkpoint
from aespa_nb.model.memory import resident
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

STORED, CONFIG = Path("nbs/runs/loading.json"), AespaConfig.preset("rtn", 4)


def make(folder, size, n_blocks=24, n_shards=8):
    "A LLaMA checkpoint of about `size` bytes in bfloat16, one shard in memory at a time: ones for norms, else noise."
    width = int((size / 2 / n_blocks / 12) ** 0.5) // 128 * 128
    inner = (size // 2 // n_blocks - 4 * width**2) // (3 * width) // 64 * 64
    shape = dict(hidden_size=width, intermediate_size=inner, num_attention_heads=width // 128)
    config = LlamaConfig(**shape, num_hidden_layers=n_blocks, vocab_size=2048, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in LlamaForCausalLM(config).state_dict().items()}
    rng, names, weight_map, kind = torch.Generator().manual_seed(0), list(shapes), {}, torch.bfloat16
    noise = lambda shape: torch.randn(shape, generator=rng, dtype=kind) * shape[1] ** -0.5
    draw = lambda shape: noise(shape) if len(shape) > 1 else torch.ones(shape, dtype=kind)
    for i in range(n_shards):
        part = names[len(names) * i // n_shards : len(names) * (i + 1) // n_shards]
        shard = f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
        save_file({name: draw(shapes[name]) for name in part}, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def work(folder, way):
    "One run in this process, as a dictionary of numbers; ten times a second what is resident."
    start, samples = time.perf_counter(), []

    def watch():
        while True:
            samples.append((round(time.perf_counter() - start, 1), *(n >> 20 for n in resident()[:2])))
            time.sleep(0.1)

    threading.Thread(target=watch, daemon=True).start()
    model, _ = load_checkpoint(str(folder))
    if way == "in memory":
        for p in model.parameters():
            p.data = p.data.clone()
    tokens = torch.randint(0, 2048, (2, 128), generator=torch.Generator().manual_seed(0))
    report = quantize_model(model, tokens, CONFIG)
    sizes = dict(peak=resident().peak, statistics=report.statistics_bytes, block=report.block_bytes)
    return dict(way=way, **{f"{k}_MiB": n >> 20 for k, n in sizes.items()}, samples=samples[:: len(samples) // 150 + 1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=1)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        return print(json.dumps(work(args.folder, args.way)))
    if not (args.folder / "config.json").exists():
        make(args.folder, int(args.gigabytes * 1e9))
    words, runs = [sys.executable, __file__, str(args.folder), "--way"], []
    for way in ("in memory", "mapped"):
        done = subprocess.run([*words, way], stdout=subprocess.PIPE, text=True, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
        print({k: v for k, v in runs[-1].items() if k != "samples"}, flush=True)
    size = sum(f.stat().st_size for f in args.folder.glob("*.safetensors")) >> 20
    write_record(STORED, dict(made=stamp(CONFIG), checkpoint_MiB=size, runs=runs))


if __name__ == "__main__":
    main()
