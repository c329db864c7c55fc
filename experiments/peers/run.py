"""Quantize the bundled model with a published package, in an environment of its own, and score what comes out.

    python tools/peers/run.py auto-round --bits 2
    python tools/peers/run.py auto-round --bits 3 --group-size 64 --recipe best --seed 1
    python tools/peers/run.py --table

The first run of a peer makes its environment, build/peers/<peer>, from tools/peers/requirements/<peer>.txt. The peer
works on one thread on the calibration sequences that aespa_nb draws with the same seed and writes a dense checkpoint of
the weights it has changed to build/peers/out. We load that into a fresh model, check that every weight is on a grid of
2**bits levels, and measure the KL divergence and the perplexity on held-out windows. The record goes to
nbs/runs/peers.json and replaces one of the same settings.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE, BUILD, RECORDS = ROOT / "tools/peers", ROOT / "build/peers", ROOT / "nbs/runs/peers.json"
REQUIREMENTS = HERE / "requirements"
RECIPES = json.loads((HERE / "recipes.json").read_text())
REFERENCE = ROOT / "aespa_nb/reference"
POOLS = "OMP MKL OPENBLAS NUMEXPR NUMBA".split()
THREADS = {f"{pool}_NUM_THREADS": "1" for pool in POOLS} | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
THREADS["GPTQMODEL_CPU_WORKERS"] = "2"  # the fewest with which GPTQModel starts; OpenMP still has one thread
CACHE = dict(TORCHINDUCTOR_CACHE_DIR=str(BUILD / "cache"))  # what a peer compiles is there for its next run
QUIET = dict(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
os.environ.update(THREADS | CACHE | QUIET)  # for us and for the peers; before torch is imported
# What tells records apart.
SETTINGS = ("model", "peer", "recipe", "bits", "group_size", "samples", "eval_samples", "seed")


def parse():
    "The command line."
    known = "\n".join(f"  {peer:16} recipes: {', '.join(recipes)}" for peer, recipes in RECIPES.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"peers:\n{known}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", nargs="?", choices=RECIPES, metavar="peer", help="one of the peers named below")
    parser.add_argument("--recipe", default="default", help="named settings in recipes.json (default: default)")
    parser.add_argument("--bits", type=int, default=2, help="bits per weight (default: 2)")
    parser.add_argument("--group-size", type=int, help="inputs that share a scale (default: the whole row)")
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="draws the calibration sequences (default: 0)")
    parser.add_argument("--eval-samples", type=int, default=128, help="held-out windows to score on (default: 128)")
    parser.add_argument("--model", type=Path, help="folder that tools/train_reference.py made (default: the bundled)")
    parser.add_argument("--note", help="goes into the record")
    parser.add_argument("--table", action="store_true", help="only print the records")
    args = parser.parse_args()
    if not args.table and args.peer is None:
        parser.error("name a peer, or --table")
    if not args.table and args.recipe not in RECIPES[args.peer]:
        parser.error(f"{args.peer} has the recipes {', '.join(RECIPES[args.peer])}")
    args.folder, args.model = (args.model or REFERENCE).resolve(), args.model.parent.name if args.model else None
    return args


# The environment of a peer


def environment(peer):
    "The Python of the peer's environment, which is made if it is missing or its requirements have changed."
    home, wanted = BUILD / peer, requirements(peer)
    python, stamp = home / "bin/python", home / "requirements.txt"
    if not (stamp.exists() and stamp.read_text() == wanted):
        print(f"Making {home.relative_to(ROOT)}", flush=True)
        venv.create(home, with_pip=True, clear=True)
        install(python, peer)
        stamp.write_text(wanted)  # last: an environment that is cut short is made anew
    return python


def requirements(peer):
    "What is to be installed; what stands in <peer>-alone.txt is installed without its dependencies."
    return "".join(path.read_text() for path in sorted(REQUIREMENTS.glob(f"{peer}*.txt"), reverse=True))


def install(python, peer):
    "Torch first, without CUDA where there is no GPU (the way of tools/install.py); then the rest."
    sys.path.append(str(ROOT / "tools"))
    import install as tool

    tool.PYTHON = python
    tool.install_torch(re.search(r"^torch==\S+", requirements(peer), flags=re.M)[0])
    tool.pip("--quiet", "-r", REQUIREMENTS / f"{peer}.txt")
    alone = REQUIREMENTS / f"{peer}-alone.txt"
    if alone.exists():
        tool.pip("--quiet", "--no-deps", "-r", alone)


def packages(peer):
    "The names of the packages that a peer's requirements pin."
    return re.findall(r"^([\w-]+)==", requirements(peer), flags=re.M)


# The run


def quantize(args):
    "Runs the adapter in the peer's environment; its checkpoint and what it reports."
    run = f"{args.bits}b-g{args.group_size or 0}-n{args.samples}-s{args.seed}"
    name = f"{args.model or 'reference'}-{args.peer}-{args.recipe}-{run}"
    out, job = BUILD / "out" / f"{name}.safetensors", BUILD / "out" / f"{name}.job.json"
    result, python = job.with_suffix(".result"), environment(args.peer)
    out.parent.mkdir(parents=True, exist_ok=True)
    job.write_text(json.dumps(describe(args, out, result)))
    adapter = HERE / f"adapter_{args.peer.replace('-', '_')}.py"
    with open(job.with_suffix(".log"), "w") as log:
        status = subprocess.run([python, adapter, job], stdout=log, stderr=subprocess.STDOUT, cwd=BUILD).returncode
    if status:
        sys.exit(f"{args.peer} failed; the end of {log.name}:\n" + Path(log.name).read_text()[-3000:])
    return out, json.loads(result.read_text())


def describe(args, out, result):
    "All that an adapter has to know."
    tokens = out.with_suffix(".tokens")
    draw(args, tokens)
    settings = RECIPES[args.peer][args.recipe]
    paths = dict(model=str(args.folder), tokens=str(tokens), out=str(out), result=str(result))
    keys = ("bits", "group_size", "seed")
    return {k: getattr(args, k) for k in keys} | {"settings": settings, "packages": packages(args.peer)} | paths


def draw(args, path):
    "The calibration sequences that `aespa_nb.quantize_model` draws with this seed."
    import torch
    from safetensors.torch import save_file

    from aespa_nb import load_reference

    calib = load_reference(folder=args.folder).calib
    order = torch.randperm(len(calib), generator=torch.Generator().manual_seed(args.seed))
    save_file({"tokens": calib[order[: args.samples]].contiguous()}, path)


# The score


def score(checkpoint, args):
    "KL, perplexity and top-1 agreement of the model with the checkpoint's weights in it."
    from safetensors.torch import load_file

    from aespa_nb import evaluate_model, load_reference

    full, model = load_reference(folder=args.folder), load_reference(folder=args.folder).model
    weights = load_file(checkpoint)
    check(weights, model, args.bits, args.group_size)
    model.load_state_dict(weights, strict=False)
    scores = evaluate_model(model, full.heldout[: args.eval_samples], full.model)
    return {"kl": scores.kl, "perplexity": scores.perplexity, "top1": scores.top1}


def check(weights, model, bits, group_size):
    "Exactly the linears of the blocks are rounded, each to at most 2**bits levels in a row's group."
    from aespa_nb.model.blocks import stacks_of
    from aespa_nb.model.blocks import linears_of

    known = set(model.state_dict())
    blocks = {f"{path}.{i}": block for path in stacks_of(model) for i, block in enumerate(model.get_submodule(path))}
    rounded = {f"{path}.{name}.weight" for path, block in blocks.items() for name in linears_of(block)}
    odd = [name for name in weights if name not in known or not (name in rounded or "norm" in name)]
    if odd or not rounded <= set(weights):
        sys.exit(f"not rounded: {sorted(rounded - set(weights))}; should not have changed: {odd}")
    for name in rounded:
        found = levels(weights[name], group_size)
        if found > 2**bits:
            sys.exit(f"{name} has {found} levels in a group: that is not {bits} bits")


def levels(W, group_size):
    "The most different values that a row has within a group."
    ordered = W.reshape(-1, group_size or W.shape[1]).sort(1).values
    return int((ordered.diff() != 0).sum(1).max()) + 1


# The records


def machine():
    "Where the run took place."
    cpu = next((line for line in cpuinfo() if line.startswith("model name")), platform.processor())
    return {"processor": cpu.split(":")[-1].strip(), "system": platform.system(), "python": platform.python_version()}


def cpuinfo():
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def store(record):
    "Adds the record, in place of one of the same settings; the file is replaced in one scale."
    key = lambda r: [r.get(k) for k in SETTINGS]
    records = [r for r in read() if key(r) != key(record)] + [record]
    RECORDS.parent.mkdir(exist_ok=True)
    new = RECORDS.with_suffix(".new")
    new.write_text(json.dumps(records, indent=1) + "\n")
    os.replace(new, RECORDS)


def read():
    return json.loads(RECORDS.read_text()) if RECORDS.exists() else []


def line(record):
    "A row of the table."
    grid = f"{record['bits']}  {record['group_size'] or 'row':>4}  {record['seed']}"
    numbers = "  ".join(f"{record[k]:{form}}" for k, form in NUMBERS.items())
    what = " ".join(filter(None, (record.get("model"), record["peer"], record["recipe"])))
    return f"{what:32}  {grid}  {numbers}"


NUMBERS = {"kl": "8.5f", "perplexity": "8.3f", "cpu_seconds": "7.1f", "wall_seconds": "7.1f"}
HEAD = f"{'method':32}  b  size  s        KL       ppl    CPU s   wall s"


def main():
    args = parse()
    if args.table:
        print("\n".join([HEAD, *map(line, read())]))
        return
    checkpoint, report = quantize(args)
    settings = {k: getattr(args, k) for k in SETTINGS} | {"settings": RECIPES[args.peer][args.recipe]}
    extra = {"note": args.note, "machine": machine(), "date": time.strftime("%Y-%m-%d")}
    record = settings | score(checkpoint, args) | report | extra
    store(record)
    print(HEAD, line(record), sep="\n")


if __name__ == "__main__":
    main()
