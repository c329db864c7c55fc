"""An hour on one core, for the chapter on bit allocation, to nbs/runs/bits.json.

An average of bits, shared out by `allocate_bits`, on the bundled model; whole numbers also uniformly.
"""

import argparse
import functools
import itertools
from dataclasses import replace

from aespa_nb import AespaConfig, load_reference
from aespa_nb.model.blocks import weight_of
from aespa_nb.quantize.bit_allocation import allocate_bits, predicted_losses
from common import SAMPLES, resume, rounded

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--presets", nargs="+", default=["gptq", "best"])
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
parser.add_argument("--group-sizes", type=int, nargs="+", default=[0, 64], help="0: the whole row")
parser.add_argument("--budgets", type=float, nargs="+", default=[2.5, 3, 3.5, 4])
args = parser.parse_args()
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


jobs = itertools.product(args.seeds, args.group_sizes, args.presets, ("uniform", "allocated"), args.budgets)
keys = ("seed", "group_size", "preset", "how", "budget")
jobs = [dict(zip(keys, (s, g or None, *rest))) for s, g, *rest in jobs if rest[1] == "allocated" or rest[2] % 1 == 0]
resume("bits", jobs, run)
