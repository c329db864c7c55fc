"""Rounded models in llama.cpp: perplexity there and here, tokens per second, size; to nbs/runs/llama_cpp.json.

    python experiments/llama_cpp.py                 builds llama.cpp in build/llama_cpp (ten minutes, a C++ compiler)
    python experiments/llama_cpp.py --python PATH   a Python that has llama-cpp-python already

The bundled model, and SmolLM2 through the whole chain: chat records in, `aespa_nb quantize --for llama.cpp`, GGUF out.
`aespa_nb fetch smollm2` and `aespa_nb fetch handbook` first (make smollm2).
"""

import argparse
import copy
import json
import subprocess
import venv
from pathlib import Path

import numpy as np
import torch
from aespa_nb import evaluate_model, evaluation_windows, load_model, load_reference
from aespa_nb.cli import main as command_line
from aespa_nb.data.fetch import need_fetched
from aespa_nb.export.checkpoint import read_quantized
from aespa_nb.export.gguf_file import write_gguf
from common import ROOT, resume

BUILD = ROOT / "build/llama_cpp"
PACKAGES = "llama-cpp-python==0.3.36", "numpy"
JOBS = [  # model, preset, bits, further words of the command line
    ("reference", "full", 16, ""),
    ("reference", "gptq", 2, "--group-size 64"),
    ("reference", "gptq", 3, "--symmetric --group-size 64"),
    ("reference", "gptq", 3, ""),
    ("reference", "gptq", 4, ""),
    ("reference", "gptq", 4, "--group-size 32"),
    ("smollm2", "full", 16, ""),
    ("smollm2", "gptq", 4, "--embeddings 8"),
    ("smollm2", "gptq", 3, "--embeddings 8"),
]
TEXT = {  # words of the command line; windows that measure, and their tokens
    "reference": ("--samples 16", 32, 256),
    "smollm2": ("--calibration {chats}:messages --evaluation handbook --samples 32 --seqlen 512", 12, 512),
}
CHAT = [dict(role="user", content="What is the capital of France?")]
SAMPLE = "In 2026, it's 12,345 tests:\n    x = 5"
QUESTION = "What does the Debian handbook say about “{}”?"
THERE = r"""
import json, sys, time
import numpy as np
from llama_cpp import Llama, llama_cpp

path, windows = sys.argv[1], np.load(sys.argv[2])
model = Llama(path, n_ctx=windows.shape[1], logits_all=True, verbose=False, n_threads=1, n_threads_batch=1)
loss, start = [], time.perf_counter()
for row in windows.tolist():
    model.reset()
    model.eval(row)
    z = np.asarray(model.scores[: len(row) - 1], dtype=np.float64)
    z -= z.max(-1, keepdims=True)
    loss.append(np.log(np.exp(z).sum(-1)) - z[np.arange(len(z)), row[1:]])
read = windows.size / (time.perf_counter() - start)
prompt = json.loads(sys.argv[3])
model.reset()
start, said = time.perf_counter(), []
for token in model.generate(prompt, temp=0.0):
    start = start if said else time.perf_counter()
    said.append(token)
    if len(said) == 65:
        break
wrote = 64 / (time.perf_counter() - start)
said = said[: said.index(model.token_eos())] if model.token_eos() in said else said[:40]
text = model.detokenize(said).decode(errors="replace")
words = model.tokenize(sys.argv[4].encode(), add_bos=False)
out = dict(perplexity=float(np.exp(np.concatenate(loss).mean())), read=read, wrote=wrote, text=text, words=words)
print(json.dumps(out))
"""


def there(python: str, path: Path, windows: torch.Tensor, prompt: list[int], words: str) -> dict:
    "What llama.cpp makes of a file: perplexity, tokens read and written per second on one thread, a text, tokens."
    np.save(path.with_suffix(".npy"), windows.numpy())
    command = [python, "-c", THERE, path, path.with_suffix(".npy"), json.dumps(prompt), words]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def chats() -> Path:
    "The handbook's sections as records of a user who asks and an assistant who tells."
    path, heading, records = BUILD / "chats.jsonl", None, []
    for part in (need_fetched("handbook") / "calibration.txt").read_text().split("\n\n"):
        number, _, title = part.partition(" ")
        if number.rstrip(".").replace(".", "").isdigit() and title and "\n" not in part:
            heading, text = title, []
            records.append((heading, text))
        elif heading:
            text.append(part)
    talk = lambda ask, say: [dict(role="user", content=QUESTION.format(ask)), dict(role="assistant", content=say)]
    lines = [json.dumps(dict(messages=talk(title, "\n\n".join(text)))) for title, text in records if text]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def measure(job: dict, python: str) -> dict:
    "One row; the file is made by the command line if it isn't there yet."
    name = "-".join([job["model"], job["preset"], str(job["bits"]), *job["words"].replace("--", "").split()])
    folder, (text, count, seqlen), smol = BUILD / name, TEXT[job["model"]], job["model"] == "smollm2"
    full, tokenizer = load_model(job["model"], torch.float32)
    file, row = folder / "model.gguf", {}
    if job["preset"] == "full":
        folder.mkdir(parents=True, exist_ok=True)
        write_gguf(file, copy.deepcopy(full), {}, tokenizer)
    else:
        words = f"--bits {job['bits']} {'--for llama.cpp' if smol else '--format gguf'} {job['words']}"
        words = f"quantize {job['model']} --preset {job['preset']} {words} {text.format(chats=chats() if smol else '')}"
        assert command_line([*words.split(), "--quiet", "--resume", "--eval-samples", "4", "--out", str(folder)]) == 0
        row["bits_per_weight"] = read_quantized(folder).report.bits_per_weight
    held, prompt = load_reference().heldout[:count], tokenizer("Return a new array").input_ids
    if smol:
        held = evaluation_windows("handbook", tokenizer, seqlen, count).tokens
        prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
    found = there(python, file, held, prompt, SAMPLE)
    row |= dict(same_tokens=found.pop("words") == tokenizer(SAMPLE, add_special_tokens=False).input_ids)
    scores = evaluate_model(load_model(file)[0], held, full)
    row |= dict(perplexity=scores.perplexity, kl=scores.kl, bytes=file.stat().st_size)
    return row | {f"llama_cpp_{key}": value for key, value in found.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="has llama-cpp-python already")
    parser.add_argument("--only", default="", help="jobs of this model")
    args = parser.parse_args()
    if args.python is None:
        home = BUILD / "venv"
        args.python = str(home / "bin/python")
        if not Path(args.python).exists():
            venv.create(home, with_pip=True)
            subprocess.run([args.python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    keys = "model", "preset", "bits", "words"
    jobs = [dict(zip(keys, job)) for job in JOBS if args.only in job[0]]
    resume("llama_cpp", jobs, lambda job: measure(job, args.python))
