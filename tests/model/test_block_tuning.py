"Scales and norm weights of a rounded block, fitted to its output: what moves, what stays, what is refused."

import copy
from dataclasses import replace

import pytest
import torch
from blocks import error, weights

from aespa_nb.errors import AespaError, NumericalError
from aespa_nb.model.block_tuning import Scales, block_error, first_output, learn_block, norm_weights, tune_scales
from aespa_nb.rounding.grid import minmax_grid
from aespa_nb.rounding.packing import RoundedWeight


@pytest.fixture
def case(task):
    "Makes tasks whose block is rounded to nearest; `records` says how, `start` what is in the block."

    def make(kind, group_size=None, dtype=torch.float32):
        t = task(kind, dtype=dtype)
        t.records = {}
        for n, W in weights(t).items():
            grid = minmax_grid(W.float(), 2, group_size)
            t.records[n] = RoundedWeight.of(grid.codes(W.float()), grid)
        write(t)
        return t

    return make


def write(t):
    for n, record in t.records.items():
        t.block.get_submodule(n).weight.copy_(record.weight())
    t.start = {n: p.detach().clone() for n, p in t.block.named_parameters()}


def stays(t):
    return all(torch.equal(p, t.start[n]) for n, p in t.block.named_parameters())


def tune(t, **options):
    return tune_scales(t.block, t.records, t.stream, t.target, **{"iterations": 20, **options})


@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("kind", ["llama", "mha", "opt", "opt-post-norm"])
def test_the_error_falls_the_codes_stay_and_weights_are_made_from_records(case, kind, group_size):
    c = case(kind, group_size)
    before, given = error(c, {}), copy.deepcopy((c.records, c.stream.hidden, c.target))
    needed = {n: p.requires_grad for n, p in c.block.named_parameters()}
    records, losses = tune(c)
    assert error(c, {}) < before and len(losses) == 20
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
    before = error(c, {})
    _, losses = tune(c, iterations=3, batch_size=100)
    assert losses[0] == pytest.approx(before, rel=1e-4) and losses[-1] < losses[0]


def test_norms_are_found_and_move_alone_without_records(case):
    c = case("opt")
    assert set(norm_weights(c.block)) == {"self_attn_layer_norm.weight", "final_layer_norm.weight"}
    c.records, before = {}, error(c, {})
    assert tune(c)[0] == {} and error(c, {}) < before
    assert all(torch.equal(p, c.start[n]) == ("norm.weight" not in n) for n, p in c.block.named_parameters())


def test_what_is_right_stays_nearly_so_and_a_scale_that_is_wrong_is_found(case):
    c = case("llama")
    args, kwargs = c.stream.arguments(slice(None))
    c.target = first_output(c.block(c.stream.hidden, *args, **kwargs)).clone()
    tune(c)
    assert error(c, {}) < 1e-3
    r = c.records["mlp.down_proj"]
    c.records["mlp.down_proj"] = r.on(replace(r.grid, scale=r.grid.scale * 0.9))
    write(c)
    before = error(c, {})
    tune(c, iterations=60)
    assert error(c, {}) < before / 20


def test_what_does_not_help_is_dropped(case):
    c = case("llama")
    records, _ = tune(c, iterations=1, lr=0.9)
    assert records is c.records and stays(c)


def test_nothing_to_learn_changes_nothing(case, monkeypatch):
    c = case("llama")
    monkeypatch.setattr("aespa_nb.model.block_tuning.norm_weights", lambda block: {})
    records, losses = tune_scales(c.block, {}, c.stream, c.target)
    assert records == {} and losses == [] and stays(c)


def test_scales_stay_positive(case):
    c = case("llama", 16)
    for n, r in tune(c, iterations=5, lr=2.0)[0].items():
        assert (r.grid.scale >= 0.099 * c.records[n].grid.scale).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(case, dtype):
    c = case("llama", dtype=dtype)
    before = error(c, {})
    records, _ = tune(c)
    assert error(c, {}) < before and all(p.dtype == dtype for p in c.block.parameters())
    for n, r in records.items():
        assert r.grid.scale.dtype == torch.float32
        assert torch.equal(c.block.get_submodule(n).weight, r.weight().to(dtype))


def test_what_does_not_fit_and_nan_are_refused(case):
    c, record = case("llama"), lambda W: RoundedWeight.of(torch.zeros(W.shape), minmax_grid(W, 2))
    for options in (dict(lr=0.0), dict(lr=float("nan")), dict(batch_size=0)):
        with pytest.raises(AespaError, match="iterations >= 1"):
            tune(c, **options)
    with pytest.raises(NumericalError, match="NaN or Inf"):
        tune_scales(c.block, c.records, c.stream, c.target * float("nan"))
    with pytest.raises(AespaError, match="do not fit"):
        tune_scales(c.block, c.records, c.stream, c.target[:, 1:])
    q = c.records["self_attn.q_proj"]
    heads, groups = q.on(q.grid.view(4, 8)), q.on(minmax_grid(torch.ones(32, 30), 2, 6))
    for wrong in (record(torch.ones(16, 32)), record(torch.ones(32, 16)), heads, groups):
        with pytest.raises(AespaError, match="does not fit"):
            Scales(c.block, {"self_attn.q_proj": wrong})
    assert stays(c)


def scaled(task, iterations):
    "The task, and every linear's weight times one learned factor, which starts at 1."
    factor = torch.ones((), requires_grad=True)
    task.iterations = iterations
    return factor, lambda: {f"{n}.weight": task.start[f"{n}.weight"] * factor for n in task.records}


def test_a_step_is_taken_when_the_next_error_is_asked_for(case):
    c = case("llama")
    factor, made = scaled(c, 3)
    steps = learn_block(c, made, torch.optim.SGD([factor], lr=0.1), 16)
    first = next(steps)
    assert first == pytest.approx(error(c, {}), rel=1e-4) and factor == 1 and factor.grad != 0
    grad = factor.grad.clone()
    next(steps)
    assert factor.detach() == pytest.approx(1 - 0.1 * float(grad), rel=1e-5)  # the first step has the whole rate
    assert len(list(steps)) == 1


def test_rates_and_penalties_follow_the_share_of_steps_done(case):
    c = case("llama")
    factor, made = scaled(c, 4)
    optimizer, shares, rates, grads = torch.optim.SGD([factor], lr=1e-9), [], [], []
    penalty = lambda done: shares.append(done) or 7.0 * factor
    for _ in learn_block(c, made, optimizer, 16, lambda done: 1 + done, penalty):
        rates.append(optimizer.param_groups[0]["lr"])
        grads.append(float(factor.grad))
    assert shares == [0, 0.25, 0.5, 0.75] and rates[1:] == pytest.approx([1e-9, 1.25e-9, 1.5e-9])
    factor, made = scaled(c, 1)
    next(learn_block(c, made, torch.optim.SGD([factor], lr=1e-9), 16))
    assert grads[0] == pytest.approx(float(factor.grad) + 7.0, rel=1e-5)


def test_block_error_is_the_same_in_any_batches_and_takes_other_weights(case):
    c = case("opt")
    args, kwargs = c.stream.arguments(slice(None))
    out = first_output(c.block(c.stream.hidden, *args, **kwargs))
    errors = [float((out - c.target).square().sum() / c.target.square().sum())]
    for c.stream.batch_size in (1, 5, 16):
        errors.append(block_error(c.block, c.stream, c.target))
    assert errors == pytest.approx(errors[:1] * 4, rel=1e-5)
    name = next(iter(c.records))
    other = {f"{name}.weight": torch.zeros_like(c.block.get_submodule(name).weight)}
    assert block_error(c.block, c.stream, c.target, other) > 1.01 * errors[0]
    assert block_error(c.block, c.stream, c.target) == errors[-1] and stays(c)  # nothing was changed
