"""What a run costs: counted work against formulas, phases that sum up, an estimate beside what happens; memory."""

import functools
import json
import time
import warnings
from pathlib import Path

import pytest
import torch
from aespa_nb import AespaConfig, AespaError, quantize_model
from aespa_nb.attention.forward import Rotations
from aespa_nb.attention.gauss_newton import GaussNewtonStatistics, out_of_memory
from aespa_nb.errors import UnsupportedModelError
from aespa_nb.experiments.cost import (
    SHAPES,
    TOKEN_PHASES,
    Estimate,
    count_work,
    estimate_run,
    flop_counter,
    one_of_each,
    random_model,
)
from aespa_nb.model.checkpoint import load_checkpoint
from aespa_nb.model.phases import timed
from aespa_nb.options import one_line
from aespa_nb.quantize.config import PRESETS
from aespa_nb.rounding.hessian import Gram
from models import small

PHASES = {*TOKEN_PHASES, "end to end", *"other survey target grid gptq descent adam tuning block".split()}


def counted(f):
    with torch.no_grad(), flop_counter() as counter:
        f()
    return counter.get_total_flops()


def random_tokens(seqs, seqlen):
    return torch.randint(0, 256, (seqs, seqlen), generator=torch.Generator().manual_seed(0))


def test_the_counter_knows_what_we_use():
    X, A = torch.randn(2, 5, 7), torch.eye(6).expand(2, 6, 6)
    assert counted(lambda: Gram(5).add(X)) == 2 * 14 * 5 * 5
    assert counted(lambda: torch.linalg.cholesky_ex(A)) == 2 * 6**3 // 3
    assert counted(lambda: torch.linalg.solve_triangular(A, A, upper=False)) == 2 * 6**3
    Q, K = torch.randn(1, 4, 9, 16), torch.randn(1, 4, 9, 16)
    fused = torch.nn.functional.scaled_dot_product_attention
    assert counted(lambda: fused(Q, K, K)) == counted(lambda: (Q @ K.mT).softmax(-1) @ K) == 4 * 4 * 9 * 9 * 16


@pytest.mark.parametrize("preset", PRESETS)
def test_every_phase_has_its_seconds(preset):
    config = AespaConfig.preset(preset, 3, iterations=2, **({"end_to_end": 2} if preset == "max" else {}))
    with timed() as seconds:
        quantize_model(random_model("tiny", 1, 32), random_tokens(4, 32), config)
    assert set(seconds) <= PHASES and all(s >= 0 for s in seconds.values())
    whole = config.method != "layers"  # rounds a block at once
    expected = {"gptq": "gptq", "adaround": "adam", "aespa": "attention", "best": "descent", "max": "end to end"}
    assert {"embed", "hand-over", expected.get(preset, "embed")} <= set(seconds)
    assert ({"block"} if whole else {"forward", "hessians", "grid"}) <= set(seconds)


def test_counted_work_is_that_of_the_formulas():
    d, mlp, kv = SHAPES["tiny"]["hidden_size"], SHAPES["tiny"]["intermediate_size"], 32
    linears, attention = 2 * (d * (2 * d + 2 * kv) + 3 * d * mlp), 4 * 32 * d
    recipe, inputs = dict(bits=3, grid="minmax", solver="gptq"), (random_model("tiny", 2, 32), random_tokens(4, 32))
    work = lambda objective: count_work(*inputs, AespaConfig(objective=objective, **recipe))
    layer_wise = work("layer")
    assert layer_wise["hand-over"] == 2 * 128 * (linears + attention)
    assert layer_wise["hessians"] == 2 * 2 * 128 * (3 * d**2 + mlp**2)
    for objective in ("attention", "gauss-newton"):  # the matrices of V are computed for each head
        assert work(objective)["attention"] > 2 * 4 * 4 * (2 * 32 * 32 * d + 2 * 32 * d * d)


def test_the_estimate_knows_what_learning_end_to_end_takes():
    model, tokens = random_model("tiny", 2, 32), random_tokens(4, 32)
    recipe = functools.partial(AespaConfig, bits=3, objective="layer", solver="adaround", iterations=2)
    config, before = recipe(end_loss=True, end_to_end=8), model.model.norm.weight.data.clone()
    with flop_counter() as counter:
        told = estimate_run(model, tokens, config, clock=counter.get_total_flops).seconds
        assert torch.equal(model.model.norm.weight, before)
        with timed(counter.get_total_flops) as work:
            quantize_model(model, tokens, config)
    assert 0.75 < told["end to end"] / work["end to end"] < 1.35
    assert 0.75 < told["forward"] / work["forward"] < 1.35
    plain, ends = (estimate_run(model, tokens, c).temporary_bytes for c in (recipe(), config))
    assert ends > plain + 2 * 4 * (2 * 64**2 + 2 * 32**2 + 2 * 176**2 + 64**2)  # and hidden states of both models


def test_one_of_each_kind_and_everything_is_put_back():
    model = random_model("tiny", 4, 16)
    layers = model.model.layers
    layers[2].mlp.up_proj = torch.nn.Linear(64, 176)  # with a bias
    blocks, before = list(layers), [p.detach().clone() for p in model.parameters()]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    with pytest.raises(RuntimeError), one_of_each(model) as times:
        assert {id(b) for b in layers} == {id(blocks[0]), id(blocks[2])}
        assert times == pytest.approx(sum(sizes) / (sizes[0] + sizes[2]))
        quantize_model(model, random_tokens(2, 16), AespaConfig.preset("rtn", 2))
        raise RuntimeError
    assert [id(b) for b in layers] == [id(b) for b in blocks]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_bad_input_is_refused():
    model = random_model("tiny", 1, 16)
    for f, said in (
        (lambda: random_model("llama-8b"), "unknown shape 'llama-8b'"),
        (lambda: random_model("tiny", 0), "at least 1"),
        (lambda: estimate_run(model, random_tokens(2, 8), AespaConfig(keep={"magic": 4})), "magic"),
    ):
        with pytest.raises(AespaError, match=said):
            f()


@pytest.mark.parametrize("preset", ["gptq", "best", "awq"])
def test_an_estimate_is_what_happens(preset, tmp_path):
    small("llama").half().save_pretrained(tmp_path / "model")
    model = load_checkpoint(str(tmp_path / "model"))[0]
    tokens, heldout = torch.randint(0, 64, (96, 32)), torch.randint(0, 64, (8, 32))
    config = AespaConfig.preset(preset, 4, iterations=40)
    before = [p.detach().clone() for p in model.parameters()]
    said = estimate_run(model, tokens, config, heldout, clock=time.process_time)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    start = time.process_time()
    quantize_model(model, tokens, config, journal=tmp_path / "journal")
    ratio = sum(s for name, s in said.seconds.items() if name != "evaluate") / (time.process_time() - start)
    assert 1 / 3 < ratio < 3 and said.seconds["evaluate"] > 0  # the model is tiny: much of this is overhead
    blocks = sum(p.nbytes for p in model.model.layers.parameters())
    streams = 1 if preset == "gptq" else 2
    assert said.temporary_bytes == blocks + streams * 96 * 32 * 32 * 4
    assert said.memory_bytes > 2**27 and said.device_bytes == 0


def test_an_estimate_says_what_is_short(monkeypatch, tmp_path):
    sizes = dict(memory_bytes=2**30, device_bytes=0, out_bytes=3 * 2**30, temporary_bytes=2**20, trial_seconds=1.0)
    said = Estimate(dict(grid=100.0, evaluate=200.0), **sizes, out=str(tmp_path / "new"))
    free = lambda n: lambda *_: type("Free", (), dict(available=n, free=n))()
    monkeypatch.setattr("psutil.virtual_memory", free(2**40))
    monkeypatch.setattr("shutil.disk_usage", free(2**40))
    assert said.shortages() == [] and "It fits" in str(said) and "5.0 min" in str(said)
    monkeypatch.setattr("shutil.disk_usage", free(2**31))
    assert "larger disk" in said.shortages()[0] and "It does not fit" in str(said)
    monkeypatch.setattr("psutil.virtual_memory", free(-(2**40)))
    assert "fewer samples don't help" in said.shortages()[0]


def test_stored_growth_is_linear_in_time_and_flat_in_memory():
    rows = json.loads(Path("nbs/runs/cost.json").read_text())
    for preset in {r["preset"] for r in rows}:
        own = [r for r in rows if r["preset"] == preset and r["shape"] == "medium" and r["seqlen"] == 128]
        own.sort(key=lambda r: r["seqs"])
        read = lambda r: sum(s for name, s in r["phases"].items() if name in TOKEN_PHASES)
        growth = own[-1]["seqs"] / own[0]["seqs"]
        assert 0.5 * growth < read(own[-1]) / read(own[0]) < 2 * growth
        assert own[-1]["peak_bytes"] < 1.25 * own[0]["peak_bytes"]


OUT_OF_MEMORY = {
    "python": MemoryError(),
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "linux": RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you"),
    "windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
}


@pytest.mark.parametrize("system", OUT_OF_MEMORY)
def test_out_of_memory_says_what_to_change(system):
    error = OUT_OF_MEMORY[system]
    assert all(way in one_line(error) for way in ("out of memory", "--seqlen", "gptq", "fewer samples do not help"))
    passed_on = UnsupportedModelError("the block fails by itself")  # as by `survey`
    passed_on.__cause__ = error
    assert "--seqlen" in one_line(passed_on)


def test_other_errors_stay_what_they_are():
    assert one_line(RuntimeError("shapes")) is None and one_line(UnsupportedModelError("no blocks")) == "no blocks"
    assert not out_of_memory(None)


@pytest.mark.parametrize("rotated", [True, False])
def test_statistics_survive_with_smaller_tiles(monkeypatch, rotated):
    torch.manual_seed(0)
    angles = torch.outer(torch.arange(24.0), torch.rand(4)).T.repeat(2, 1)
    R = Rotations(angles.cos(), angles.sin()) if rotated else None
    X, Q, K, V = torch.randn(2, 16, 24), torch.randn(2, 4, 8, 24), torch.randn(2, 2, 8, 24), torch.randn(2, 2, 8, 24)
    A = torch.rand(2, 4, 24, 24).tril().softmax(-1)
    make = lambda: GaussNewtonStatistics((4, 2, 8, 16), R, stride=2, coarse=1, dtype=torch.float64)
    whole, parts, real = make(), make(), torch.Tensor.addmm_
    whole.add(X, Q, K, V, A)

    def stingy(total, a, b, **options):
        if a.shape[1] > 100 and total.shape == (8, 8):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(total, a, b, **options)

    monkeypatch.setattr(torch.Tensor, "addmm_", stingy)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        parts.add(X, Q, K, V, A)
    assert any("out of memory in a tile of 12 queries: on with 6" in str(w.message) for w in said)
    for role, loss in whole.losses().items():
        assert torch.allclose(loss.H, parts.losses()[role].H) and (
            loss.G is None or torch.allclose(loss.G, parts.losses()[role].G)
        )
