"""The same bits on any number of threads."""

import os

import pytest
import torch
from aespa_nb import AespaConfig, quantize_model
from aespa_nb.attention.kronecker_losses import KroneckerLoss
from aespa_nb.cli import main
from aespa_nb.data.text import load_reference
from aespa_nb.quantize.layer import round_layer


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


RESULTS = {}


@pytest.mark.parametrize("preset", ["aespa", "zfold", "best"])
def test_codes_do_not_depend_on_the_number_of_threads(preset, threads):
    reference = load_reference()
    model = reference.model
    del model.model.layers[1:]
    kept = ["gate_proj", "down_proj"] + ["up_proj"] * (preset != "best")  # with the loss of `best` its rows are coupled
    changes = dict(iterations=2, tuning=2 * (preset == "best"), keep=dict.fromkeys(kept, 16))
    report = quantize_model(model, reference.calib[:2, :128], AespaConfig.preset(preset, 2, **changes))
    codes = torch.cat([r.codes.flatten() for r in report.layers.values()])
    steps = torch.cat([r.grid.scale.flatten() for r in report.layers.values()])
    first = RESULTS.setdefault(preset, (codes, steps))
    assert torch.equal(codes, first[0]) and torch.equal(steps, first[1])


@pytest.mark.parametrize("solver", ["gptq+adaround", "descent"])
@pytest.mark.parametrize("heads", [None, 4])
def test_parts_side_by_side_are_the_parts_one_by_one(solver, heads, threads):
    g = torch.Generator().manual_seed(0)
    W, X = torch.randn(512, 256, generator=g), torch.randn(256, 512, generator=g)
    G = None if heads is None else (A := torch.randn(heads, 128, 128, generator=g)) @ A.mT
    found = round_layer(W, KroneckerLoss(X @ X.mT, G).damped(), AespaConfig(bits=2, solver=solver, iterations=20))
    first = RESULTS.setdefault((solver, heads), found)
    assert torch.equal(found.codes, first.codes) and torch.equal(found.grid.scale, first.grid.scale)
    assert torch.get_num_threads() == threads


def test_long_sums_in_products(threads):
    "MKL would cut them between threads, had it not been told (conftest.py)."
    X = torch.randn(64, 8192, generator=torch.Generator().manual_seed(0))
    first = RESULTS.setdefault("product", X @ X.mT)
    assert torch.equal(X @ X.mT, first)


@pytest.mark.parametrize("busy", [10.0, 60.0])
def test_the_command_line_asks_for_such_products_and_beside_other_work_for_threads_that_sleep(monkeypatch, busy):
    monkeypatch.delenv("MKL_CBWR")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr("psutil.cpu_percent", lambda seconds: busy)
    assert main(["eval", "/nowhere"]) == 2
    assert os.environ["MKL_CBWR"] == "AUTO,STRICT"
    assert os.environ.get("OMP_WAIT_POLICY") == ("PASSIVE" if busy > 25 else None)
    monkeypatch.setenv("MKL_CBWR", "AVX2")  # who asks for something else gets it
    main(["eval", "/nowhere"])
    assert os.environ["MKL_CBWR"] == "AVX2"
