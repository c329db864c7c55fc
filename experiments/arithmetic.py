"""The same run with other arithmetic, for the chapter on faults, to nbs/runs/arithmetic.json: half an hour on one core.

A processor with wider registers, or a GPU, adds the same numbers in another order. Here a run is repeated with the
instructions of older and newer x86-64 processors, with statistics and solving in double precision, and on other
calibration sequences; what is counted is how many codes change, and how far the model's KL divergence moves.
"""

import argparse
import copy
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from aespa_nb import AespaConfig, evaluate_model, load_reference, quantize_model
from aespa_nb.quantize.journal import write_json
from rich.progress import track
from safetensors.torch import load_file, save_file

RESULTS = Path(__file__).parents[1] / "nbs/runs/arithmetic.json"
PRESETS, BITS, SAMPLES, WINDOWS = ("gptq", "best"), (2, 3), 64, 128
# what torch, MKL, oneDNN, OpenBLAS and numba may use
ALLOWED = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "OPENBLAS_CORETYPE", "NUMBA_CPU_NAME")
WIDE = dict(zip(ALLOWED, ("avx512", "AVX512", "AVX512_CORE", "SkylakeX", "skylake-avx512")))
MIDDLE = dict(zip(ALLOWED, ("avx2", "AVX2", "AVX2", "Haswell", "haswell")))
OLD = dict(zip(ALLOWED, ("default", "COMPATIBLE", "SSE41", "Nehalem", "nehalem")))
WAYS = {  # the first is what the others are compared with
    "AVX2": (MIDDLE, {}),
    "AVX-512": (WIDE, {}),
    "SSE": (OLD, {}),
    "float64": (MIDDLE, dict(dtype="float64")),
    "other sequences": (MIDDLE, dict(seed=1)),
    "yet others": (MIDDLE, dict(seed=2)),
}


def one(preset: str, bits: int, changes: dict, out: str) -> None:
    "Rounds and measures the bundled model in this process; codes and KL go to `out`."
    torch.set_num_threads(1)
    full, _, calib, heldout = load_reference()
    model = copy.deepcopy(full)
    changes |= {"dtype": getattr(torch, changes["dtype"])} if "dtype" in changes else {}
    config = AespaConfig.preset(preset, bits, samples=SAMPLES, **changes)
    report = quantize_model(model, calib, config)
    codes = torch.cat([layer.codes.flatten() for layer in report.layers.values()])
    kl = evaluate_model(model, heldout[:WINDOWS], full).kl
    save_file(dict(codes=codes, kl=torch.tensor(kl, dtype=torch.float64)), out)


def measured(preset: str, bits: int, way: str, folder: str) -> dict:
    "What `one` finds in a process with the arithmetic of `way`."
    environment, changes = WAYS[way]
    out = f"{folder}/found"
    words = [sys.executable, __file__, "--one", json.dumps([preset, bits, changes, out])]
    subprocess.run(words, env=os.environ | environment | {"OMP_NUM_THREADS": "1"}, check=True)
    return load_file(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    if (args := parser.parse_args()).one:
        return one(*json.loads(args.one))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for preset, bits in track(list(itertools.product(PRESETS, BITS)), "presets"):
            found = {way: measured(preset, bits, way, folder) for way in WAYS}
            first = next(iter(found.values()))
            for way, x in found.items():
                changed = (x["codes"] != first["codes"]).float().mean().item()
                rows.append(dict(preset=preset, bits=bits, way=way, changed=changed, kl=x["kl"].item()))
                print(rows[-1], flush=True)
    settings = dict(samples=SAMPLES, windows=WINDOWS)
    write_json(RESULTS, dict(settings=settings, torch=torch.__version__, rows=rows))


if __name__ == "__main__":
    main()
