"""What the long measurements share: the bundled model rounded and scored, and records that are filled row by row."""

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # the same products as the command line
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")

import torch  # noqa: E402
from aespa_nb import calibration_windows, evaluate_model, evaluation_windows, load_model, quantize_model  # noqa: E402
from aespa_nb.data.text import Reference  # noqa: E402
from aespa_nb.experiments.records import stale, stamp, write_record  # noqa: E402, F401
from aespa_nb.quantize.journal import write_json  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

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
        RUNS.mkdir(parents=True, exist_ok=True)
        write_json(RUNS / f"{name}.json", [*kept, row])  # rows of an older format stay until they are made again
        shown = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items() if k != "made"}
        print(*(f"{k} {v}" for k, v in shown.items() if not isinstance(v, dict | list)), flush=True)
    return rows_of(name)


def rounded(reference, config):
    "The model of a `Reference` rounded, the report, and the row: scores, CPU seconds and the stamp."
    model, start = copy.deepcopy(reference.model), time.process_time()
    report = quantize_model(model, reference.calib, config)
    seconds = time.process_time() - start
    scores = evaluate_model(model, reference.heldout[:WINDOWS], reference.model)
    return model, report, dict(**scores._asdict(), cpu_seconds=seconds, made=stamp(config))


def windows_of(name: str, source: str, samples: int, seqlen: int, n_heldout: int, seed: int = 0) -> Reference:
    "A model by name or folder in float32, windows of a text to calibrate it, drawn with the seed, and held-out ones."
    model, tokenizer = load_model(name, torch.float32)
    calib = calibration_windows(source, tokenizer, samples, seqlen, seed).tokens
    return Reference(model, tokenizer, calib, evaluation_windows(source, tokenizer, seqlen, n_heldout).tokens)


def answer(model, tokenizer, question: str, length: int):
    "The tokens of a question in the chat's form and of the likeliest answer, and how many are the question's."
    chat = [dict(role="user", content=question)]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=length, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return out[0], ids["input_ids"].shape[1]


def answers(model, tokenizer, questions, length: int = 40) -> dict[str, str]:
    "The first words of the answer to each question, without sampling."
    said = {question: answer(model, tokenizer, question, length) for question in questions}
    return {question: tokenizer.decode(ids[at:], skip_special_tokens=True) for question, (ids, at) in said.items()}


def fresh(file: str, *words, **env):
    "What a script prints last, in a process of its own, as JSON."
    command = [sys.executable, file, *map(str, words)]
    done = subprocess.run(command, env=os.environ | env, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def make_model(folder: Path, width: int, inner: int, n_blocks: int):
    "A LLaMA with random weights and the bundled tokenizer in `folder/model`, and a text beside it."
    torch.manual_seed(0)
    size = dict(hidden_size=width, intermediate_size=inner, num_hidden_layers=n_blocks, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(**size, vocab_size=4096, max_position_embeddings=64))
    tokenizer = load_model("reference")[1]
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    (folder / "text.txt").write_text("A tensor is an array that knows its shape, its dtype and its device. " * 400)
    return model, tokenizer
