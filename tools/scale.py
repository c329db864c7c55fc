"""How long statistics and solving take with 1, 2 and 4 processes, one thread each; the numbers of the chapter on several processes.

    python tools/scale.py [--ranks 1 2 4] [--samples 32] [--blocks 1]

Quantizes the first block of the bundled model once for each number of processes, with the same shares, compares the
codes, and writes nbs/runs/scale.json. Seconds are of the clock, and of the processor: where processes have to share
cores, the clock says what was gained and the processor's seconds of the busiest process what cores of their own could.
"""

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from aespa_nb import AespaConfig, load_reference, quantize_model
from aespa_nb.experiments.cost import TOKEN_PHASES, Meter, _wrapped, metering
from aespa_nb.model.team import ShareSum, Team, joined
from transformers.utils.logging import disable_progress_bar

RESULTS = Path("nbs/runs/scale.json")
TALK = ((ShareSum, "batch_done"), (ShareSum, "finish"), (Team, "broadcast"))


def measure(model, calib, config, team, clock):
    "Seconds of the phases of one run, and a digest of its codes."
    meter, digest = Meter(clock), hashlib.sha256()
    with contextlib.ExitStack() as stack:
        stack.enter_context(metering(model, meter))
        for owner, name in TALK:
            talk = _wrapped(meter, getattr(owner, name), "talk", None)
            stack.enter_context(mock.patch.object(owner, name, talk))
        report = quantize_model(model, calib, config, team=team)
        meter.charge()
    for layer in report.layers.values():
        digest.update(layer.codes.numpy().tobytes())
    seconds = {name: phase.seconds for name, phase in meter.phases.items()}
    statistics = sum(seconds.get(name, 0) for name in TOKEN_PHASES)
    talk = seconds.pop("talk")
    return dict(statistics=statistics, talk=talk, solving=sum(seconds.values()) - statistics), digest.hexdigest()


def model_of(blocks):
    "The first blocks of the bundled model."
    model = load_reference(torch.float32).model
    model.model.layers = model.model.layers[:blocks]
    model.config.num_hidden_layers = blocks
    return model


def work(args):
    "One process: a run by the clock, and the same once more by the processor's time."
    torch.set_num_threads(1)
    disable_progress_bar()
    calib, config = load_reference().calib[: args.samples], AespaConfig.preset("best", shares=8)
    with joined() as team:
        quantize_model(model_of(1), calib[:8], config, team=team)  # compiles, loads
        start = time.perf_counter()
        clock, codes = measure(model_of(args.blocks), calib, config, team, time.perf_counter)
        clock["all"] = time.perf_counter() - start
        processor, again = measure(model_of(args.blocks), calib, config, team, time.process_time)
        assert codes == again
        busiest = {k: max(team.broadcast(processor, r)[k] for r in range(team.size)) for k in processor}
        if team.rank == 0:
            Path(args.work).write_text(json.dumps(dict(ranks=team.size, clock=clock, processor=busiest, codes=codes)))


def main(args):
    load = os.getloadavg()[0]
    rows, env = [], dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path))
    for ranks in args.ranks:
        with tempfile.NamedTemporaryFile() as file:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            options = ["--samples", str(args.samples), "--blocks", str(args.blocks), "--work", file.name]
            subprocess.run([*launch, __file__, *options], check=True, env=env)
            rows.append(json.loads(Path(file.name).read_text()))
            print({k: v for k, v in rows[-1].items() if k != "codes"}, flush=True)
    assert len({row.pop("codes") for row in rows}) == 1, "the codes differ"
    run = dict(cores=os.cpu_count(), load=load, samples=args.samples, blocks=args.blocks)
    RESULTS.write_text(json.dumps(dict(run=run, rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    p.add_argument("--samples", type=int, default=32)
    p.add_argument("--blocks", type=int, default=1)
    p.add_argument("--work", help=argparse.SUPPRESS)
    args = p.parse_args()
    work(args) if args.work else main(args)
