"""Measure again what is stale in nbs/runs: `make records`, or only some: `python experiments/records.py bits texts`.

`--list` names the stale records with the reason, and runs nothing. A record that is only partly stale is only partly
measured again; what is still good costs nothing.
"""

import argparse
import os
import subprocess
import sys

from common import ROOT, RUNS, stale

HERE = "experiments"
METHODS = "rtn awq omniquant affinequant gptq gptaq zfold turboboa adaround brecq signround aespa best max".split()
COMPARE = ["-m", "aespa_nb", "compare"]
SAMPLED = "--samples 64 --eval-samples 128".split()
DEMO = """import json; from aespa_nb.experiments.records import *; found = json.load(open("build/demo/results.json"))
write_record("nbs/runs/demo.json", found | dict(made=stamp(found["run"]["options"])))"""
ENV = os.environ | dict(OMP_NUM_THREADS="1", MALLOC_MMAP_THRESHOLD_="262144")  # peaks of memory are the algorithm's
AT_ONCE = "compare-reference compare-symmetric compare-opt demo cost plan scale loading".split()  # not row by row
OWNERS = {  # record -> the commands that make it, as words behind `python`
    "compare-reference": [[*COMPARE, "reference", "--presets", *METHODS, *"--bits 2 3 4 --group-sizes 0 64".split(),
                           *"--seeds 0 1 2".split(), *SAMPLED, "--out", "nbs/runs/compare-reference"]],
    "compare-symmetric": [[*COMPARE, "reference", "--presets", "best", "max", *"--bits 2 3 --group-sizes 64".split(),
                           *SAMPLED, "--symmetric", "--out", "nbs/runs/compare-symmetric"]],
    "compare-opt": [[*COMPARE, "build/opt/final", "--presets", "rtn", "gptq", "zfold", "turboboa", "awq", "brecq",
                     "aespa", "best", "max", *"--bits 2 3".split(), *SAMPLED, "--out", "nbs/runs/compare-opt"]],
    "demo": [["-m", "aespa_nb", "demo", "--out", "build/demo"], ["-c", DEMO]],
    "campaign": [[f"{HERE}/campaign.py", "ablations"]],
    "layers": [[f"{HERE}/campaign.py", "layers"]],
    "precompute": [[f"{HERE}/campaign.py", "precompute"]],
    "faults": [[f"{HERE}/faults.py", *words.split()] for words in (
        "kills --count 300", "kills --count 100 --ranks 2", "disk --count 30")],
    **{name: [[f"{HERE}/{name}.py"]] for name in (
        "bits", "texts", "arithmetic", "families", "formats", "hostile", "torture", "pays", "smollm2", "llama_cpp",
        "situations", "chat")},
    "attention": [[f"{HERE}/pays.py", "attention"]],
    **{name: [[f"{HERE}/cost.py", word]] for name, word in dict(
        cost="growth", plan="estimates", loading="loading", scale="processes").items()},
    "peers": [],  # each needs an environment of its own: experiments/peers/run.py
}  # fmt: skip


def reasons() -> dict[str, str]:
    "Each stale record, by its path below nbs/runs, and why. (`setting.json` says what a folder's records share.)"
    paths = [p for p in sorted(RUNS.rglob("*.json")) if p.name != "setting.json"]
    return {p.relative_to(RUNS).as_posix(): why for p in paths if (why := stale(p))}


def owner(path: str) -> str:
    return path.split("/")[0].removesuffix(".json")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only these (default: all)")
    parser.add_argument("--list", action="store_true", help="only name them")
    args = parser.parse_args()
    found = {path: why for path, why in reasons().items() if not args.names or owner(path) in args.names}
    print(*(f"{path}: {why}" for path, why in found.items()), sep="\n", flush=True)
    for name in dict.fromkeys(map(owner, found)) if not args.list else ():
        if not OWNERS[name]:
            print(f"{name}: not made by a command without questions; see its chapter, or experiments/peers/run.py")
        for path in [path for path in found if owner(path) == name] if name in AT_ONCE else ():
            (RUNS / path).unlink()  # these commands measure what is not there; git has the old one
        for words in OWNERS[name]:
            subprocess.run([sys.executable, *words], cwd=ROOT, check=True, env=ENV)
