"""Processes end with the same codes; equal numbers give equal codes, others close ones; they stop together."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from aespa_nb import AespaConfig, AespaError, load_reference, quantize_model
from aespa_nb.cli import main
from aespa_nb.model.team import ALONE, Team, joined, speaks_first
from aespa_nb.quantize.run import check_team
from aespa_nb.rounding.hessian import Gram
from models import refused, same, small

TOKENS = torch.randint(0, 64, (11, 16), generator=torch.Generator().manual_seed(0))
CASES = {
    "gptq": ("llama", AespaConfig.preset("gptq")),
    "aespa": ("llama", AespaConfig.preset("aespa", iterations=5)),
    "best, batches": ("llama", AespaConfig.preset("best", batch_size=2, samples=9)),
    "experts": ("moe", AespaConfig.preset("best")),
}


def outcome(case, team=ALONE, **changes):
    "Codes, grids, losses and notes of a run."
    kind, config = CASES[case]
    model = small(kind)
    report = quantize_model(model, TOKENS, replace(config, **changes), team=team)
    layers = {n: (r.codes, r.grid.scale, r.grid.zero, r.zeta, r.loss, r.loss_rtn) for n, r in report.layers.items()}
    return dict(layers=layers, state=model.state_dict(), notes=report.notes, statistics=report.statistics_bytes)


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


def started(size, task, folder, *args, seconds=120):
    "Exit codes of `size` processes, forked from this one, that run `task(team, *args)`."
    context, port = multiprocessing.get_context("fork"), free_port()
    team = [context.Process(target=member, args=(r, size, port, task, args, folder)) for r in range(size)]
    for process in team:
        process.start()
    for process in team:
        process.join(seconds)
    return [process.exitcode for process in team]


def run_team(size, task, folder, *args):
    "What `task(team, *args)` gives on each of `size` processes."
    assert started(size, task, folder, *args) == [0] * size
    return [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(size)]


def all_cases(team, names):
    return {name: outcome(name, team) for name in names}


@pytest.fixture(scope="module")
def alone():
    "What one process makes of all cases; those that are forked from it later need not compile what it has compiled."
    return all_cases(ALONE, CASES)


@pytest.mark.parametrize(("size", "times"), [(2, 2), (3, 1)])
def test_all_processes_have_the_same_codes_again_and_again(size, times, alone, tmp_path):
    found = []
    for folder in map(tmp_path.joinpath, map(str, range(times))):
        folder.mkdir()
        found += run_team(size, all_cases, folder, list(CASES))
    for other in found[1:]:
        for name in CASES:
            for key, value in found[0][name].items():
                assert same(other[name][key], value), (name, key)
    for name in CASES:  # and close to those of one process: GPTQ's decisions hardly depend on the last bits
        one, many = alone[name], found[0][name]
        codes = [torch.cat([layer[0].flatten() for layer in r["layers"].values()]) for r in (one, many)]
        losses = [sum(layer[4] for layer in r["layers"].values()) for r in (one, many)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4 if name == "gptq" else 0.05), name
        if name == "gptq":
            assert (codes[0] != codes[1]).double().mean() < 2e-3
        assert many["notes"] == one["notes"] and many["statistics"] == one["statistics"]


class Outer:
    "Statistics with others inside, a sum that is not there, and a constant."

    SUMS = "inner", "total", "none"

    def __init__(self, inner):
        self.inner, self.total, self.none, self.constant = inner, torch.ones(2, 3), None, 7


def summed(team, numbers):
    "What a team makes of Gram matrices of one-dimensional tokens that several statistics share."
    gram = Gram(1)
    outer = Outer(gram)
    for x in numbers[team.part(len(numbers))]:
        gram.add(x[:, None])
    team.sum([gram, outer, outer, Outer(gram)])
    return gram.total.item(), gram.tokens, outer.total[0, 0].item(), outer.constant


@pytest.mark.parametrize("size", [2, 3])
def test_what_statistics_share_is_added_once(size, tmp_path):
    numbers = torch.logspace(-4, 4, 13)[torch.randperm(13, generator=torch.Generator().manual_seed(0))][:, None]
    exact = (numbers.double() ** 2).sum().item()
    for found in (summed(ALONE, numbers), *run_team(size, summed, tmp_path, numbers)):
        alone = found[2] == 1
        assert found == (pytest.approx(exact, rel=1e-6), 13, 1 if alone else size, 7)


def test_parts_are_whole_batches_and_cover_all_sequences():
    for n, batch_size in [(11, 1), (11, 2), (7, 3), (1, 1), (64, 4)]:
        for size in range(1, -(-n // batch_size) + 1):
            parts = [Team(rank, size).part(n, batch_size) for rank in range(size)]
            assert [i for part in parts for i in range(n)[part]] == list(range(n))
            assert all(part.start % batch_size == 0 and part.stop > part.start for part in parts)
    with refused("3 processes for 2 batches: use fewer"):
        Team(0, 3).part(11, 8)


def test_work_is_shared_out_evenly_and_always_alike():
    costs = {name: cost for name, cost in zip("abcdef", (4, 9, 1, 4, 4, 2))}
    owner = Team(0, 3).share_out(costs)
    assert owner == Team(2, 3).share_out(costs) and list(owner) == list(costs)
    assert sorted(sum(costs[n] for n in costs if owner[n] == r) for r in range(3)) == [7, 8, 9]
    assert set(ALONE.share_out(costs).values()) == {0}


def echo(team):
    "Sends values of all kinds from process 1; process 0 makes one of its own."
    value = dict(a=torch.arange(3), b=(torch.ones(2, 2, dtype=torch.bfloat16).mT, None), c="text", d=torch.zeros(0))
    return team.broadcast(value if team.rank == 1 else None, 1), team.first(lambda: ("made by", team.rank))


def late(team):
    "The first process comes late to the second meeting; the others wait for it."
    team.meet()
    if team.rank == 0:
        time.sleep(0.5)
    start = time.monotonic()
    team.meet()
    waited = time.monotonic() - start
    return [team.broadcast(waited, rank) for rank in range(team.size)][team.rank]  # none leaves before all have met


def talks(team):
    "All that three processes have to say to each other, one after the other."
    return echo(team), late(team), speaks_first(team)


def test_processes_send_values_wait_for_the_first_and_say_things_once(tmp_path):
    echoes, (first, *others), spoke = zip(*run_team(3, talks, tmp_path))
    sent = dict(a=torch.arange(3), b=(torch.ones(2, 2).bfloat16(), None), c="text", d=torch.zeros(0))
    assert all(same(found, (sent, ("made by", 0))) for found in echoes)
    assert first < 0.3 and all(waited > 0.3 for waited in others)
    assert sorted(spoke) == [False, False, True]
    ALONE.meet()
    assert speaks_first(ALONE) and speaks_first(ALONE)


def other_weights(team):
    "Process 1 has a model of its own."
    model = small()
    if team.rank == 1:
        model.model.layers[0].mlp.up_proj.weight[0, 3] += 1e-3
    try:
        quantize_model(model, TOKENS, CASES["gptq"][1], team=team)
    except AespaError as e:
        return str(e)


def test_all_must_have_the_same_model(tmp_path):
    said = run_team(2, other_weights, tmp_path)
    assert said[1] == "process 1 has other weights than the first: give all of them the same files"
    assert said[0].startswith("lost another process")


def dies(team):
    "Process 1 is killed while the others wait for its sums."
    try:
        team.meet()  # all have joined
        if team.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        outcome("gptq", team)
    except AespaError as e:
        sys.exit(7 if str(e).startswith("lost another process") else 8)


def test_who_loses_a_process_stops(tmp_path):
    assert started(3, dies, tmp_path, seconds=30) == [7, -signal.SIGKILL, 7]


ONE_PROCESS = [
    (dict(tuning=3), "tuning learns from all sequences at once: use one process"),
    (dict(end_to_end=3), "tuning learns from all sequences at once: use one process"),
    (dict(method="signround"), "method 'signround' learns"),
    (dict(device="cuda"), r"process 1 of this machine has no GPU of its own \(1 here\)"),
]


@pytest.mark.parametrize(("changes", "message"), ONE_PROCESS)
def test_what_a_team_cannot_do_is_refused(changes, message, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    config = AespaConfig.preset("gptq", **changes)
    with refused(message):
        check_team(Team(1, 3), config)
    check_team(ALONE, config)


def test_without_the_variables_of_a_launcher_a_process_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as team:
        assert team == ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused("WORLD_SIZE is 2 but RANK"), joined():
        pass
    monkeypatch.setenv("RANK", "x")
    with refused("RANK=x is no number"), joined():
        pass
    monkeypatch.delenv("RANK")
    assert main([]) == 2


def test_only_quantize_runs_on_many_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert main(["eval", "reference"]) == 2
        assert ("eval runs in one process" in capsys.readouterr().err) == said


WORDS = "--preset gptq --keep mlp=16 --samples 8 --seqlen 64 --eval-samples 2 --quiet".split()


def test_a_killed_run_of_two_processes_goes_on_in_one(tmp_path):
    model, tokenizer, *_ = load_reference()
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:2], 2
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = ["quantize", str(tmp_path / "model"), *WORDS, "--out"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    run = subprocess.Popen([*launch, "-m", "aespa_nb", *command, tmp_path / "two"], stderr=subprocess.DEVNULL)
    journal, start = tmp_path / "two/.unfinished/journal", time.monotonic()
    while not any(journal.glob("*.safetensors")):
        assert run.poll() is None and time.monotonic() - start < 100
        time.sleep(0.01)
    workers = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert run.wait(20) != 0 and not (tmp_path / "two/results.json").exists()
    assert main([*command, str(tmp_path / "two"), "--resume"]) == 0
    assert main([*command, str(tmp_path / "one")]) == 0
    two, one = (json.loads((tmp_path / name / "quantization.json").read_text())["layers"] for name in ("two", "one"))
    assert [row["layer"] for row in two] == [row["layer"] for row in one]
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=0.1)
