"""How much memory a checkpoint takes that is quantized in fresh processes: held in memory, and mapped.

    python tools/big_checkpoint.py FOLDER            2 GB of random weights, rtn; prints numbers
    python tools/big_checkpoint.py FOLDER --write    also into nbs/runs/loading.json, which the chapter on memory draws

FOLDER keeps the checkpoint for the next time; it and the temporary folder (TMPDIR) need three times the size on disk.
"""

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from aespa_nb import AespaConfig, quantize_model
from aespa_nb.model.checkpoint import load_model, save_model
from aespa_nb.model.memory import resident
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

STORED = Path("nbs/runs/loading.json")
# On weights of this size the grid search takes long, and no memory that counts: gptq and best do without it.
RECIPES = {"rtn": dict(), "gptq": dict(grid="minmax"), "best": dict(grid="minmax", starts=1)}


def make(folder, size, n_blocks, n_shards=8):
    "A LLaMA checkpoint of about `size` bytes in bfloat16, written shard by shard."
    width = int((size / 2 / n_blocks / 12) ** 0.5) // 128 * 128
    inner = (size // 2 // n_blocks - 4 * width**2) // (3 * width) // 64 * 64
    shape = dict(hidden_size=width, intermediate_size=inner, num_attention_heads=width // 128)
    config = LlamaConfig(**shape, num_hidden_layers=n_blocks, vocab_size=2048, dtype="bfloat16")
    write_shards(folder, config, n_shards, draw)


def write_shards(folder, config, n_shards, draw):
    "A checkpoint of a LLaMA in shards, one of them in memory at a time; `draw(shape, rng)` makes its weights."
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in LlamaForCausalLM(config).state_dict().items()}
    rng, names, weight_map = torch.Generator().manual_seed(0), list(shapes), {}
    for i in range(n_shards):
        part = names[len(names) * i // n_shards : len(names) * (i + 1) // n_shards]
        shard = f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
        save_file({name: draw(shapes[name], rng) for name in part}, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def draw(shape, rng):
    "Random weights that keep the size of what runs through them; ones for a norm."
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, generator=rng, dtype=torch.bfloat16) * shape[1] ** -0.5


class Watch:
    "Notes the memory of this process ten times a second, and when each phase began."

    def __init__(self):
        self.start, self.samples, self.phases = time.perf_counter(), [], {}
        threading.Thread(target=self.run, daemon=True).start()

    def now(self):
        return round(time.perf_counter() - self.start, 1)

    def run(self):
        while True:
            self.samples.append((self.now(), *(n >> 20 for n in resident()[:2])))
            time.sleep(0.1)

    def phase(self, name):
        self.phases[name] = self.now()


def work(folder, out, way, preset, samples):
    "One run in this process, as a dictionary of numbers."
    watch = Watch()
    watch.phase("load")
    model, _ = load_model(str(folder))
    if way == "in memory":
        for p in model.parameters():
            p.data = p.data.clone()
    watch.phase("quantize")
    tokens = torch.randint(0, 2048, (samples, 128), generator=torch.Generator().manual_seed(0))
    report = quantize_model(model, tokens, AespaConfig.preset(preset, 4, **RECIPES[preset]))
    watch.phase("save")
    save_model(model, out) if way == "mapped" else model.save_pretrained(out)
    watch.phase("end")
    samples = watch.samples[:: max(1, len(watch.samples) // 150)]
    peak = resident().peak >> 20
    memory = dict(peak_MiB=peak, statistics_MiB=report.statistics_bytes >> 20, block_MiB=report.block_bytes >> 20)
    return dict(preset=preset, way=way, **memory, phases=watch.phases, samples=samples)


def run(args, way, preset):
    "The numbers of `work` in a fresh process; what it saved is deleted."
    out = args.folder / "out"
    words = [sys.executable, __file__, args.folder, "--child", way, preset, "--samples", args.samples]
    done = subprocess.run([str(w) for w in words], stdout=subprocess.PIPE, text=True, check=True)
    shutil.rmtree(out)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--samples", type=int, default=2, help="sequences of 128 tokens")
    parser.add_argument("--runs", nargs="+", default=["rtn"], choices=RECIPES)
    parser.add_argument("--write", action="store_true", help=f"store the runs in {STORED}")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    checkpoint = args.folder / "checkpoint"
    if args.child:
        return print(json.dumps(work(checkpoint, args.folder / "out", *args.child, args.samples)))
    if not checkpoint.exists():
        make(checkpoint, int(args.gigabytes * 1e9), args.blocks)
    size = sum(f.stat().st_size for f in checkpoint.glob("*.safetensors")) >> 20
    print(f"{size} MiB of weights")
    runs = []
    for preset in args.runs:
        for way in ("in memory", "mapped"):
            runs.append(run(args, way, preset))
            r = runs[-1]
            sizes = f"{r['peak_MiB']:5d} MiB, of it statistics {r['statistics_MiB']} MiB"
            print(f"{preset:5s} {way:10s} peak {sizes}, phases {r['phases']}", flush=True)
    if args.write:
        STORED.write_text(json.dumps(dict(checkpoint_MiB=size, blocks=args.blocks, runs=runs)) + "\n")


if __name__ == "__main__":
    main()
