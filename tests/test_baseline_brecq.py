"BRECQ: rounding variables of a block; its limit in a single linear, the Fisher weights, and what is refused."

import pytest
import torch
from models import small
from test_baseline_signround import KINDS, TOKENS, error, nearest, tasks, tiny, weights  # noqa: F401
from torch.testing import assert_close

from aespa_nb.rounding.adaround import logit_gradient, loss_gradient, rectified_sigmoid
from aespa_nb.quantize.config import AespaConfig
from aespa_nb.quantize.model import quantize_model
from aespa_nb.baselines.brecq import BlockRounding, _fit_grids, brecq, fisher_importance
from aespa_nb.model.blocks import stacks_of
from aespa_nb.model.capture import capturing
from aespa_nb.rounding.grid import minmax_grid
from aespa_nb.rounding.grid_search import fit_grid
from aespa_nb.rounding.hessian import damp, quadratic_loss
from aespa_nb.errors import AespaError, NumericalError, UnsupportedModelError
from aespa_nb.model.block_tuning import BlockTask, learn_block


def test_one_linear_is_adaround():
    block, stream = tiny(8)
    W, X = block[0].weight.clone(), stream.hidden[0].T
    grid, H = minmax_grid(W, 2), X @ X.T / X.shape[1]
    rounding = BlockRounding({"0": W}, {"0": grid})
    logit = rounding.logits["0"]
    logit.data += 0.1 * torch.randn(logit.shape, generator=torch.Generator().manual_seed(0)).to(logit)
    adam = torch.optim.Adam([logit], lr=0.1)
    found = next(learn_block(block, rounding.relaxed, adam, stream, stream.hidden @ W.T, 10))
    dW, size = rounding.relaxed()["0.weight"].detach() - W, quadratic_loss(W, H)
    assert found == pytest.approx(float(quadratic_loss(dW, H) / size), rel=1e-10)
    by_weight = loss_gradient(lambda dW: quadratic_loss(dW, H) / size, dW)[1]
    by_h, h = by_weight * grid.scale, rectified_sigmoid(logit.detach())
    assert_close(logit.grad, logit_gradient(by_h, logit.detach().sigmoid(), h), rtol=1e-9, atol=1e-14)


def test_it_starts_at_the_weight_and_ends_beside_it():
    _, stream = tiny(8)
    W = tiny(8)[0][0].weight
    grid = fit_grid(W, damp(stream.hidden[0].T @ stream.hidden[0]), 3)
    rounding = BlockRounding({"a": W}, {"a": grid})
    inside = (W > grid.values(torch.zeros_like(W))) & (W < grid.values(torch.full_like(W, 7)))
    assert_close(rounding.relaxed()["a.weight"][inside], W[inside], rtol=1e-5, atol=1e-5)
    assert torch.equal(rounding.rounded("a")[inside], grid.round(W)[inside])
    assert not torch.equal(W, grid.round(W)) and 0 < rounding.penalty(2.0).item() < 1
    rounding.logits["a"].data.fill_(9)
    assert rounding.penalty(2.0).item() == 0 and torch.equal(rounding.relaxed()["a.weight"], rounding.rounded("a"))


@pytest.mark.parametrize("group_size, symmetric", [(None, False), (16, False), (8, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_better_than_round_to_nearest_and_on_the_grid(tasks, kind, group_size, symmetric):  # noqa: F811
    task = tasks(kind, group_size=group_size, symmetric=symmetric, iterations=60)
    with capturing(task.model):
        grids = _fit_grids(task)
        fitted = {n: grids[n].round(W) for n, W in weights(task).items()}
        before, old = min(error(task, nearest(task)[0]), error(task, fitted)), weights(task)
        rounded = brecq(task)
    assert error(task) < 0.8 * before
    for n, W in weights(task).items():
        grid = rounded[n].grid
        scale, zero = grid.expand(W.shape[1])
        codes = (W / scale + zero).double()
        assert_close(codes, codes.round(), rtol=0, atol=1e-4)
        assert codes.round().amin() >= 0 and codes.round().amax() <= 3 and (rounded[n].zeta == 1).all()
        assert torch.equal(grid.scale, grids[n].scale) and torch.equal(grid.zero, grids[n].zero)
        assert not symmetric or (grid.zero == 2).all()
        within = (old[n] > grid.values(torch.zeros_like(W))) & (old[n] < grid.values(torch.full_like(W, 3)))
        assert ((W - old[n]).abs() < scale * 1.0001)[within].all()  # a neighbour, never further away


def test_same_seed_same_weights(tasks):  # noqa: F811
    flat = []
    for seed in (0, 0, 1):
        task = tasks(seed=seed, iterations=5)
        torch.rand(seed + 1)  # the global generator plays no part
        with capturing(task.model):
            brecq(task, fisher=2)
        flat.append(torch.cat([W.flatten() for W in weights(task).values()]))
    assert torch.equal(flat[0], flat[1]) and not torch.equal(flat[0], flat[2])


def test_the_preset_runs_and_its_codes_read_back():
    model = small()
    config = AespaConfig.preset("brecq", bits=3, iterations=40, group_size=16, keep={"1.mlp.up": 16})
    report = quantize_model(model, TOKENS, config)
    assert len(report.layers) == 13
    for r in report.layers.values():
        scale, zero = r.grid.expand(r.weight.shape[1])
        assert_close(r.weight, (r.codes - zero) * scale, rtol=1e-5, atol=1e-6)
        assert r.loss < r.loss_rtn


def test_fisher_weights_are_squared_gradients(tasks):  # noqa: F811
    model = small()
    block = model.model.layers[1]
    task = tasks()
    mine = BlockTask(model, block, {}, task.stream, task.target, seed=3)
    generator, total = torch.Generator().manual_seed(3), 0
    for y in task.target[:2].split(1):
        y = y.clone().requires_grad_()
        p = model.lm_head(model.model.norm(y))[0].log_softmax(-1)
        drawn = torch.multinomial(p.detach().exp(), 1, generator=generator)
        (g,) = torch.autograd.grad(-p.gather(1, drawn).sum(), y)
        total = total + g.square().mean((0, 1))
    assert_close(fisher_importance(mine, 2), total / total.mean(), rtol=1e-4, atol=1e-5)
    assert all("forward" not in vars(b) for b in model.model.layers)


@pytest.mark.parametrize("kind", KINDS)
def test_fisher_weights_of_an_early_block(tasks, kind):  # noqa: F811
    task = tasks(kind)
    importance = fisher_importance(task, 2)
    assert importance.shape == (32,) and (importance > 0).all()
    assert float(importance.mean()) == pytest.approx(1, rel=1e-4)
    assert all("forward" not in vars(b) for b in task.model.get_submodule(stacks_of(task.model)[0]))


def test_importance_counts_channels(tasks):  # noqa: F811
    task = tasks()
    W = {f"{n}.weight": (0.9 * w).requires_grad_() for n, w in weights(task).items()}
    run = lambda **more: next(
        learn_block(task.block, lambda: W, torch.optim.SGD(W.values(), 1), task.stream, task.target, 1, 12, **more)
    )
    each = [run(importance=torch.eye(32)[i]) for i in range(32)]
    assert sum(each) == pytest.approx(run(), rel=1e-4) and run(importance=2.0) == pytest.approx(2 * run(), rel=1e-4)


def test_bad_input_is_refused(tasks):  # noqa: F811
    def refused(kind, match, fields=(), **options):
        task = tasks(**dict(fields))
        with capturing(task.model), pytest.raises(kind, match=match):
            brecq(task, **options)

    refused(AespaError, "does not divide", dict(group_size=5))
    refused(AespaError, "bits", dict(bits=9))
    refused(AespaError, "iterations >= 1", dict(iterations=-1))
    refused(AespaError, "iterations >= 1", dict(lr=-1.0))
    refused(AespaError, "weight >= 0", weight=-1.0)
    refused(AespaError, "warmup", warmup=1.0)
    broken = tasks()
    old, broken.target = weights(broken), broken.target * float("nan")
    with capturing(broken.model), pytest.raises(NumericalError, match="NaN"):
        brecq(broken)
    assert all(torch.equal(W, old[n]) for n, W in weights(broken).items())


def test_fisher_needs_a_block_of_a_language_model(tasks):  # noqa: F811
    task = tasks()
    task.block = small().model.layers[0]
    with pytest.raises(UnsupportedModelError, match="not one of the model's"):
        fisher_importance(task)
    task.block, task.model = task.model.model.layers[0], task.model.model
    with pytest.raises(UnsupportedModelError, match="predicts no tokens"):
        fisher_importance(task)
