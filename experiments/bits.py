"""An hour on one core, for the chapter on bit allocation, to nbs/runs/bits.json.

An average of bits, shared out by `allocate_bits`, on the bundled model; whole numbers also uniformly.
"""

import functools
import itertools
from dataclasses import replace

from aespa_nb import AespaConfig, load_reference
from aespa_nb.model.blocks import weight_of
from aespa_nb.quantize.bit_allocation import allocate_bits, predicted_losses
from common import SAMPLES, resume, rounded

BUDGETS, WAYS = (2.5, 3, 3.5, 4), ("uniform", "allocated")
reference = load_reference()


@functools.cache
def predicted(config) -> dict:
    "The losses that the rehearsal predicts, layer by layer."
    return predicted_losses(reference.model, reference.calib, config)


@functools.cache
def recipe(preset, group_size, seed):
    return AespaConfig.preset(preset, 3, group_size=group_size, seed=seed, samples=SAMPLES)


def run(job):
    config, more = recipe(job["preset"], job["group_size"], job["seed"]), {}
    if job["how"] == "uniform":
        config = replace(config, bits=int(job["budget"]))
    else:
        losses = predicted(config)
        sizes = {name: weight_of(reference.model, name).numel() for name in losses}
        bits = allocate_bits(losses, sizes, job["budget"])
        more = dict(predicted=sum(losses[name][b] for name, b in bits.items()), bits=bits)
        config = replace(config, keep=bits)
    _, report, row = rounded(reference, config)
    return dict(bits_per_weight=report.bits_per_weight, **more, **row)


choices = dict(seed=(0, 1), group_size=(None, 64), preset=("gptq", "best"), how=WAYS, budget=BUDGETS)
jobs = [dict(zip(choices, job)) for job in itertools.product(*choices.values())]
resume("bits", [job for job in jobs if job["how"] == "allocated" or job["budget"] % 1 == 0], run)
