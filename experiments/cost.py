"""What runs cost, and how well that is foretold: the records that the chapter on cost shows.

    OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=262144 python experiments/cost.py growth      nbs/runs/cost.json
    OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=262144 python experiments/cost.py estimates   nbs/runs/plan.json

Some minutes each. Times are those of one thread; the second variable gives freed arrays back to the system at once, so
that a peak of memory is the algorithm's and not the allocator's.
"""

import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import torch
from aespa_nb import AespaConfig, evaluate_model, load_reference, quantize_model
from aespa_nb.experiments.cost import count_work, estimate_run, random_model
from aespa_nb.model.memory import resident, sampled
from aespa_nb.model.phases import timed

PRESETS = ("gptq", "aespa", "best")
POINTS = [  # blocks, sequences, their length, shape
    *((1, n, 128, "medium") for n in (8, 16, 32, 64)),
    *((n, 8, 128, "small") for n in (1, 2, 4)),
    *((1, 4096 // n, n, "medium") for n in (64, 256, 512)),  # 4096 tokens in all
]


def random_tokens(seqs, seqlen, seed=0):
    return torch.randint(0, 256, (seqs, seqlen), generator=torch.Generator().manual_seed(seed))


def growth_point(preset, blocks, seqs, seqlen, shape):
    "One run of random blocks, in numbers; of one of the runs also the operations."
    tokens, config = random_tokens(seqs, seqlen), AespaConfig.preset(preset, bits=2, iterations=50)
    row = dict(preset=preset, blocks=blocks, seqs=seqs, seqlen=seqlen, shape=shape)
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
        return pool.starmap(growth_point, [(preset, *point) for preset in PRESETS for point in POINTS], chunksize=1)


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
    return dict(model=name, preset=preset, trial=said.trial_seconds, estimate=estimate, happened=happened)


def estimates():
    "On the bundled model and on a smaller one with random weights: 32 sequences, 200 steps of Adam."
    rows = []
    for preset in PRESETS:
        model, _, calib, heldout = load_reference()
        rows.append(held_against("bundled", model, calib[:32], heldout[:32], preset))
        tokens = random_tokens(32, 256), random_tokens(32, 256, seed=1)
        rows.append(held_against("random", random_model("small", 8, 256), *tokens, preset))
    return rows


if __name__ == "__main__":
    path, measure = {"growth": ("cost.json", growth), "estimates": ("plan.json", estimates)}[sys.argv[1]]
    (Path("nbs/runs") / path).write_text(json.dumps(measure(), indent=1) + "\n")
