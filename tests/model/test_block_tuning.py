"Scales and norm weights of a rounded block, fitted to its output: what moves, what stays, what is refused."

import contextlib
import copy
from dataclasses import replace

import pytest
import torch
from blocks import TOKENS
from models import small
from torch.testing import assert_close

from aespa_nb.errors import AespaError, NumericalError
from aespa_nb.model.block_tuning import (
    BlockTask,
    Scales,
    block_error,
    learn_block,
    norm_weights,
    tune_scales,
)
from aespa_nb.model.blocks import linears_of, stacks_of, weight_of
from aespa_nb.model.stream import BlockStream
from aespa_nb.rounding.grid import minmax_grid
from aespa_nb.rounding.packing import RoundedWeight

KINDS = ("llama", "mha", "opt", "opt-post-norm")


class Case:
    "A rounded block, its records, what it reads and what it should put out."

    def __init__(self, kind, bits=2, group_size=None, dtype=torch.float32):
        model = small(kind, dtype)
        self.stream, self.block = BlockStream(model, TOKENS, dtype=dtype), model.get_submodule(stacks_of(model)[0])[0]
        with torch.no_grad():
            self.target, self.records = self.output(), {}
            for n in linears_of(self.block):
                W = self.block.get_submodule(n).weight.float()
                grid = minmax_grid(W, bits, group_size)
                self.records[n] = RoundedWeight.of(grid.codes(W), grid)
            self.write()
        self.start = self.state()

    @torch.no_grad()
    def write(self):
        for n, record in self.records.items():
            weight_of(self.block, n).copy_(record.weight())

    @torch.no_grad()
    def output(self):
        args, kwargs = self.stream.arguments(slice(None))
        out = self.block(self.stream.hidden, *args, **kwargs)
        return (out[0] if isinstance(out, tuple) else out).clone()

    def error(self):
        return float((self.output() - self.target).float().square().sum() / self.target.float().square().sum())

    def state(self):
        return {n: p.detach().clone() for n, p in self.block.named_parameters()}

    def stays(self):
        return all(torch.equal(p, self.start[n]) for n, p in self.block.named_parameters())

    def tune(self, **options):
        return tune_scales(self.block, self.records, self.stream, self.target, **{"iterations": 20, **options})

    def scaled(self, name, factor):
        "The records with one of them on a scaled grid, written into the block."
        grid = self.records[name].grid
        self.records[name] = self.records[name].on(replace(grid, scale=grid.scale * factor))
        self.write()


@pytest.fixture
def case():
    with contextlib.ExitStack() as stack:

        def make(*args, **kwargs):
            made = Case(*args, **kwargs)
            stack.callback(made.stream.close)
            return made

        yield make


@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_falls_the_codes_stay_and_weights_are_made_from_records(case, kind, group_size):
    c = case(kind, group_size=group_size)
    error, given = c.error(), copy.deepcopy((c.records, c.stream.hidden, c.target))
    needed = {n: p.requires_grad for n, p in c.block.named_parameters()}
    records, losses = c.tune()
    assert c.error() < error and len(losses) == 20
    for n, r in records.items():
        old = c.records[n]
        assert torch.equal(r.words, old.words) and torch.equal(r.grid.zero, old.grid.zero) and r.grid.bits == 2
        assert not torch.equal(r.grid.scale, old.grid.scale) and torch.equal(old.grid.scale, given[0][n].grid.scale)
        assert torch.equal(c.block.get_submodule(n).weight, r.weight()) and not r.grid.scale.requires_grad
    for n, p in c.block.named_parameters():
        assert torch.equal(p, c.start[n]) == n.endswith("bias"), n
        assert p.grad is None and p.requires_grad == needed[n]
    assert torch.equal(c.stream.hidden, given[1]) and torch.equal(c.target, given[2])


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_one_whole_batch_starts_at_the_error_of_the_block(case, kind):
    c = case(kind)
    error = c.error()
    _, losses = c.tune(iterations=3, batch_size=100)
    assert losses[0] == pytest.approx(error, rel=1e-4) and losses[-1] < losses[0]


def test_norms_are_found_and_move_alone_without_records(case):
    c = case("opt")
    assert set(norm_weights(c.block)) == {"self_attn_layer_norm.weight", "final_layer_norm.weight"}
    c.records, error = {}, c.error()
    assert c.tune()[0] == {} and c.error() < error
    assert all(torch.equal(p, c.start[n]) == ("norm.weight" not in n) for n, p in c.block.named_parameters())


def test_same_seed_same_bits_and_seeds_matter(case):
    weights = []
    for seed in (0, 0, 1):
        c = case("llama")
        torch.rand(seed + 1)  # the global generator plays no part
        _, losses = c.tune(iterations=4, batch_size=4, seed=seed)
        weights.append((losses, torch.cat([p.flatten() for p in c.state().values()])))
    assert weights[0][0] == weights[1][0] and torch.equal(weights[0][1], weights[1][1])
    assert not torch.equal(weights[0][1], weights[2][1])


def test_what_is_right_stays_nearly_so_and_a_scale_that_is_wrong_is_found(case):
    c = case("llama")
    c.target = c.output()
    c.tune()
    assert c.error() < 1e-3
    c = case("llama")
    c.target = c.output()
    c.scaled("mlp.down_proj", 0.9)
    error = c.error()
    c.tune(iterations=60)
    assert c.error() < error / 20


def test_what_does_not_help_is_dropped(case):
    c = case("llama")
    records, _ = c.tune(iterations=1, lr=0.9)
    assert records is c.records and c.stays()


def test_units_do_not_matter(case):
    plain, scaled = case("llama"), case("llama")
    names = [f"self_attn.{role}_proj" for role in "qkv"]
    with torch.no_grad():
        scaled.block.input_layernorm.weight *= 64
    for n in names:
        scaled.scaled(n, 1 / 64)
    a, b = plain.tune()[0], scaled.tune()[0]
    assert_close(scaled.block.input_layernorm.weight / 64, plain.block.input_layernorm.weight, rtol=1e-4, atol=0)
    for n in a:
        assert_close(b[n].grid.scale * (64 if n in names else 1), a[n].grid.scale, rtol=1e-4, atol=0)


def test_factors_are_ones_fold_the_gradient_and_stay_positive(case):
    c = case("llama", group_size=16)
    scales = Scales(c.block, c.records)
    assert all((f == 1).all() and f.requires_grad for f in scales.factors.values())
    parameters = scales.parameters()
    assert all(torch.equal(p, c.block.get_parameter(n)) for n, p in parameters.items())
    weigh = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    (parameters["self_attn.q_proj.weight"] * weigh).sum().backward()
    folded = (weigh * c.block.self_attn.q_proj.weight).unflatten(1, (2, 16)).sum(-1)
    assert_close(scales.factors["self_attn.q_proj"].grad, folded.detach())
    for n, r in c.tune(iterations=5, lr=2.0)[0].items():
        assert (r.grid.scale >= 0.099 * c.records[n].grid.scale).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(case, dtype):
    c = case("llama", dtype=dtype)
    error = c.error()
    records, _ = c.tune(iterations=20)
    assert c.error() < error and all(p.dtype == dtype for p in c.block.parameters())
    for n, r in records.items():
        assert r.grid.scale.dtype == torch.float32
        assert torch.equal(c.block.get_submodule(n).weight, r.weight().to(dtype))


@pytest.mark.parametrize("options", [dict(iterations=0), dict(lr=0.0), dict(lr=float("nan")), dict(batch_size=0)])
def test_bad_options_are_refused(case, options):
    c = case("llama")
    with pytest.raises(AespaError, match="iterations >= 1"):
        c.tune(**options)
    assert c.stays()


def test_what_does_not_fit_and_nan_are_refused(case):
    c, record = case("llama"), lambda W: RoundedWeight.of(torch.zeros(W.shape), minmax_grid(W, 2))
    with pytest.raises(NumericalError, match="NaN or Inf"):
        tune_scales(c.block, c.records, c.stream, c.target * float("nan"))
    with pytest.raises(AespaError, match="do not fit"):
        tune_scales(c.block, c.records, c.stream, c.target[:, 1:])
    q = c.records["self_attn.q_proj"]
    heads, groups = q.on(q.grid.view(4, 8)), q.on(minmax_grid(torch.ones(32, 30), 2, 6))
    for wrong in (record(torch.ones(16, 32)), record(torch.ones(32, 16)), heads, groups):
        with pytest.raises(AespaError, match="does not fit"):
            Scales(c.block, {"self_attn.q_proj": wrong})
    assert c.stays()


def scaled_task(case, iterations):
    "The task, and every linear's weight times one learned factor, which starts at 1."
    factor = torch.ones((), requires_grad=True)
    task = BlockTask(None, case.block, {}, case.stream, case.target, iterations=iterations)
    return task, factor, lambda: {f"{n}.weight": case.start[f"{n}.weight"] * factor for n in case.records}


def test_a_step_is_taken_when_the_next_error_is_asked_for(case):
    case = case("llama")
    task, factor, weights = scaled_task(case, 3)
    steps = learn_block(task, weights, torch.optim.SGD([factor], lr=0.1), 16)
    first = next(steps)
    assert first == pytest.approx(case.error(), rel=1e-4) and factor == 1 and factor.grad != 0
    grad = factor.grad.clone()
    next(steps)
    assert factor.detach() == pytest.approx(1 - 0.1 * float(grad), rel=1e-5)  # the first step has the whole rate
    assert len(list(steps)) == 1


def test_rates_and_penalties_follow_the_share_of_steps_done(case):
    case = case("llama")
    task, factor, weights = scaled_task(case, 4)
    optimizer, shares, rates, grads = torch.optim.SGD([factor], lr=1e-9), [], [], []
    penalty = lambda done: shares.append(done) or 7.0 * factor
    for _ in learn_block(task, weights, optimizer, 16, lambda done: 1 + done, penalty):
        rates.append(optimizer.param_groups[0]["lr"])
        grads.append(float(factor.grad))
    assert shares == [0, 0.25, 0.5, 0.75] and rates[1:] == pytest.approx([1e-9, 1.25e-9, 1.5e-9])
    task, factor, weights = scaled_task(case, 1)
    next(learn_block(task, weights, torch.optim.SGD([factor], lr=1e-9), 16))
    assert grads[0] == pytest.approx(float(factor.grad) + 7.0, rel=1e-5)


def test_block_error_is_the_same_in_any_batches_and_takes_other_weights(case):
    case = case("opt")
    errors = []
    for size in (1, 5, 16):
        case.stream.batch_size = size
        errors.append(block_error(case.block, case.stream, case.target))
    assert errors == pytest.approx([case.error()] * 3, rel=1e-5)
    name = next(iter(case.records))
    other = {f"{name}.weight": torch.zeros_like(case.block.get_submodule(name).weight)}
    assert block_error(case.block, case.stream, case.target, other) > 1.01 * errors[0]
    assert block_error(case.block, case.stream, case.target) == errors[-1] and case.stays()  # nothing was changed
