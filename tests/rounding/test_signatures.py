"What the functions of rounding say about shapes is true, of layers without heads and with two."

import pytest
import torch
from models import checked
from rounding.problems import layer

from aespa_nb.rounding import adaround, gptq, grid, grid_search, hessian, target, zfold

CALLS = []  # a module, a function of it, arguments
for heads in ((), (2,)):
    W, H = layer(3, heads=heads)
    coarse = grid.minmax_grid(W, 3, 4)
    (base, V), (scale, zero) = adaround.relaxed_start(W, coarse), coarse.expand(12)
    dW, h = coarse.round(W) - W, adaround.rectified_sigmoid(V)
    blocks = grid_search.group_hessians(H, 4)
    loss = lambda dW, H=H: hessian.quadratic_loss(dW, H)
    CALLS += [
        (adaround, "adaround", W, coarse, loss, None, 2),
        (adaround, "relaxed_start", W, coarse),
        (adaround, "rectified_sigmoid", V),
        (adaround, "penalty_gradient", h, 3.0),
        (adaround, "logit_gradient", dW, V.sigmoid(), h),
        (gptq, "gptq", W, H, coarse),
        (gptq, "gptq", W, H[0] if heads else H, coarse),
        (gptq, "processing_order", H),
        (gptq, "inverse_factor", H),
        (grid, "minmax_grid", W, 3, 4),
        (grid, "grouped", W, 4),
        (grid, "to_codes", W, scale, zero, 7),
        (grid, "to_values", coarse.codes(W), scale, zero),
        (grid_search, "fit_grid", W, H, 3, 4, False, 5),
        (grid_search, "group_hessians", H, 4),
        (grid_search, "row_loss", grid.grouped(dW, 4), blocks),
        (hessian, "damp", H),
        (hessian, "quadratic_loss", dW, H),
        (zfold, "zfold", [W, W], [H, H], 2),
        (zfold, "scale_hessian", H, torch.ones(12, dtype=W.dtype)),
        (zfold, "solve_zeta", [W], [W], [H]),
    ]
    if not heads:
        CALLS += [(target, "error_map", H, H), (target, "best_share", W, H, H, H)]
        CALLS += [(target, "full_precision_target", W, H, 0.5)]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[1])
def test_shapes_are_as_annotated(call):
    module, name, *args = call
    checked(module, name)(*args)
