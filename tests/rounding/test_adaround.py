"Learned rounding: its start, its derivatives, its promises, and brute force."

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding.problems import draw, gram, layer
from torch.testing import assert_close

from aespa_nb.attention.kronecker_losses import KroneckerLoss
from aespa_nb.rounding.adaround import (
    CompiledRelaxation,
    Relaxation,
    adaround,
    beta_schedule,
    initial_logit,
    logit_gradient,
    loss_gradient,
    penalty_gradient,
    rectified_sigmoid,
    relaxed_start,
    rounding_penalty,
)  # fmt: skip
from aespa_nb.rounding.gptq import gptq
from aespa_nb.rounding.grid import minmax_grid
from aespa_nb.rounding.grid_search import fit_grid
from aespa_nb.rounding.hessian import damp, quadratic_loss
from aespa_nb.rounding.moves import numba
from aespa_nb.errors import AespaError, NumericalError

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 10_000)


def problem(seed, *sizes):
    "Random weights, the H of correlated inputs, and the loss."
    W, H = layer(seed, *sizes)
    return W, H, lambda dW: quadratic_loss(dW, H)


@quick
@given(st.floats(0, 1), st.floats(2, 20))
def test_sigmoid_and_penalty(h, beta):
    h = torch.tensor([h], dtype=torch.float64)
    assert_close(rectified_sigmoid(initial_logit(h)), h, rtol=0, atol=1e-12)
    assert 0 <= rounding_penalty(h, beta) <= 1
    assert_close(rounding_penalty(h, beta), rounding_penalty(1 - h, beta))


@quick
@given(seeds, st.integers(2, 8), st.sampled_from([None, 3, 4]))
def test_start_is_the_weight_itself(seed, bits, group_size):
    "Exactly so inside the range, at its end outside."
    W, _, _ = problem(seed)
    grid = minmax_grid(W * 0.8, bits, group_size)
    base, round_logit = relaxed_start(W, grid)
    h = rectified_sigmoid(round_logit)
    scale, zero = grid.expand(W.shape[-1])
    code = W / scale + zero
    inside = (code > 0) & (code < grid.max_code) & ((code - code.round()).abs() > 1e-5)
    assert_close((base + h)[inside], code[inside], rtol=0, atol=1e-12)
    assert_close(base + h, code.clamp(0, grid.max_code), rtol=0, atol=2e-6)
    assert ((h > 0) & (h < 1) & (base >= 0) & (base < grid.max_code)).all()
    assert torch.equal((base + (round_logit >= 0))[inside], grid.codes(W)[inside])


@quick
@given(seeds, st.floats(2, 20))
def test_derivatives_by_hand_are_those_of_autograd(seed, beta):
    g = torch.Generator().manual_seed(seed)
    V = (4 * torch.randn(50, generator=g, dtype=torch.float64)).requires_grad_()
    pull = torch.randn(50, generator=g, dtype=torch.float64)
    h = rectified_sigmoid(V)
    (expected,) = torch.autograd.grad((pull * h).sum() + rounding_penalty(h, beta), V)
    h = h.detach()
    assert_close(logit_gradient(pull + penalty_gradient(h, beta), torch.sigmoid(V.detach()), h), expected)


def test_schedule():
    betas = [beta_schedule(i / 100, 0.25) for i in range(101)]
    assert betas[:25] == [None] * 25 and betas[25] == 20 and betas[-1] == 2
    assert all(a > b for a, b in zip(betas[25:], betas[26:]))


class Curved:
    "A quadratic loss that knows what an error in each weight costs."

    def __init__(self, H):
        self.H, self.curvature = H, H.diagonal()[None]

    def __call__(self, dW):
        return quadratic_loss(dW, self.H)


def autograd_form(W, grid, loss, start, iterations, loss_scale):
    "The whole loop with autograd, as in the chapter."
    (base, V), (scale, zero) = relaxed_start(start, grid), grid.expand(W.shape[-1])
    factor, weight = loss_scale * W.numel() / loss(grid.round(W) - W), 1.0
    if isinstance(loss, Curved):
        weight = scale.square() * loss.curvature
        weight = weight / weight.mean()
    adam = torch.optim.Adam([V.requires_grad_()], lr=0.015)
    for i in range(iterations):
        h = rectified_sigmoid(V)
        total = factor * loss(scale * (base + h - zero) - W)
        beta = beta_schedule(i / iterations)
        total = total if beta is None else total + rounding_penalty(h, beta, weight)
        adam.zero_grad()
        total.backward()
        adam.step()
    return base + (V.detach() >= 0)


@settings(quick, max_examples=6)
@given(seeds, st.sampled_from([0.1, 0.2, 1.0]), st.booleans())
def test_equals_the_autograd_form(seed, loss_scale, curved):
    W, H, loss = problem(seed)
    loss = Curved(H) if curved else loss
    grid = fit_grid(W, H, 2, n_clip=10)
    slow = autograd_form(W, grid, loss, W, 150, loss_scale)
    fast = adaround(W, grid, loss, iterations=150, loss_scale=loss_scale)
    measure = lambda codes: loss(grid.values(codes) - W)  # noqa: E731
    expected = slow if measure(slow) <= measure(grid.codes(W)) else grid.codes(W)
    assert torch.equal(fast, expected)


@pytest.mark.skipif(numba is None, reason="needs numba")
@pytest.mark.parametrize("heads", [1, 3])
def test_the_compiled_form_takes_the_same_steps(heads):
    "Of a loss that knows its gradient, from weights that are clipped, too."
    W, H = draw(1, heads, 40, 24).float(), torch.stack([damp(gram(t, 24, 48)) for t in range(heads)]).float()
    G = torch.stack([damp(gram(9 + t, 40, 48)) for t in range(heads)]).float()
    loss, grid = KroneckerLoss(H, G), minmax_grid(W * 0.7, 2)
    pressure = grid.expand(24)[0].square() * loss.curvature
    forms = [form(W, W, grid, 3.0, pressure / pressure.mean(), 0.06) for form in (Relaxation, CompiledRelaxation)]
    for i in range(200):
        assert_close(forms[1].error(), forms[0].error(), rtol=0, atol=2e-3)
        for form in forms:
            form.step(loss.gradient(form.error()), beta_schedule(i / 200))
    apart = (forms[0].codes() != forms[1].codes()).double().mean()
    assert apart < 0.01 and (forms[0].codes() != grid.codes(W)).any()
    learned = adaround(W, grid, loss, iterations=200, lr=0.06)
    assert loss(grid.values(learned) - W) < loss(grid.round(W) - W)


@settings(quick, max_examples=10)
@given(seeds, st.booleans(), st.floats(0.001, 100), st.integers(1, 60))
def test_never_worse_than_its_start_and_scale_free(seed, from_gptq, loss_scale, iterations):
    W, H, loss = problem(seed)
    grid = fit_grid(W, H, 2, n_clip=10)
    start = gptq(W, H, grid).W_comp if from_gptq else W
    before = W.clone(), start.clone()
    options = dict(start=start, iterations=iterations, loss_scale=loss_scale)
    codes = adaround(W, grid, loss, **options)
    assert loss(grid.values(codes) - W) <= loss(grid.values(grid.codes(start)) - W)
    assert ((codes >= 0) & (codes <= 3) & (codes == codes.round())).all()
    assert torch.equal(codes, adaround(W, grid, lambda dW: 2**-20 * loss(dW), **options))
    assert torch.equal(W, before[0]) and torch.equal(start, before[1])


def test_near_the_best_of_all_choices():
    W, H = draw(11, 20, 8), damp(gram(12, 8, 12))
    grid = fit_grid(W, H, 3, n_clip=20)
    base, _ = relaxed_start(W, grid)

    def row_losses(codes):
        E = grid.values(codes) - W
        return ((E @ H) * E).sum(-1)

    choices = torch.tensor(list(itertools.product((0.0, 1.0), repeat=8)), dtype=W.dtype)[:, None]
    best = row_losses(base + choices).amin(0).sum()
    learned = row_losses(adaround(W, grid, lambda dW: quadratic_loss(dW, H), iterations=1000, loss_scale=0.1)).sum()
    nearest = row_losses(grid.codes(W)).sum()
    assert best * (1 - 1e-9) <= learned < best + 0.5 * (nearest - best)


def test_any_loss_heads_and_no_grad_context():
    W, H, _ = problem(5, 4, 12, (2,))
    target = torch.ones(12, 6, dtype=W.dtype).tanh()
    loss = lambda dW: ((W + dW).tanh() @ target - W.tanh() @ target).square().sum()  # noqa: E731
    grid, seen = minmax_grid(W, 2), []
    with torch.no_grad():
        codes = adaround(W, grid, loss, iterations=50, on_step=lambda i, value: seen.append((i, value)))
    assert codes.shape == W.shape and loss(grid.values(codes) - W) <= loss(grid.round(W) - W)
    assert [i for i, _ in seen] == list(range(50)) and all(isinstance(v, float) for _, v in seen)
    grad = loss_gradient(loss, torch.zeros_like(W) + 0.1)
    assert grad.shape == W.shape and not grad.requires_grad


def test_nothing_to_learn_and_refusals():
    W, H, loss = problem(6)
    grid = minmax_grid(W, 2)
    exact = grid.round(W)
    assert torch.equal(adaround(exact, grid, loss), grid.codes(exact))
    for options in (dict(iterations=0), dict(lr=0.0), dict(loss_scale=0.0)):
        with pytest.raises(AespaError, match="adaround needs"):
            adaround(W, grid, loss, **options)
    with pytest.raises(NumericalError, match="NaN"):
        adaround(W, grid, loss, start=W * float("nan"))
    for factor in (float("nan"), float("inf"), -1.0):
        with pytest.raises(NumericalError, match="not a finite number >= 0"):
            adaround(W, grid, lambda dW, factor=factor: factor * loss(dW))
