"""Many processes give the codes of one, bit for bit; they stop together; what they can't do is refused."""

import multiprocessing
import os
import socket
from dataclasses import replace

import pytest
import torch
from aespa_nb import AespaConfig, quantize_model
from aespa_nb.distributed import ALONE, joined
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

SIZES = dict(vocab_size=64, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=32)
TOKENS = torch.randint(0, 64, (11, 16), generator=torch.Generator().manual_seed(0))
MODELS = {
    "gqa": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, hidden_size=64, num_key_value_heads=2, intermediate_size=96)),
    "moe": lambda: MixtralForCausalLM(
        MixtralConfig(
            **SIZES, hidden_size=32, num_key_value_heads=2, intermediate_size=48, num_local_experts=8
        )
    ),
}
CASES = {
    "best": ("gqa", AespaConfig.preset("best", shares=4)),
    "best, batches": ("gqa", AespaConfig.preset("best", shares=4, batch_size=2, samples=9)),
    "aespa": ("gqa", AespaConfig.preset("aespa", shares=4, iterations=5)),
    "gptq": ("gqa", AespaConfig.preset("gptq", shares=5)),
    "experts": ("moe", AespaConfig.preset("best", shares=8)),
}


def build(kind):
    torch.manual_seed(0)
    model = MODELS[kind]().eval().requires_grad_(False)
    for p in model.model.layers.parameters():
        p.copy_(5 * p if p.ndim > 1 else p + 0.1 * torch.randn(p.shape))
    return model


def outcome(case, team=ALONE, **changes):
    "Codes, grids, losses and notes of a run."
    kind, config = CASES[case]
    model = build(kind)
    report = quantize_model(model, TOKENS, replace(config, **changes), team=team)
    layers = {n: (r.W_int, r.grid.step, r.grid.zero, r.zeta, r.loss, r.loss_rtn) for n, r in report.layers.items()}
    return dict(layers=layers, state=model.state_dict(), notes=report.notes, statistics=report.statistics_bytes)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def member(rank, size, port, task, args, folder):
    "One process of a team; its results go into a file."
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = port
    with joined() as team:
        torch.save(task(team, *args), folder / f"{rank}.pt")


def run_team(size, task, folder, *args):
    "What `task(team, *args)` gives on each of `size` processes, forked from this one."
    context, port = multiprocessing.get_context("fork"), free_port()
    team = [context.Process(target=member, args=(r, size, port, task, args, folder)) for r in range(size)]
    for process in team:
        process.start()
    for process in team:
        process.join(120)
    assert [process.exitcode for process in team] == [0] * size
    return [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(size)]


def all_cases(team, names):
    return {name: outcome(name, team) for name in names}


@pytest.fixture(scope="module")
def alone():
    return {name: outcome(name) for name in CASES}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_codes_of_many_processes_are_those_of_one(alone, size, tmp_path):
    for found in run_team(size, all_cases, tmp_path, list(CASES)):
        for name in CASES:
            for key, value in alone[name].items():
                assert same(found[name][key], value), (name, key)
