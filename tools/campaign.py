"""Long measurements behind the chapters: `make campaign`, hours on one core. Runs that are on record are not repeated.

Each run quantizes the bundled model on 64 calibration sequences, one CPU thread, and is measured on the first 128
held-out windows. One JSON record per run goes to nbs/runs/campaign.json; the chapters draw their tables from there.
"""

import argparse
import copy
import json
import os
import platform
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from aespa_nb import AespaConfig, evaluate_model, load_reference, quantize_model

RESULTS = Path("nbs/runs/campaign.json")
SAMPLES, WINDOWS = 64, 128

# (name, preset, changes): what the ablation chapter compares. The first six change objective and solver alone.
ABLATIONS = [
    *(
        (f"{objective}, {solver}", "gptq", dict(objective=objective, solver=solver))
        for objective in ("layer", "attention", "gauss-newton")
        for solver in ("gptq", "descent")
    ),
    ("damping 0.05", "gptq", dict(objective="gauss-newton", solver="descent", damping=0.05)),
    ("full-precision target", "gptq", dict(objective="gauss-newton", solver="descent", damping=0.05, correction=0.8)),
    ("best", "best", {}),
    ("best, layer-wise objective", "best", dict(objective="layer")),
    ("best, the paper's objective", "best", dict(objective="attention")),
    ("best, damping 0.01", "best", dict(damping=0.01)),
    ("best, damping 0.1", "best", dict(damping=0.1)),
    ("best, no target", "best", dict(correction=0.0)),
    ("best, whole drift undone", "best", dict(correction=1.0)),
    ("best, one start", "best", dict(starts=1)),
    ("best, six starts", "best", dict(starts=6)),
    ("best, Z-Fold", "best", dict(zfold=True)),
    ("max", "max", {}),
]
PRESETS = [(name, name, {}) for name in ("rtn", "gptq", "best", "max", "adaround", "aespa")]


def plan(which: str):
    "Runs in the order of their weight: (group, name, bits, group_size, seed, preset, changes)."
    if which == "ablations":
        for seed in (0, 1):
            yield from (("ablations", n, 2, None, seed, p, c) for n, p, c in ABLATIONS)
        return
    for seed in (0, 1, 2):
        for group_size in (None, 64):
            for bits in (2, 3, 4):
                yield from (("presets", n, bits, group_size, seed, p, c) for n, p, c in PRESETS)


def load() -> list[dict]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def save(record: dict) -> None:
    "Adds a record: the file is written beside the old one, then takes its place."
    new = RESULTS.with_suffix(".new")
    new.write_text(json.dumps([*load(), record], indent=1))
    new.replace(RESULTS)


def run(reference, group, name, bits, group_size, seed, preset, changes) -> dict:
    config = AespaConfig.preset(preset, bits, group_size=group_size, seed=seed, samples=SAMPLES, **changes)
    model = copy.deepcopy(reference.model)
    start = time.process_time()
    report = quantize_model(model, reference.calib, config)
    seconds = time.process_time() - start
    scores = evaluate_model(model, reference.heldout[:WINDOWS], reference.model)
    measured = dict(**scores._asdict(), cpu_seconds=seconds, peak_MiB=report.peak_bytes / 2**20)
    versions = dict(torch=torch.__version__, python=platform.python_version(), threads=torch.get_num_threads())
    what = dict(group=group, name=name, bits=bits, group_size=group_size, seed=seed, preset=preset)
    return dict(**what, changes=changes, **measured, **versions)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("ablations", "presets"))
    parser.add_argument("--bits", type=int, nargs="+", help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these")
    parser.add_argument("--names", nargs="+", help="only these")
    args = parser.parse_args()
    torch.set_num_threads(1)
    reference = load_reference()
    keys = ("group", "name", "bits", "group_size", "seed")
    for item in plan(args.which):
        chosen = zip((item[2], item[4], item[1]), (args.bits, args.seeds, args.names))
        if any(wanted and value not in wanted for value, wanted in chosen):
            continue
        if item[:5] in {tuple(r[k] for k in keys) for r in load()}:
            continue
        record = run(reference, *item)
        save(record)
        print(*item[:5], f"KL {record['kl']:.4f}  {record['cpu_seconds']:.0f} CPU s", flush=True)


if __name__ == "__main__":
    main()
