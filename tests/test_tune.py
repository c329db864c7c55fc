"Steps and norm weights of a rounded block, fitted to its output: what moves, what stays, what is refused."

import copy
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from aespa_nb.model.blocks import stacks_of
from aespa_nb.model.stream import BlockStream
from aespa_nb.model.blocks import linears_of
from aespa_nb.rounding.grid import minmax_grid
from aespa_nb.errors import AespaError, NumericalError
from aespa_nb.model.block_tuning import Scales, block_error, learn_block, norm_weights, tune_scales

SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=32)
KINDS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, intermediate_size=48)),
    "llama-bias": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=48, attention_bias=True)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32)),
    "opt-post-norm": lambda: OPTForCausalLM(
        OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, do_layer_norm_before=False)
    ),
}
TOKENS = torch.randint(0, 64, (16, 16), generator=torch.Generator().manual_seed(0))


class Case:
    "A rounded block, its grids, what it reads and what it should put out."

    def __init__(self, kind, bits=2, group_size=None, dtype=torch.float32):
        torch.manual_seed(0)
        model = KINDS[kind]().eval().to(dtype)
        self.stream, self.block = BlockStream(model, TOKENS, dtype=dtype), model.get_submodule(stacks_of(model)[0])[0]
        with torch.no_grad():
            for p in self.block.parameters():  # random blocks add little to the stream: make them speak
                p.copy_(10 * p if p.ndim == 2 else p + 0.1 * torch.randn(p.shape))
            self.target = self._output()
            self.grids = {n: self._round(n, bits, group_size) for n in linears_of(self.block)}

    def _round(self, name, bits, group_size):
        W = self.block.get_submodule(name).weight
        grid = minmax_grid(W.float(), bits, group_size)
        W.copy_(grid.round(W.float()))
        return grid

    @torch.no_grad()
    def _output(self):
        args, kwargs = self.stream.arguments(slice(None))
        out = self.block(self.stream.hidden, *args, **kwargs)
        return (out[0] if isinstance(out, tuple) else out).clone()

    def error(self):
        return float((self._output() - self.target).float().square().sum() / self.target.float().square().sum())

    def codes(self, grids):
        weight = lambda n: self.block.get_submodule(n).weight.detach()
        return {n: weight(n).double() / g.expand(weight(n).shape[1])[0] for n, g in grids.items()}

    def tune(self, **options):
        return tune_scales(self.block, self.grids, self.stream, self.target, **{"iterations": 20, **options})


@pytest.fixture
def case():
    made = []

    def make(*args, **kwargs):
        made.append(Case(*args, **kwargs))
        return made[-1]

    yield make
    for c in made:
        c.stream.close()


def state(block):
    return {n: p.detach().clone() for n, p in block.named_parameters()}


@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_falls_and_the_codes_stay(case, kind, group_size):
    c = case(kind, group_size=group_size)
    error, codes, old = c.error(), c.codes(c.grids), state(c.block)
    grids, losses = c.tune()
    assert c.error() < error and len(losses) == 20
    now = c.codes(grids)
    for n, grid in grids.items():
        assert_close(now[n], now[n].round(), rtol=0, atol=1e-4)
        assert torch.equal(now[n].round(), codes[n].round())
        assert grid.bits == 2 and torch.equal(grid.zero, c.grids[n].zero)
        assert grid.scale.shape == c.grids[n].scale.shape and (grid.scale > 0).all()
        assert not torch.equal(grid.scale, c.grids[n].scale)
    for n, p in c.block.named_parameters():
        assert torch.equal(p, old[n]) == n.endswith("bias"), n


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_one_whole_batch_starts_at_the_error_of_the_block(case, kind):
    c = case(kind)
    error = c.error()
    _, losses = c.tune(iterations=3, batch_size=100)
    assert losses[0] == pytest.approx(error, rel=1e-4) and losses[-1] < losses[0]


def test_opt_keeps_the_biases_of_its_norms(case):
    c = case("opt")
    assert set(norm_weights(c.block)) == {"self_attn_layer_norm.weight", "final_layer_norm.weight"}
    biases = {n: p for n, p in state(c.block).items() if n.endswith("bias")}
    c.tune()
    assert len(biases) == 8 and all(torch.equal(c.block.get_parameter(n), p) for n, p in biases.items())


def test_no_gradients_are_left_behind(case):
    c = case("opt")
    needed = {n: p.requires_grad for n, p in c.block.named_parameters()}
    grids, _ = c.tune(iterations=2)
    assert all(p.grad is None and p.requires_grad == needed[n] for n, p in c.block.named_parameters())
    assert not any(g.scale.requires_grad for g in grids.values())


def test_the_callers_tensors_stay(case):
    c = case("llama")
    kept = copy.deepcopy((c.grids, c.stream.hidden.clone(), c.target))
    c.tune(iterations=2)
    assert torch.equal(c.stream.hidden, kept[1]) and torch.equal(c.target, kept[2])
    assert all(torch.equal(c.grids[n].scale, g.scale) for n, g in kept[0].items())


def test_same_seed_same_bits_and_seeds_matter(case):
    weights = []
    for seed in (0, 0, 1):
        c = case("llama")
        torch.rand(seed + 1)  # the global generator plays no part
        _, losses = c.tune(iterations=4, batch_size=4, seed=seed)
        weights.append((losses, torch.cat([p.detach().flatten() for p in c.block.parameters()])))
    assert weights[0][0] == weights[1][0] and torch.equal(weights[0][1], weights[1][1])
    assert not torch.equal(weights[0][1], weights[2][1])


def test_without_grids_only_the_norms_move(case):
    c = case("llama")
    error, old = c.error(), state(c.block)
    grids, _ = tune_scales(c.block, {}, c.stream, c.target, iterations=20)
    assert grids == {} and c.error() < error
    assert all(torch.equal(p, old[n]) == (p.ndim == 2) for n, p in c.block.named_parameters())


def test_a_block_that_is_right_already_stays_nearly_so(case):
    c = case("llama")
    c.target = c._output()
    c.tune()
    assert c.error() < 1e-3


def test_a_scale_that_is_wrong_is_found(case):
    c = case("llama")
    c.target = c._output()
    with torch.no_grad():
        c.block.mlp.down_proj.weight *= 0.9
    c.grids["mlp.down_proj"] = replace(c.grids["mlp.down_proj"], scale=c.grids["mlp.down_proj"].scale * 0.9)
    error = c.error()
    c.tune(iterations=60)
    assert c.error() < error / 20


def test_units_do_not_matter(case):
    plain, scaled = case("llama"), case("llama")
    names = [f"self_attn.{role}_proj" for role in "qkv"]
    with torch.no_grad():
        scaled.block.input_layernorm.weight *= 64
        for n in names:
            scaled.block.get_submodule(n).weight /= 64
    scaled.grids |= {n: replace(scaled.grids[n], scale=scaled.grids[n].scale / 64) for n in names}
    a, b = plain.tune()[0], scaled.tune()[0]
    assert_close(scaled.block.input_layernorm.weight / 64, plain.block.input_layernorm.weight, rtol=1e-4, atol=0)
    for n in plain.grids:
        assert_close(b[n].scale * (64 if n in names else 1), a[n].scale, rtol=1e-4, atol=0)


def test_factors_are_ones_and_fold_the_gradient(case):
    c = case("llama", group_size=16)
    scales = Scales(c.block, c.grids)
    assert all((f == 1).all() and f.requires_grad for f in scales.factors.values())
    parameters = scales.parameters()
    assert all(torch.equal(p, c.block.get_parameter(n)) for n, p in parameters.items())
    weigh = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    (parameters["self_attn.q_proj.weight"] * weigh).sum().backward()
    folded = (weigh * c.block.self_attn.q_proj.weight).unflatten(1, (2, 16)).sum(-1)
    assert_close(scales.factors["self_attn.q_proj"].grad, folded.detach())


def test_steps_stay_positive(case):
    c = case("llama")
    grids, _ = c.tune(iterations=5, lr=2.0)
    assert all((g.scale >= 0.099 * c.grids[n].scale).all() for n, g in grids.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(case, dtype):
    c = case("llama", dtype=dtype)
    error = c.error()
    grids, _ = c.tune(iterations=20)
    assert c.error() < error
    assert all(p.dtype == dtype for p in c.block.parameters())
    assert all(g.scale.dtype == torch.float32 for g in grids.values())
    for codes in c.codes(grids).values():
        assert_close(codes, codes.round(), rtol=0, atol=0.02 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_codes_survive_a_half_precision_home(case, dtype):
    c = case("llama", bits=4)
    before = {n: codes.round() for n, codes in c.codes(c.grids).items()}
    grids, _ = c.tune(iterations=5)
    c.block.to(dtype)
    assert all(torch.equal(codes.round(), before[n]) for n, codes in c.codes(grids).items())


@pytest.mark.parametrize("options", [dict(iterations=0), dict(lr=0.0), dict(lr=float("nan")), dict(batch_size=0)])
def test_bad_options_are_refused(case, options):
    c = case("llama")
    old = state(c.block)
    with pytest.raises(AespaError, match="iterations >= 1"):
        c.tune(**options)
    assert all(torch.equal(p, old[n]) for n, p in c.block.named_parameters())


def test_what_does_not_fit_is_refused(case):
    c = case("llama")
    with pytest.raises(AespaError, match="do not fit"):
        tune_scales(c.block, c.grids, c.stream, c.target[:, 1:])
    heads = c.grids["self_attn.q_proj"].view(4, 8)
    for wrong in (c.grids["self_attn.k_proj"], heads, minmax_grid(torch.ones(32, 30), 2, 6)):
        with pytest.raises(AespaError, match="does not fit its weight"):
            Scales(c.block, {"self_attn.q_proj": wrong})


def test_nan_is_refused_and_the_block_stays(case):
    c = case("llama")
    old = state(c.block)
    with pytest.raises(NumericalError, match="NaN or Inf"):
        tune_scales(c.block, c.grids, c.stream, c.target * float("nan"))
    assert all(torch.equal(p, old[n]) for n, p in c.block.named_parameters())


def _scaled(case):
    "Every linear's weight times one learned factor, which starts at 1."
    factor = torch.ones((), requires_grad=True)
    original = {f"{n}.weight": case.block.get_submodule(n).weight.detach().clone() for n in case.grids}
    return factor, lambda: {n: W * factor for n, W in original.items()}


def test_a_step_is_taken_when_the_next_error_is_asked_for(case):
    case = case("llama")
    factor, weights = _scaled(case)
    steps = learn_block(case.block, weights, torch.optim.SGD([factor], lr=0.1), case.stream, case.target, 3, 16)
    first = next(steps)
    assert first == pytest.approx(case.error(), rel=1e-4) and factor == 1 and factor.grad != 0
    grad = factor.grad.clone()
    next(steps)
    assert factor.detach() == pytest.approx(1 - 0.1 * float(grad), rel=1e-5)  # the first scale has the whole rate
    assert len(list(steps)) == 1


def test_rates_and_penalties_follow_the_share_of_steps_done(case):
    case = case("llama")
    factor, weights = _scaled(case)
    optimizer, shares = torch.optim.SGD([factor], lr=1e-9), []
    penalty = lambda done: shares.append(done) or 7.0 * factor
    options = dict(iterations=4, batch_size=16, rate=lambda done: 1 + done, penalty=penalty)
    rates, grads = [], []
    for _ in learn_block(case.block, weights, optimizer, case.stream, case.target, **options):
        rates.append(optimizer.param_groups[0]["lr"])
        grads.append(float(factor.grad))
    assert shares == [0, 0.25, 0.5, 0.75] and rates[1:] == pytest.approx([1e-9, 1.25e-9, 1.5e-9])
    factor, weights = _scaled(case)
    optimizer = torch.optim.SGD([factor], lr=1e-9)
    next(learn_block(case.block, weights, optimizer, case.stream, case.target, 1, 16))
    assert grads[0] == pytest.approx(float(factor.grad) + 7.0, rel=1e-5)


def test_block_error_is_the_same_in_any_batches_and_takes_other_weights(case):
    case = case("opt")
    errors = []
    for size in (1, 5, 16):
        case.stream.batch_size = size
        errors.append(block_error(case.block, case.stream, case.target))
    assert errors == pytest.approx([case.error()] * 3, rel=1e-5)
    name = next(iter(case.grids))
    other = {f"{name}.weight": torch.zeros_like(case.block.get_submodule(name).weight)}
    assert block_error(case.block, case.stream, case.target, other) > 1.01 * errors[0]
    assert block_error(case.block, case.stream, case.target) == errors[-1]  # nothing was changed
