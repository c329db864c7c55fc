"""The same bits on any number of threads."""

import os

import pytest
import torch
from aespa_nb import AespaConfig, quantize_model
from aespa_nb.cli import main
from aespa_nb.data.text import load_reference


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


def test_long_sums_in_products(threads):
    "MKL would cut them between threads, had it not been told (conftest.py)."
    X = torch.randn(64, 8192, generator=torch.Generator().manual_seed(0))
    first = RESULTS.setdefault("product", X @ X.mT)
    assert torch.equal(X @ X.mT, first)


def test_the_command_line_asks_for_such_products_and_for_threads_that_sleep(monkeypatch):
    monkeypatch.delenv("MKL_CBWR")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert main(["eval", "/nowhere"]) == 2
    assert os.environ["MKL_CBWR"] == "AUTO,STRICT" and os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("MKL_CBWR", "AVX2")  # who asks for something else gets it
    main(["eval", "/nowhere"])
    assert os.environ["MKL_CBWR"] == "AVX2"
