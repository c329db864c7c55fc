"""Quantize a model with a published package, in an environment of its own, and score what comes out.

    python experiments/peers/run.py auto-round --bits 2
    python experiments/peers/run.py auto-round --bits 3 --group-size 64 --recipe best --seed 1
    python experiments/peers/run.py auto-round --bits 2 --group-size 64 --model smollm2

The first run of a peer makes its environment, build/peers/<peer>, from requirements/<peer>.txt. The peer works on one
thread on the calibration sequences that aespa_nb draws with the same seed and writes the weights it has changed to
build/peers/out. We load them into a fresh model, check that every weight is on a grid of 2**bits levels, and measure
KL divergence and perplexity on held-out windows. The record is nbs/runs/peers.json.
"""

import argparse
import copy
import json
import os
import platform
import re
import subprocess
import sys
import venv
from pathlib import Path

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
BUILD, REFERENCE = ROOT / "build/peers", ROOT / "aespa_nb/reference"
RECIPES = json.loads((HERE / "recipes.json").read_text())
# For us and for the peers, before torch is imported. GPTQModel starts with two workers at least; what torch has
# compiled for a peer is there for its next run.
os.environ.update({f"{pool}_NUM_THREADS": "1" for pool in "OMP MKL OPENBLAS NUMEXPR NUMBA".split()})
os.environ.update(TORCHINDUCTOR_COMPILE_THREADS="1", GPTQMODEL_CPU_WORKERS="2", CUDA_VISIBLE_DEVICES="")
os.environ.update(TORCHINDUCTOR_CACHE_DIR=str(BUILD / "cache"))
sys.path += [str(ROOT / "experiments"), str(ROOT / "tools")]

import install  # noqa: E402
from aespa_nb import evaluate_model, load_reference  # noqa: E402
from aespa_nb.data.fetch import need_fetched  # noqa: E402
from aespa_nb.experiments.comparison import drawing  # noqa: E402
from aespa_nb.model.blocks import blocks_of, linears_of  # noqa: E402
from aespa_nb.quantize.journal import write_json  # noqa: E402
from common import SAMPLES, WINDOWS, resume, stamp, windows_of  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from smollm2 import TEXT  # noqa: E402


def requirements(peer):
    "What is to be installed; what stands in <peer>-alone.txt is installed without its dependencies."
    return "".join(path.read_text() for path in sorted(HERE.glob(f"requirements/{peer}*.txt"), reverse=True))


def environment(peer):
    "The Python of the peer's environment, which is made if it is missing or its requirements have changed."
    home, wanted = BUILD / peer, requirements(peer)
    made, alone = home / "requirements.txt", HERE / f"requirements/{peer}-alone.txt"
    if not (made.exists() and made.read_text() == wanted):
        print(f"Making {home}", flush=True)
        venv.create(home, with_pip=True, clear=True)
        install.VENV = home
        install.install_torch(re.search(r"^torch==\S+", wanted, flags=re.M)[0])
        install.pip("--quiet", "-r", HERE / f"requirements/{peer}.txt")
        alone.exists() and install.pip("--quiet", "--no-deps", "-r", alone)
        made.write_text(wanted)  # last: an environment that is cut short is made anew
    return home / "bin/python"


def texts(args):
    "The model, the calibration sequences that aespa_nb draws with the same seed, and the held-out windows."
    if args.model == "smollm2":
        return windows_of(args.model, *TEXT, args.seed)
    full = load_reference(folder=args.folder)
    return full._replace(calib=drawing(full.calib, args.samples)(args.seed), heldout=full.heldout[: args.eval_samples])


def quantize(args, calib):
    "Runs the adapter in the peer's environment; the weights that it has changed, and what it reports."
    name = f"{args.model or 'reference'}-{args.peer}-{args.recipe}-{args.bits}b-g{args.group_size or 0}-s{args.seed}"
    place = BUILD / "out" / name
    place.mkdir(parents=True, exist_ok=True)
    save_file({"tokens": calib.contiguous()}, place / "tokens")
    packages = re.findall(r"^([\w-]+)==", requirements(args.peer), flags=re.M)
    job = dict(peer=args.peer, bits=args.bits, group_size=args.group_size, seed=args.seed, model=str(args.folder))
    write_json(place / "job", job | dict(settings=RECIPES[args.peer][args.recipe], packages=packages))
    with open(place / "log", "w") as log:
        words = [environment(args.peer), HERE / "adapters.py", place]
        if subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, cwd=BUILD).returncode:
            sys.exit(f"{args.peer} failed; the end of {place}/log:\n" + (place / "log").read_text()[-3000:])
    return load_file(place / "safetensors"), json.loads((place / "result").read_text())


def check(weights, model, bits, group_size):
    "Exactly the linears of the blocks are rounded, each to at most 2**bits levels in a row's group."
    rounded = {f"{path}.{name}.weight" for path, block in blocks_of(model).items() for name in linears_of(block)}
    odd = [name for name in weights if name not in rounded and not (name in model.state_dict() and "norm" in name)]
    if odd or not rounded <= set(weights):
        sys.exit(f"not rounded: {sorted(rounded - set(weights))}; should not have changed: {odd}")
    for name in rounded:
        ordered = weights[name].reshape(-1, group_size or weights[name].shape[1]).sort(1).values
        if (levels := int((ordered.diff() != 0).sum(1).max()) + 1) > 2**bits:
            sys.exit(f"{name} has {levels} levels in a group: that is not {bits} bits")


if __name__ == "__main__":
    known = "\n".join(f"  {peer:16} recipes: {', '.join(recipes)}" for peer, recipes in RECIPES.items())
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=f"peers:\n{known}", formatter_class=layout)
    parser.add_argument("peer", choices=RECIPES, metavar="peer", help="one of the peers named below")
    parser.add_argument("--recipe", default="default", help="named settings in recipes.json (default: default)")
    parser.add_argument("--bits", type=int, default=2, help="bits per weight (default: 2)")
    parser.add_argument("--group-size", type=int, help="inputs that share a scale (default: the whole row)")
    parser.add_argument("--seed", type=int, default=0, help="draws the calibration sequences (default: 0)")
    told = "smollm2 (on the text of smollm2.py), or a folder that train_reference.py made"
    parser.add_argument("--model", help=f"{told} (default: the bundled model)")
    told = "a second row for a run on record, made on another machine: how much faster is this one?"
    parser.add_argument("--again", action="store_true", default=None, help=told)
    args = parser.parse_args()
    if args.recipe not in RECIPES[args.peer]:
        parser.error(f"{args.peer} has the recipes {', '.join(RECIPES[args.peer])}")
    if args.model == "smollm2":
        args.folder, (_, args.samples, _, args.eval_samples) = need_fetched(args.model), TEXT
    else:
        args.folder, args.samples, args.eval_samples = Path(args.model or REFERENCE).resolve(), SAMPLES, WINDOWS
        args.model = args.folder.parent.name if args.model else None

    def run(job):
        full = texts(args)
        weights, report = quantize(args, full.calib)
        model = copy.deepcopy(full.model)
        check(weights, model, args.bits, args.group_size)
        model.load_state_dict(weights, strict=False)
        scores = evaluate_model(model, full.heldout, full.model)._asdict()
        settings, machine = RECIPES[args.peer][args.recipe], [platform.processor(), platform.system()]
        return dict(settings=settings, **scores, **report, machine=machine, made=stamp(dict(settings, **job)))

    keys = ("model", "peer", "recipe", "bits", "group_size", "samples", "eval_samples", "seed", "again")
    resume("peers", [{k: getattr(args, k) for k in keys}], run)
