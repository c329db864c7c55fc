"""The same run with other arithmetic, for the chapter on faults, to nbs/runs/arithmetic.json: half an hour on one core.

A processor with wider registers, or a GPU, adds the same numbers in another order. Here a run is repeated with the
instructions of older and newer x86-64 processors, with statistics and solving in double precision, and on other
calibration sequences; what is counted is how many codes change, and how far the model's KL divergence moves.
"""

import json
import os
import sys
import tempfile

import torch
from aespa_nb import AespaConfig, load_reference
from common import SAMPLES, fresh, resume, rounded
from safetensors.torch import load_file, save_file

# what torch, MKL, oneDNN, OpenBLAS and numba may use
ALLOWED = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "OPENBLAS_CORETYPE", "NUMBA_CPU_NAME")
WIDE = ("avx512", "AVX512", "AVX512_CORE", "SkylakeX", "skylake-avx512")
MIDDLE = ("avx2", "AVX2", "AVX2", "Haswell", "haswell")
OLD = ("default", "COMPATIBLE", "SSE41", "Nehalem", "nehalem")
WAYS = {  # the first is what the others are compared with
    "AVX2": (MIDDLE, {}),
    "AVX-512": (WIDE, {}),
    "SSE": (OLD, {}),
    "float64": (MIDDLE, dict(dtype="float64")),
    "other sequences": (MIDDLE, dict(seed=1)),
    "yet others": (MIDDLE, dict(seed=2)),
}


def one(preset, bits, changes, out):
    "Rounds and measures the bundled model in this process; codes go to `out`, scores to standard output."
    changes |= {"dtype": getattr(torch, changes["dtype"])} if "dtype" in changes else {}
    config = AespaConfig.preset(preset, bits, samples=SAMPLES, **changes)
    _, report, row = rounded(load_reference(), config)
    save_file(dict(codes=torch.cat([layer.codes.flatten() for layer in report.layers.values()])), out)
    print(json.dumps(row))


def measured(job):
    "What `one` finds in a process with this arithmetic, beside what it finds with the first."
    allowed, changes = WAYS[job["way"]]
    name = f"{folder}/{job['preset']}-{job['bits']}-"
    words = json.dumps([job["preset"], job["bits"], changes, name + job["way"]])
    found = fresh(__file__, words, **dict(zip(ALLOWED, allowed)))
    first = name + next(iter(WAYS))
    if not os.path.exists(first):
        measured(job | dict(way=next(iter(WAYS))))
    codes, before = (load_file(f)["codes"] for f in (name + job["way"], first))
    return dict(changed=(codes != before).float().mean().item(), kl=found["kl"], made=found["made"])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        one(*json.loads(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            jobs = [dict(preset=p, bits=b, way=w) for p in ("gptq", "best") for b in (2, 3) for w in WAYS]
            resume("arithmetic", jobs, measured, whole=True)
