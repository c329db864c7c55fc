"""`aespa_nb bench`: counted work against PyTorch's counter, phases that sum up, and the command."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from aespa_nb import AespaConfig, AespaError
from aespa_nb.quantize.config import PRESETS
from aespa_nb.experiments.cost import (
    PHASES,
    SHAPES,
    TOKEN_PHASES,
    Machine,
    Meter,
    Work,
    adam_work,
    bench,
    bench_summary,
    cost_model,
    descent_work,
    extrapolate,
    forward_work,
    gauss_newton_work,
    gptq_work,
    gram_work,
    growth_point,
    measure_growth,
    metering,
    random_tokens,
    search_work,
    shape_config,
    shape_model,
    value_work,
)
from aespa_nb.attention.forward import attention_output, repeat_kv
from aespa_nb.model.capture import capturing, capture_attention
from aespa_nb.model.stream import BlockStream
from aespa_nb.cli import main
from aespa_nb.rounding.descent import descend
from aespa_nb.attention.gauss_newton import GaussNewtonStatistics
from aespa_nb.rounding.gptq import gptq
from aespa_nb.rounding.grid import minmax_grid
from aespa_nb.rounding.grid_search import fit_grid
from aespa_nb.rounding.hessian import Gram
from aespa_nb.model.statistics import survey
from torch.utils.flop_counter import FlopCounterMode

IN_PLACE = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}


def counted(f):
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        f()
    return counter.get_total_flops()


def quick(preset, **changes):
    return AespaConfig.preset(preset, **{"bits": 3, "iterations": 5, **changes})


@pytest.fixture(scope="module")
def reports():
    "A run of every preset on two tiny blocks and 4 x 32 tokens."
    models = {preset: shape_model("tiny", 2, 32) for preset in PRESETS}
    return {preset: bench(m, random_tokens(m, 4, 32), quick(preset)) for preset, m in models.items()}


@pytest.mark.parametrize("seqs, tok", [(1, 8), (3, 17)])
@pytest.mark.parametrize("shape", ["tiny", "small"])
def test_forward_flops_are_those_of_pytorch(shape, seqs, tok):
    model = shape_model(shape, 1, tok)
    block, (heads, d_head) = model.model.layers[0], (4, SHAPES[shape][0] // 4)
    with capturing(model), contextlib.closing(BlockStream(model, random_tokens(model, seqs, tok))) as stream:
        # the counter does not know the fused attention, so we do the same by hand
        with capture_attention(lambda m, Q, K, V, A: attention_output(A[:], repeat_kv(V, heads))):
            assert counted(lambda: stream.run(block)) == forward_work(block, heads, d_head, seqs, tok).flops


@pytest.mark.parametrize("stride, coarse", [(1, 1), (8, 2), (4, 4)])
def test_statistics_flops(stride, coarse):
    model = shape_model("tiny", 1, 64)
    with capturing(model), contextlib.closing(BlockStream(model, random_tokens(model, 1, 64))) as stream:
        rotation = survey(model, model.model.layers[0], stream).attentions[0].roles["q"].rotation
    X, Q = torch.randn(2, 64, 64), torch.randn(2, 4, 16, 64)
    A = torch.rand(2, 4, 64, 64).tril()
    stats = GaussNewtonStatistics(4, 2, 16, 64, rotation, stride=stride, coarse=coarse)
    ours = counted(lambda: stats.add(X, Q, Q[:, :2], Q[:, 2:], A))
    exact = gram_work(128, 64) + value_work(2, 64, 4, 64)
    about = gauss_newton_work(2, 64, 4, 2, 16, 64, stride, coarse).flops
    assert 0.7 < (ours - exact.flops) / about < 2
    gram = Gram(64)
    assert counted(lambda: gram.add(X)) == gram_work(128, 64).flops


@pytest.mark.parametrize("group_size", [None, 16])
def test_solver_flops(group_size):
    W, H = torch.randn(24, 64), torch.eye(64) + 0.1
    assert counted(lambda: fit_grid(W, H, 2, group_size, n_clip=7)) == search_work(24, 64, 14, group_size).flops
    grid = minmax_grid(W, 2, group_size)
    products = counted(lambda: gptq(W, H, grid, block_size=4))
    assert 0 < products < gptq_work(24, 64).flops < 3 * products + 2 * 64**3
    run = lambda: descend(W, grid, H, sweeps=(10, 0), backend="torch")
    assert 0.7 < counted(run) / descent_work(24, 64, len(run().losses) - 1).flops <= 1
    assert descent_work(24, 64, 10, needed=True).flops < adam_work(24, 64, 10).flops * 1.01


@pytest.mark.parametrize("preset", PRESETS)
def test_phases_sum_up_to_the_run(reports, preset):
    report = reports[preset]
    assert sum(p.seconds for p in report.phases.values()) == pytest.approx(report.seconds)
    assert set(report.phases) <= set(PHASES) and all(p.seconds >= 0 for p in report.phases.values())
    assert report.phases["other"].seconds < 0.5 * report.seconds
    whole = AespaConfig.preset(preset).method != "layers"  # rounds a block at once
    phases = {"embed", "hand-over"} | ({"block"} if whole else {"forward", "Hessians", "grid"})
    assert phases <= set(report.phases)
    expected = {"gptq": "GPTQ", "adaround": "Adam", "aespa": "attention", "best": "descent", "max": "tuning"}
    assert preset not in expected or report.phases[expected[preset]].work.flops > 0


def test_counted_work_is_the_cost_model(reports):
    paper = cost_model(shape_config("tiny", 2, 32), 4, 32)
    flops = {preset: {name: p.work.flops for name, p in r.phases.items()} for preset, r in reports.items()}
    assert flops["gptq"]["hand-over"] == paper["one forward pass"].flops
    assert flops["best"]["hand-over"] == paper["one forward pass"].flops  # the other stream moves on as it is read
    assert flops["gptq"]["Hessians"] == paper["Hessians of the inputs"].flops
    assert flops["aespa"]["attention"] == paper["Hessians of V"].flops
    both = paper["Hessians of V"] + paper["Gauss-Newton for Q and K"]
    assert flops["best"]["attention"] == pytest.approx(both.flops)


def test_llama_7b_on_paper():
    "The orders of magnitude that everybody can work out on the back of an envelope."
    paper = {name: work.flops for name, work in cost_model(shape_config("llama-7b"), 128, 2048).items()}
    assert paper["one forward pass"] == pytest.approx(2 * 6.5e9 * 128 * 2048, rel=0.1)
    assert paper["Hessians of the inputs"] == pytest.approx(3e15, rel=0.1)
    assert paper["Hessians of V"] == pytest.approx(1.3e16, rel=0.1)
    assert paper["10 sweeps, needed"] == pytest.approx(7e14, rel=0.1)
    assert paper["2000 Adam steps"] == pytest.approx(1.5e17, rel=0.1)


def test_extrapolation_is_proportion(reports):
    report = reports["best"]
    same, whole = extrapolate(report, 2, 128), extrapolate(report, 8, 1280)
    for name, phase in report.phases.items():
        assert same[name] == pytest.approx(phase.seconds)
        grow = 10 if name == "embed" else 40 if name in TOKEN_PHASES else 4
        assert whole[name] == pytest.approx(grow * phase.seconds)
    assert "whole model" in bench_summary(report, 8)


def test_everything_is_put_back_after_an_error():
    model, names = shape_model("tiny", 1, 16), [Gram.add, BlockStream.run]
    with pytest.raises(RuntimeError), metering(model, Meter()):
        assert Gram.add is not names[0]
        raise RuntimeError
    assert [Gram.add, BlockStream.run] == names and "__init__" not in vars(BlockStream)
    assert not any(m._forward_hooks for m in model.modules())


def test_floor_is_the_slower_of_computing_and_moving():
    machine = Machine(100, 10)
    assert machine.floor(Work(200, 1)) == 2 and machine.floor(Work(1, 200)) == 20


def test_growth_keeps_what_it_has(tmp_path):
    path = tmp_path / "cost.json"
    few = dict(presets=("rtn",), seqs=(1,), blocks=(), seqlens=())
    known = growth_point("rtn", 1, 1, 128, "medium")
    path.write_text(json.dumps([known]))
    assert measure_growth(path, **few) == [known]
    rows = measure_growth(path, **{**few, "seqs": (1, 2)})
    assert [r["seqs"] for r in rows] == [1, 2] and json.loads(path.read_text()) == rows


def test_stored_growth_is_linear_in_time_and_flat_in_memory():
    rows = json.loads(Path("nbs/runs/cost.json").read_text())
    for preset in {r["preset"] for r in rows}:
        own = [r for r in rows if r["preset"] == preset and r["shape"] == "medium" and r["seqlen"] == 128]
        own.sort(key=lambda r: r["seqs"])
        read = lambda r: sum(s for name, s in r["phases"].items() if name in TOKEN_PHASES)
        growth = own[-1]["seqs"] / own[0]["seqs"]
        assert 0.5 * growth < read(own[-1]) / read(own[0]) < 2 * growth
        assert own[-1]["peak_bytes"] < 1.2 * own[0]["peak_bytes"]


TINY = ["--shape", "tiny", "--samples", "2", "--seqlen", "16"]


def test_command(capsys):
    assert main(["bench", *TINY, "--blocks", "1"]) == 0
    printed = capsys.readouterr().out
    for word in ("tiny, best, 2 bits: 2 x 16 tokens", "descent", "x floor", "GFLOP/s", "4 blocks, 262144 tokens"):
        assert word in printed
    assert main(["bench", "reference", "--preset", "rtn", "--samples", "1", "--seqlen", "16"]) == 0
    assert "reference, rtn" in capsys.readouterr().out


BAD = {
    "shape": (["--shape", "llama-8b"], "unknown shape 'llama-8b'"),
    "both": (["reference", "--shape", "tiny"], "not both"),
    "blocks": ([*TINY, "--blocks", "0"], "at least 1"),
    "samples": (["--shape", "tiny", "--samples", "0"], "samples"),
    "seqlen": (["reference", "--seqlen", "100000"], "seqlen"),
    "preset": ([*TINY, "--preset", "magic"], "choose one of"),
    "model": (["./not/there"], "no model folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, capsys):
    words, message = BAD[case]
    assert main(["bench", *words]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1 and printed.startswith("aespa_nb: error: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_plainly(capsys):
    assert main(["bench", *TINY, "--device", "cuda"]) == 2
    assert "--device cuda can't be used here" in capsys.readouterr().err
    with pytest.raises(AespaError):
        shape_model("tiny", -1)
