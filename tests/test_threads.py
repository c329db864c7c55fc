"""The same bits on any number of threads."""

import copy

import pytest
import torch
from aespa_nb import AespaConfig, quantize_model
from aespa_nb.data import load_reference


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


RESULTS = {}


@pytest.mark.parametrize("preset", ["aespa", "zfold", "max"])
def test_codes_do_not_depend_on_the_number_of_threads(preset, threads):
    reference = load_reference()
    model = copy.deepcopy(reference.model)
    del model.model.layers[1:]
    changes = {"iterations": 4} | ({"tuning": 2} if preset == "max" else {})
    report = quantize_model(model, reference.calib[:2], AespaConfig.preset(preset, 2, **changes))
    codes = torch.cat([r.W_int.flatten() for r in report.layers.values()])
    steps = torch.cat([r.grid.step.flatten() for r in report.layers.values()])
    first = RESULTS.setdefault(preset, (codes, steps))
    assert torch.equal(codes, first[0]) and torch.equal(steps, first[1])
