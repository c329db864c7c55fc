"""What the adapters share. It runs in a peer's environment, which has torch and transformers but not aespa_nb.

An adapter hands two functions to `main`: `quantize(model, tokenizer, tokens, job)`, which is timed, and
`dense(result, job)`, which names the weights that the peer has changed, dequantized, and is not.
"""

import json
import random
import resource
import sys
import time
from contextlib import contextmanager
from importlib.metadata import version
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(quantize, dense=None, loader=None):
    "Does the job described by the JSON file that the command line names."
    with open(sys.argv[1]) as f:
        job = SimpleNamespace(**json.load(f))
    seed_everything(job.seed)
    model, tokenizer, tokens = (loader or load)(job)
    with measuring() as cost:
        result = quantize(model, tokenizer, tokens, job)
    weights = (dense or linear_weights)(result, job)
    save_file({name: W.detach().float().cpu().contiguous() for name, W in weights.items()}, job.out)
    with open(job.result, "w") as f:
        json.dump(cost | {"versions": {name: version(name) for name in job.packages}}, f)


def seed_everything(seed):
    random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)


def load(job):
    "The model in full precision, its tokenizer, and the calibration tokens `[seq tok]`."
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(job.model, local_files_only=True)
    return model, tokenizer, load_file(job.tokens)["tokens"].long()


@contextmanager
def measuring():
    "CPU seconds (user and system, with child processes), wall seconds and peak memory of what runs inside."
    cost, wall, cpu = {}, time.perf_counter(), cpu_seconds()
    yield cost
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cost |= {"cpu_seconds": cpu_seconds() - cpu, "wall_seconds": time.perf_counter() - wall, "peak_MiB": peak / 1024}


def cpu_seconds():
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in usages)


def linears(model):
    "The linears of the blocks, with their names."
    found = ((n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear))
    return [(n, m) for n, m in found if n != "lm_head"]


def linear_weights(model, job):
    "The weights of all linears of the blocks."
    return {f"{name}.weight": linear.weight for name, linear in linears(model)}


def per_input(scale, W):
    "A scale for every weight, from one per row and group `[out groups]`."
    return scale.to(W).repeat_interleave(W.shape[1] // scale.shape[1], 1)
