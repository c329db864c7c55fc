"""What runs cost, and how well that is foretold: the records of the chapters on cost, memory and several processes.

    python experiments/cost.py growth       seconds and memory against tokens and blocks; nbs/runs/cost.json
    python experiments/cost.py estimates    the estimate beside what happens; nbs/runs/plan.json
    python experiments/cost.py loading      a checkpoint of 1 GB, held in memory and mapped; nbs/runs/loading.json
    python experiments/cost.py processes    1, 2 and 4 processes on one block; nbs/runs/scale.json

Some minutes each, on one thread. MALLOC_MMAP_THRESHOLD_=262144 (`make records` sets it) gives freed arrays back to the
system at once, so that a peak of memory is the algorithm's and not the allocator's.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time

import torch
from aespa_nb import AespaConfig, evaluate_model, load_reference, quantize_model
from aespa_nb.experiments.cost import count_work, estimate_run, random_model
from aespa_nb.model.checkpoint import load_checkpoint
from aespa_nb.model.memory import resident, sampled
from aespa_nb.model.phases import timed
from aespa_nb.model.team import joined
from common import ROOT, RUNS, fresh, stamp, write_record
from transformers import LlamaConfig, LlamaForCausalLM

PRESETS = ("gptq", "aespa", "best")
POINTS = [  # blocks, sequences, their length, shape
    *((1, n, 128, "medium") for n in (8, 16, 32, 64)),
    *((n, 8, 128, "small") for n in (1, 2, 4)),
    *((1, 4096 // n, n, "medium") for n in (64, 256, 512)),  # 4096 tokens in all
]


def random_tokens(seqs, seqlen, seed=0, words=256):
    return torch.randint(0, words, (seqs, seqlen), generator=torch.Generator().manual_seed(seed))


def growth_point(preset, blocks, seqs, seqlen, shape):
    "One run of random blocks, in numbers; of one of the runs also the operations."
    tokens, config = random_tokens(seqs, seqlen), AespaConfig.preset(preset, bits=2, iterations=50)
    row = dict(preset=preset, blocks=blocks, seqs=seqs, seqlen=seqlen, shape=shape, made=stamp(config))
    with timed(time.thread_time) as seconds:
        report = quantize_model(random_model(shape, blocks, seqlen), tokens, config)
    row |= dict(seconds=sum(seconds.values()), peak_bytes=report.peak_bytes, phases=seconds)
    if (preset, seqlen) == ("best", 256):
        row["flops"] = count_work(random_model(shape, blocks, seqlen), tokens, config)
    return row


def growth():
    "Every point is a process of its own, so that none inherits memory from another."
    for preset in PRESETS:
        growth_point(preset, 1, 1, 128, "tiny")  # loads and compiles what the others would
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        rows = pool.starmap(growth_point, [(preset, *point) for preset in PRESETS for point in POINTS], chunksize=1)
    write_record(RUNS / "cost.json", rows)


def held_against(name, model, tokens, heldout, preset):
    "The estimate beside what happens; the model is used up."
    config = AespaConfig.preset(preset, 4, iterations=200)
    said = estimate_run(model, tokens, config, heldout, clock=time.process_time)
    start = time.process_time()
    with sampled(lambda: resident().private) as highest, tempfile.TemporaryDirectory() as folder:
        evaluate_model(model, heldout)
        quantize_model(model, tokens, config, journal=folder)
        evaluate_model(model, heldout, model)
    happened = dict(seconds=time.process_time() - start, memory=highest[0])
    estimate = dict(seconds=sum(said.seconds.values()), memory=said.memory_bytes)
    found = dict(model=name, preset=preset, trial=said.trial_seconds, estimate=estimate, happened=happened)
    return found | dict(made=stamp(config))


def estimates():
    "On the bundled model and on a smaller one with random weights: 32 sequences, 200 steps of Adam."
    rows = []
    for preset in PRESETS:
        model, _, calib, heldout = load_reference()
        rows.append(held_against("bundled", model, calib[:32], heldout[:32], preset))
        tokens = random_tokens(32, 256), random_tokens(32, 256, seed=1)
        rows.append(held_against("random", random_model("small", 8, 256), *tokens, preset))
    write_record(RUNS / "plan.json", rows)


# --- a large checkpoint ---------------------------------------------------------------------------------------------

LARGE = ROOT / "build/big"  # kept for the next time; the temporary folder (TMPDIR) needs its size once more


def make_large(size=10**9, n_blocks=24):
    "A LLaMA checkpoint of about `size` bytes in bfloat16, in shards."
    width = int((size / 2 / n_blocks / 12) ** 0.5) // 128 * 128
    inner = (size // 2 // n_blocks - 4 * width**2) // (3 * width) // 64 * 64
    shape = dict(hidden_size=width, intermediate_size=inner, num_attention_heads=width // 128, vocab_size=2048)
    model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=n_blocks)).bfloat16()
    model.save_pretrained(LARGE, max_shard_size=size // 8)


def load_and_round(way):
    "One run in this process, printed as a dictionary of numbers; ten times a second what is resident."
    start, samples = time.perf_counter(), []
    now = lambda: samples.append((round(time.perf_counter() - start, 1), *(n >> 20 for n in resident()[:2]))) or 0
    with sampled(now, every=0.1):
        model, _ = load_checkpoint(str(LARGE))
        if way == "in memory":
            for p in model.parameters():
                p.data = p.data.clone()
        report = quantize_model(model, random_tokens(2, 128, words=2048), AespaConfig.preset("rtn", 4))
    sizes = dict(peak=resident().peak, statistics=report.statistics_bytes, block=report.block_bytes)
    found = dict(way=way, **{f"{k}_MiB": n >> 20 for k, n in sizes.items()})
    print(json.dumps(found | dict(samples=samples[:: len(samples) // 150 + 1])))


def loading():
    "Both ways, each in a fresh process."
    if not (LARGE / "config.json").exists():
        make_large()
    runs = [fresh(__file__, "load_and_round", way) for way in ("in memory", "mapped")]
    size = sum(f.stat().st_size for f in LARGE.glob("*.safetensors")) >> 20
    made = stamp(AespaConfig.preset("rtn", 4))
    write_record(RUNS / "loading.json", dict(made=made, checkpoint_MiB=size, runs=runs))


# --- several processes ----------------------------------------------------------------------------------------------

SHARED, SAMPLES = ("gptq", "best"), 32


def share(file):
    "One process: a short run that loads and compiles, then each preset; the first process writes what all found."

    def quantize(preset, samples):
        model, _, calib, _ = load_reference()
        model.model.layers = model.model.layers[:1]
        model.config.num_hidden_layers = 1
        report = quantize_model(model, calib[:samples], AespaConfig.preset(preset), team=team)
        layers = report.layers.values()
        return torch.cat([layer.codes.flatten() for layer in layers]), sum(layer.loss for layer in layers)

    with joined() as team:
        quantize("best", 8)
        row, codes = dict(processes=team.size), {}
        for preset in SHARED:
            clock, processor = time.perf_counter(), time.process_time()
            mine, loss = quantize(preset, SAMPLES)
            clock, processor = time.perf_counter() - clock, time.process_time() - processor
            busiest = max(team.broadcast(processor, rank) for rank in range(team.size))
            row[preset] = dict(clock=clock, processor=busiest, loss=loss)
            codes[preset] = team.broadcast(mine)
            assert torch.equal(codes[preset], mine), "the processes end with other codes"
        if team.rank == 0:
            torch.save((codes, row), file)


def processes():
    """Seconds of the clock, and of the processor: where processes have to share cores, the clock says what was gained
    and the processor's seconds of the busiest process what cores of their own could."""
    found, load = [], os.getloadavg()[0]
    for n in (1, 2, 4):
        with tempfile.NamedTemporaryFile() as file:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
            subprocess.run([*launch, __file__, "share", file.name], check=True)
            found.append(torch.load(file.name))
        codes, row = found[-1]
        for preset in SHARED:
            row[preset]["other_codes"] = (codes[preset] != found[0][0][preset]).double().mean().item()
        print(row, flush=True)
    run = dict(cores=os.cpu_count(), load=load, samples=SAMPLES, presets=list(SHARED))
    write_record(RUNS / "scale.json", dict(made=stamp(run), run=run, rows=[row for _, row in found]))


if __name__ == "__main__":
    name, *words = sys.argv[1:]
    globals()[name](*words)
