"""What the long measurements share: the bundled model rounded and scored, and records that are filled row by row."""

import copy
import json
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")

import torch  # noqa: E402
from aespa_nb import evaluate_model, quantize_model  # noqa: E402
from aespa_nb.experiments.records import stale, stamp, write_record  # noqa: E402

ROOT = Path(__file__).parents[1]
RUNS = Path(os.environ.get("AESPA_NB_RUNS", ROOT / "nbs/runs"))
SAMPLES, WINDOWS = 64, 128  # calibration sequences, held-out windows
torch.set_num_threads(1)


def rows_of(name: str) -> list[dict]:
    "The rows on record."
    path = RUNS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def same(row: dict, job: dict) -> bool:
    return all(row.get(k) == v for k, v in job.items())


def resume(name: str, jobs, run, whole: bool = False) -> list[dict]:
    """Runs the jobs (what tells rows apart) that are not on record, or stale there; `run(job)` gives what was found.

    `whole`: these jobs are the whole record, and rows of others leave it.
    """
    jobs = list(jobs)
    for job in jobs:
        if any(same(row, job) and not stale(row) for row in rows_of(name)):
            continue
        row = {**job, "made": stamp(), **run(job)}
        kept = [r for r in rows_of(name) if not same(r, job) and (not whole or any(same(r, j) for j in jobs))]
        write_record(RUNS / f"{name}.json", [*kept, row])
        shown = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items() if k != "made"}
        print(*(f"{k} {v}" for k, v in shown.items() if not isinstance(v, dict | list)), flush=True)
    return rows_of(name)


def rounded(reference, config):
    "The bundled model rounded, the report, and the row: scores, CPU seconds and the stamp."
    model, start = copy.deepcopy(reference.model), time.process_time()
    report = quantize_model(model, reference.calib, config)
    seconds = time.process_time() - start
    scores = evaluate_model(model, reference.heldout[:WINDOWS], reference.model)
    return model, report, dict(**scores._asdict(), cpu_seconds=seconds, made=stamp(config))
