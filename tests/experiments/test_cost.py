"""What a run costs: counted work against formulas, phases that sum up, an estimate beside what happens; memory."""

import functools
import time

import pytest
import torch
from aespa_nb import AespaConfig, quantize_model
from aespa_nb.model.memory import out_of_memory
from aespa_nb.errors import UnsupportedModelError
from aespa_nb.experiments.cost import (
    SHAPES,
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
from models import refused, small, unchanged


def random_tokens(seqs, seqlen):
    return torch.randint(0, 256, (seqs, seqlen), generator=torch.Generator().manual_seed(0))


def test_fused_attention_is_counted_as_its_products():
    Q, K = torch.randn(1, 4, 9, 16), torch.randn(1, 4, 9, 16)
    fused, products = flop_counter(), flop_counter()
    with torch.no_grad(), fused:
        torch.nn.functional.scaled_dot_product_attention(Q, K, K)
    with torch.no_grad(), products:
        (Q @ K.mT).softmax(-1) @ K
    assert fused.get_total_flops() == products.get_total_flops() == 4 * 4 * 9 * 9 * 16


def test_counted_work_is_that_of_the_formulas():
    d, mlp, kv = SHAPES["tiny"]["hidden_size"], SHAPES["tiny"]["intermediate_size"], 32
    linears, attention = 2 * (d * (2 * d + 2 * kv) + 3 * d * mlp), 4 * 32 * d
    recipe, inputs = dict(bits=3, grid="minmax", solver="gptq"), (random_model("tiny", 2, 32), random_tokens(4, 32))
    work = lambda objective: count_work(*inputs, AespaConfig(objective=objective, **recipe))
    layer_wise = work("layer")
    assert layer_wise["hand-over"] == 2 * 128 * (linears + attention)
    below = 128 * (mlp - 128)  # of two blocks of columns, what lies below the diagonal is not added up
    assert layer_wise["hessians"] == 2 * 2 * 128 * (3 * d**2 + mlp**2 - below)
    for objective in ("attention", "gauss-newton"):  # the matrices of V are computed for each head
        assert work(objective)["attention"] > 2 * 4 * 4 * (2 * 32 * 32 * d + 2 * 32 * d * d)


def test_the_estimate_knows_what_learning_end_to_end_takes():
    model, tokens = random_model("tiny", 2, 16), random_tokens(4, 16)
    recipe = functools.partial(AespaConfig, bits=3, objective="layer", solver="adaround", iterations=2)
    config, plain = recipe(end_loss=True, end_to_end=6), estimate_run(model, tokens, recipe())
    with flop_counter() as counter:
        with unchanged(model):
            ends = estimate_run(model, tokens, config, clock=counter.get_total_flops)
        with timed(counter.get_total_flops) as work:
            quantize_model(model, tokens, config)
    told = ends.seconds
    assert 0.75 < told["end to end"] / work["end to end"] < 1.35
    assert 0.75 < told["forward"] / work["forward"] < 1.35
    metrics = 2 * 4 * (2 * 64**2 + 2 * 32**2 + 2 * 176**2 + 64**2)  # of the outputs of all linears
    assert ends.temporary_bytes > plain.temporary_bytes + metrics  # and hidden states of both models


def test_one_of_each_kind_and_everything_is_put_back():
    model = random_model("tiny", 4, 16)
    layers = model.model.layers
    layers[2].mlp.up_proj = torch.nn.Linear(64, 176)  # with a bias
    blocks = list(layers)
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    with unchanged(model), pytest.raises(RuntimeError), one_of_each(model) as times:
        assert {id(b) for b in layers} == {id(blocks[0]), id(blocks[2])}
        assert times == pytest.approx(sum(sizes) / (sizes[0] + sizes[2]))
        quantize_model(model, random_tokens(2, 16), AespaConfig.preset("rtn", 2))
        raise RuntimeError
    assert [id(b) for b in layers] == [id(b) for b in blocks]


def test_bad_input_is_refused():
    model = random_model("tiny", 1, 16)
    for f, said in (
        (lambda: random_model("tiny", 0), "at least 1"),
        (lambda: estimate_run(model, random_tokens(2, 8), AespaConfig(keep={"magic": 4})), "magic"),
    ):
        with refused(said):
            f()


@pytest.mark.parametrize("preset", ["gptq", "best", "awq"])
def test_an_estimate_is_what_happens(preset, tmp_path):
    small("llama").half().save_pretrained(tmp_path / "model")
    model = load_checkpoint(str(tmp_path / "model"))[0]
    tokens, heldout = torch.randint(0, 64, (96, 32)), torch.randint(0, 64, (8, 32))
    config = AespaConfig.preset(preset, 4, iterations=40)
    with unchanged(model):
        said = estimate_run(model, tokens, config, heldout, clock=time.process_time)
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
