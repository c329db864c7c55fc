"SignRound: offsets, clipping factors and signed scales; its limits, brute force, and what is refused."

import itertools

import pytest
import torch
from models import small
from torch import nn
from torch.testing import assert_close

from aespa_nb.quantize.config import AespaConfig
from aespa_nb.quantize.model import quantize_model
from aespa_nb.baselines.signround import LearnedRounding, SignDescent, _weight, round_through, signround
from aespa_nb.model.blocks import stacks_of
from aespa_nb.model.stream import BlockStream
from aespa_nb.model.blocks import linears_of
from aespa_nb.rounding.grid import minmax_grid
from aespa_nb.errors import AespaError, NumericalError, UnsupportedModelError
from aespa_nb.notation import tiny_inputs, tiny_weight
from aespa_nb.model.block_tuning import BlockTask, block_error, learn_block

KINDS = ("llama", "opt")
TOKENS = torch.randint(0, 64, (12, 16), generator=torch.Generator().manual_seed(0))


class Tokens:
    "Stands for a stream: fixed hidden states, a block that needs nothing else."

    def __init__(self, hidden):
        self.hidden, self.batch_size, self.device, self.dtype = hidden, len(hidden), hidden.device, hidden.dtype

    def arguments(self, seqs):
        return (), {}


@pytest.fixture
def tasks():
    streams = []

    def make(kind="llama", bits=2, batch_size=4, **fields):
        model = small(kind)
        block = model.get_submodule(stacks_of(model)[0])[0]
        streams.extend(BlockStream(model, TOKENS, batch_size) for _ in range(2))
        streams[-1].run(block, keep=True)
        names = dict.fromkeys(linears_of(block), bits)
        return BlockTask(model, block, names, streams[-2], streams[-1].hidden, **{"iterations": 30, **fields})

    yield make
    for stream in streams:
        stream.close()


def weights(task):
    return {n: task.block.get_submodule(n).weight.detach().clone() for n in task.bits}


def nearest(task):
    grids = {n: minmax_grid(W, task.bits[n], task.group_size, task.symmetric) for n, W in weights(task).items()}
    return {n: grids[n].round(W) for n, W in weights(task).items()}, grids


def error(task, given=None):
    return block_error(task.block, task.stream, task.target, {f"{n}.weight": W for n, W in (given or {}).items()})


def tiny(inp=6, seed=0):
    "A linear as a block, and tokens for it (float64)."
    linear = nn.Linear(inp, inp, bias=False, dtype=torch.float64).requires_grad_(False)
    linear.weight.copy_(tiny_weight(inp, inp, seed=seed))
    return nn.Sequential(linear), Tokens(tiny_inputs(inp, 64, seed=seed).T[None])


@pytest.mark.parametrize("group_size, symmetric", list(itertools.product((None, 4), (False, True))))
def test_it_starts_at_round_to_nearest(group_size, symmetric):
    W = tiny_weight(8, 16)
    W[0] = 0
    W[1] = W[1].abs()
    W_hat, scale, zero = _weight(LearnedRounding(W, 3, group_size, symmetric))
    grid = minmax_grid(W, 3, group_size, symmetric)
    assert torch.equal(W_hat, grid.round(W)) and torch.equal(scale, grid.scale) and torch.equal(zero, grid.zero)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_that_reach_nothing_leave_round_to_nearest(tasks, kind):
    task = tasks(kind, bits=3, lr=1e-9, iterations=2)
    before, grids = nearest(task)
    rounded = signround(task)
    for n, W in weights(task).items():
        assert_close(W, before[n], rtol=1e-6, atol=1e-7)
        assert torch.equal(rounded[n].grid.zero, grids[n].zero)


def test_a_step_goes_exactly_as_far_as_the_learning_rate():
    block, stream = tiny()
    target = stream.hidden @ block[0].weight.T
    part = LearnedRounding(block[0].weight, 2)
    learned = [part.offset, part.low, part.high]
    make = lambda: {"0.weight": _weight(part)[0]}
    steps = learn_block(block, make, SignDescent(learned, 1 / 8), stream, target, 8, rate=lambda done: 1 - done)
    next(steps)
    signs = [p.grad.sign() for p in learned]
    next(steps)
    for p, sign, start in zip(learned, signs, (0, 1, 1)):
        assert torch.equal(p.detach(), start - sign / 8) and sign.any()


def test_offsets_can_travel_half_a_step():
    p = torch.zeros(1, requires_grad=True)
    descent = SignDescent([p], 0.0)
    for t in range(200):
        p.grad, descent.param_groups[0]["lr"] = torch.ones(1), (1 - t / 200) / 200
        descent.step()
    assert float(-p.detach()) == pytest.approx(201 / 400, rel=1e-5)


def test_whole_numbers_are_whole():
    u = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 100
    assert torch.equal(round_through(u), u.round())


def test_never_below_all_roundings_and_mostly_there():
    both, ratios = torch.tensor(list(itertools.product((0, 1), repeat=4)), dtype=torch.float64), []
    for seed in range(8):
        block, stream = tiny(4, seed=seed)
        W, X = block[0].weight, stream.hidden[0].T
        W[1:] = 0  # a single row: the best of all scales is kept for a matrix as a whole
        row, grid = W[:1].clone(), minmax_grid(W[:1], 2)
        every = ((row / grid.scale).floor() + both + grid.zero).clamp(0, 3)
        loss = lambda V, row=row, X=X: ((V - row) @ X).square().sum(-1)
        best = loss((every - grid.zero) * grid.scale).min()
        signround(BlockTask(None, block, {"0": 2}, stream, stream.hidden @ W.T, iterations=100), clip=False)
        ratios.append(float(loss(W[:1]) / best))
    assert min(ratios) > 1 - 1e-9 and sum(r < 1 + 1e-9 for r in ratios) >= 5


@pytest.mark.parametrize("group_size, symmetric", [(None, False), (16, False), (None, True), (8, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_better_than_round_to_nearest_and_on_the_grid(tasks, kind, group_size, symmetric):
    task = tasks(kind, group_size=group_size, symmetric=symmetric)
    before = error(task, nearest(task)[0])
    rounded = signround(task)
    assert error(task) < 0.8 * before
    for n, W in weights(task).items():
        grid = rounded[n].grid
        scale, zero = grid.expand(W.shape[1])
        codes = W / scale + zero
        assert_close(codes, codes.round(), rtol=0, atol=1e-4)
        assert codes.round().amin() >= 0 and codes.round().amax() <= 3 and (rounded[n].zeta == 1).all()
        assert grid.scale.shape == (len(W), W.shape[1] // (group_size or W.shape[1]))
        assert not symmetric or (grid.zero == 2).all()
        assert not (grid.scale.requires_grad or W.requires_grad)


def test_with_all_sequences_in_a_step_the_best_is_never_worse_than_nearest(tasks):
    task = tasks(bits=4, iterations=3, lr=0.4)  # leaps
    before = error(task, nearest(task)[0])
    signround(task, batch_size=12)
    assert error(task) <= before * (1 + 1e-5)


def test_without_clipping_the_grid_stays(tasks):
    task = tasks()
    _, grids = nearest(task)
    rounded = signround(task, clip=False)
    assert all(torch.equal(rounded[n].grid.scale, grids[n].scale) for n in grids)


def test_clipping_only_narrows(tasks):
    task = tasks()
    _, grids = nearest(task)
    rounded = signround(task)
    ratio = torch.cat([(rounded[n].grid.scale / g.scale).flatten() for n, g in grids.items()])
    assert (ratio <= 1 + 1e-6).all() and (ratio > 1 - 31 / 60 - 1e-4).all() and (ratio < 1).any()


def test_same_seed_same_weights(tasks):
    flat = []
    for seed in (0, 0, 1):
        task = tasks(seed=seed, iterations=5)
        torch.rand(seed + 1)  # the global generator plays no part
        signround(task, batch_size=4)
        flat.append(torch.cat([W.flatten() for W in weights(task).values()]))
    assert torch.equal(flat[0], flat[1]) and not torch.equal(flat[0], flat[2])


def test_what_is_not_asked_for_stays(tasks):
    task = tasks("opt", iterations=3)
    del task.bits["fc1"]
    old = {n: p.detach().clone() for n, p in task.block.named_parameters()}
    assert signround(task).keys() == task.bits.keys()
    for n, p in task.block.named_parameters():
        assert torch.equal(p, old[n]) == (n.removesuffix(".weight") not in task.bits), n


def test_the_preset_runs_and_its_codes_read_back():
    model = small()
    report = quantize_model(model, TOKENS, AespaConfig.preset("signround", bits=3, iterations=8, group_size=16))
    assert len(report.layers) == 14
    for r in report.layers.values():
        scale, zero = r.grid.expand(r.weight.shape[1])
        assert_close(r.weight, (r.codes - zero) * scale, rtol=1e-5, atol=1e-6)
        assert r.loss <= r.loss_rtn * (1 + 1e-5)


def test_bad_input_is_refused(tasks):
    with pytest.raises(AespaError, match="does not divide"):
        signround(tasks(group_size=5))
    with pytest.raises(AespaError, match="bits"):
        signround(tasks(bits=9))
    for options in (dict(iterations=-1), dict(lr=-1.0)):
        with pytest.raises(AespaError, match="iterations >= 1"):
            signround(tasks(**options))
    with pytest.raises(AespaError, match="batch_size"):
        signround(tasks(), batch_size=0)
    broken = tasks()
    old = weights(broken)
    broken.target = broken.target * float("nan")
    with pytest.raises(NumericalError, match="NaN"):
        signround(broken)
    assert all(torch.equal(W, old[n]) for n, W in weights(broken).items())


def test_linears_of_other_kinds_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=32)).eval()
    with pytest.raises(UnsupportedModelError, match="signround"):
        quantize_model(model, TOKENS, AespaConfig.preset("signround"))
