"""How long 1, 2 and 4 processes take for the first block of the bundled model, and how close they come to one.

Writes nbs/runs/scale.json, which the chapter on several processes prints. Seconds are of the clock, and of the
processor: where processes have to share cores, the clock says what was gained and the processor's seconds of the
busiest process what cores of their own could.
"""

import os
import subprocess
import sys
import tempfile
import time

import torch
from aespa_nb import AespaConfig, load_reference, quantize_model
from aespa_nb.model.team import joined
from common import RUNS, stamp, write_record
from transformers.utils.logging import disable_progress_bar

PRESETS, SAMPLES = ("gptq", "best"), 32


def work(file):
    "One process: a short run that loads and compiles, then each preset; the first process writes what all found."
    disable_progress_bar()

    def quantize(preset, samples):
        model, _, calib, _ = load_reference()
        model.model.layers = model.model.layers[:1]
        model.config.num_hidden_layers = 1
        report = quantize_model(model, calib[:samples], AespaConfig.preset(preset), team=team)
        layers = report.layers.values()
        return torch.cat([layer.codes.flatten() for layer in layers]), sum(layer.loss for layer in layers)

    with joined() as team:
        quantize("best", 8)
        row, codes = dict(processes=team.size), {}
        for preset in PRESETS:
            clock, processor = time.perf_counter(), time.process_time()
            mine, loss = quantize(preset, SAMPLES)
            clock, processor = time.perf_counter() - clock, time.process_time() - processor
            busiest = max(team.broadcast(processor, rank) for rank in range(team.size))
            row[preset] = dict(clock=clock, processor=busiest, loss=loss)
            codes[preset] = team.broadcast(mine)
            assert torch.equal(codes[preset], mine), "the processes end with other codes"
        if team.rank == 0:
            torch.save((codes, row), file)


if __name__ == "__main__":
    if sys.argv[1:]:
        work(sys.argv[1])
        sys.exit()
    found, load = [], os.getloadavg()[0]
    for processes in (1, 2, 4):
        with tempfile.NamedTemporaryFile() as file:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
            subprocess.run([*launch, __file__, file.name], check=True)
            found.append(torch.load(file.name))
        codes, row = found[-1]
        for preset in PRESETS:
            row[preset]["other_codes"] = (codes[preset] != found[0][0][preset]).double().mean().item()
        print(row, flush=True)
    run = dict(cores=os.cpu_count(), load=load, samples=SAMPLES, presets=list(PRESETS))
    write_record(RUNS / "scale.json", dict(made=stamp(run), run=run, rows=[row for _, row in found]))
