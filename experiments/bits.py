"""The measurements behind the chapter on bit allocation, to nbs/runs/bits.json: an hour on one core. Runs on record are not repeated.

An average of bits, shared out by `allocate_bits`, on the bundled model: 64 calibration sequences, first 128 held-out
windows, as in tools/campaign.py. A whole number is run uniformly too, unless the campaign has done so.
"""

import argparse
import copy
import json
from dataclasses import replace
from pathlib import Path

import torch
from aespa_nb import AespaConfig, evaluate_model, load_reference, quantize_model
from aespa_nb.quantize.bit_allocation import allocate_bits, predicted_losses
from aespa_nb.model.blocks import weight_of
from campaign import SAMPLES, WINDOWS, load

RESULTS = Path("nbs/runs/bits.json")
KEYS = ("preset", "budget", "group_size", "seed", "how")


def records() -> list[dict]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def measure(reference, config, what: dict, **more) -> None:
    "Quantizes, measures and adds a record."
    model = copy.deepcopy(reference.model)
    report = quantize_model(model, reference.calib, config)
    scores = evaluate_model(model, reference.heldout[:WINDOWS], reference.model)
    record = dict(**what, **scores._asdict(), bits_per_weight=report.bits_per_weight, **more)
    new = RESULTS.with_suffix(".new")
    new.write_text(json.dumps([*records(), record], indent=1))
    new.replace(RESULTS)
    print(*what.values(), f"KL {scores.kl:.4f}", flush=True)


def known(what: dict) -> bool:
    "Whether this run is on record, here or in the campaign."
    uniform = {(r["name"], r["bits"], r["group_size"], r["seed"]) for r in load() if r["group"] == "presets"}
    here = {tuple(r[k] for k in KEYS) for r in records()}
    return tuple(what.values()) in here or (what["how"] == "uniform" and tuple(what.values())[:4] in uniform)


def work(reference, preset: str, group_size: int | None, seed: int, budgets: list[float]) -> None:
    "All budgets of one preset."
    config = AespaConfig.preset(preset, 3, group_size=group_size, seed=seed, samples=SAMPLES)
    runs = [dict(preset=preset, budget=b, group_size=group_size, seed=seed, how="allocated") for b in budgets]
    for what in (w | dict(how="uniform") for w in runs if w["budget"] % 1 == 0):
        if not known(what):
            measure(reference, replace(config, bits=int(what["budget"])), what)
    runs = [what for what in runs if not known(what)]
    losses = predicted_losses(reference.model, reference.calib, config) if runs else {}
    sizes = {name: weight_of(reference.model, name).numel() for name in losses}
    for what in runs:
        bits = allocate_bits(losses, sizes, what["budget"])
        predicted = sum(losses[name][b] for name, b in bits.items())
        measure(reference, replace(config, keep=bits), what, predicted=predicted, bits=bits)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["gptq", "best"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[0, 64], help="0: the whole row")
    parser.add_argument("--budgets", type=float, nargs="+", default=[2.5, 3, 3.5, 4])
    args = parser.parse_args()
    torch.set_num_threads(1)
    reference = load_reference()
    for seed in args.seeds:
        for group_size in args.group_sizes:
            for preset in args.presets:
                work(reference, preset, group_size or None, seed, args.budgets)


if __name__ == "__main__":
    main()
