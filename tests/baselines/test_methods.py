"""Methods that round a whole block: what holds of all of them, alone and as `quantize_model` runs them."""

import copy
from dataclasses import replace

import pytest
import torch
from blocks import TOKENS, error, nearest, weights
from models import fresh, small
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

from aespa_nb import AespaConfig, quantize_model
from aespa_nb.errors import AespaError, NumericalError, UnsupportedModelError
from aespa_nb.model.blocks import linears_of, stacks_of
from aespa_nb.quantize.config import METHODS, SOLVERS, resolve
from aespa_nb.rounding.gptq import gptq
from aespa_nb.rounding.grid import minmax_grid
from aespa_nb.rounding.packing import RoundedWeight

FEW = TOKENS[:6]
KINDS = dict(awq="llama mha opt", omniquant="llama mha opt neox", affinequant="llama mha opt neox bloom")
KINDS |= dict(brecq="llama opt", signround="llama opt")
LEARNED = [m for m in METHODS if m != "awq"]

# --- alone --------------------------------------------------------------------------------------------------------


def state(block):
    return {n: p.detach().clone() for n, p in block.named_parameters()}


@pytest.mark.parametrize("method, kind", [(m, kind) for m in METHODS for kind in KINDS[m].split()])
def test_better_than_nearest_at_two_bits_and_only_biases_are_written(task, method, kind):
    t = task(kind, iterations=60)
    rtn, old = error(t, nearest(t)), state(t.block)
    records = resolve(METHODS, method)(t)
    assert error(t, records) < 0.8 * rtn
    written = {n for n, p in state(t.block).items() if not torch.equal(p, old[n])}
    assert all(n.endswith("bias") for n in written) and (method == "affinequant" or not written)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in t.block.modules())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits, group_size", [(2, 8), (3, None), (4, 16)])
@pytest.mark.parametrize("method", METHODS)
def test_records_have_the_layout_asked_for(task, method, bits, group_size, symmetric):
    t = task("mha", bits, group_size=group_size, symmetric=symmetric, iterations=5)
    del t.bits["self_attn.o_proj"]  # what is kept has no record
    records, full = resolve(METHODS, method)(t), weights(t)
    assert records.keys() == t.bits.keys()
    for n, r in records.items():
        assert r.shape == full[n].shape and r.grid.bits == bits and (r.zeta > 0).all()
        assert r.grid.scale.shape == (len(full[n]), full[n].shape[1] // (group_size or full[n].shape[1]))
        assert not symmetric or (r.grid.zero == 2 ** (bits - 1)).all()
        assert not (r.grid.scale.requires_grad or r.grid.zero.requires_grad or r.zeta.requires_grad)


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_records(task, method):
    runs = []
    for seed in (0, 0, 1):
        torch.rand(seed + 1)  # the global generator plays no part
        records = resolve(METHODS, method)(task(seed=seed, iterations=5))
        runs.append(torch.cat([r.weight().flatten() for r in records.values()]))
    assert torch.equal(runs[0], runs[1]) and (method == "awq" or not torch.equal(runs[0], runs[2]))


@pytest.mark.parametrize("method", LEARNED)
def test_bad_options_and_nan_are_refused_and_the_block_stays(task, method):
    bad = [(dict(lr=-1.0), "iterations >= 1"), (dict(iterations=-1), "iterations >= 1")]
    bad += [(dict(group_size=7), "does not divide"), (dict(bits=9), "bits"), (dict(), "NaN")]
    for options, match in bad:
        t = task("mha", **options)
        t.target, old = t.target if options else t.target * float("nan"), state(t.block)
        with pytest.raises(AespaError if options else NumericalError, match=match):
            resolve(METHODS, method)(t)
        assert all(torch.equal(p, old[n]) for n, p in state(t.block).items())


# --- in quantize_model --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return fresh("llama")


def run(model, method, monkeypatch=None, **changes):
    if monkeypatch:
        monkeypatch.setitem(METHODS, "mine", method)
        method = "mine"
    rounded = copy.deepcopy(model)
    return rounded, quantize_model(rounded, FEW, AespaConfig(method=method, **changes))


CASES = {  # changes of the recipe, and the bits of a linear
    "mixed": (dict(bits=3, keep={"0.": 4}), lambda name: 4 if ".0." in name else 3),
    "kept": (dict(keep={"v_proj": 16}), lambda name: 16 if "v_proj" in name else 2),
    "groups": (dict(group_size=16), lambda name: 2),
    "symmetric": (dict(symmetric=True), lambda name: 2),
}


@pytest.mark.parametrize(
    "method, kind, case",
    [(m, k, case) for m in METHODS for k in KINDS[m].split() for case in CASES if case == "mixed" or k == "llama"],
)
def test_weights_are_made_from_records_with_errors_below_rtn(method, kind, case):
    model, (changes, bits) = small(kind), CASES[case]
    (path,) = stacks_of(model)
    names = [f"{path}.{i}.{n}" for i, block in enumerate(model.get_submodule(path)) for n in linears_of(block)]
    report = quantize_model(model, FEW, AespaConfig.preset(method, iterations=5, **changes))
    expected = {n: bits(n) for n in names if bits(n) < 16}
    assert {n: r.grid.bits for n, r in report.layers.items()} == expected
    assert {row["layer"]: row["bits"] for row in report.rows()} == expected
    for name, r in report.layers.items():
        assert torch.equal(r.weight(), model.get_submodule(name).weight) and 0 < r.loss <= r.loss_rtn
    assert torch.isfinite(model(FEW).logits).all()


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_work_is_one_line(model, method):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    with pytest.raises(UnsupportedModelError, match="c_attn is no nn.Linear") as caught:
        run(GPT2LMHeadModel(config).eval(), method)
    assert "\n" not in str(caught.value) and method in str(caught.value)
    with pytest.raises(AespaError, match="group"):
        run(model, method, group_size=7)


def test_unknown_names_are_refused():
    for field, names in dict(method="layers, ", solver="rtn, gptq, ").items():
        with pytest.raises(AespaError, match=f"{field} must be one of {names}.* not 'magic'"):
            AespaConfig(**{field: "magic"})


def test_a_method_gets_the_stream_behind_rounded_blocks_and_the_full_precision_target(model, monkeypatch):
    seen = []

    def spy(task):
        seen.append((task.stream.hidden.clone(), task.target.clone()))
        raise AespaError("seen enough")

    with pytest.raises(AespaError, match="enough"):
        run(model, spy, monkeypatch)
    with torch.no_grad():
        states = model.model(FEW, output_hidden_states=True).hidden_states
    assert_close(seen[0][0], states[0], atol=1e-6, rtol=1e-5)
    assert_close(seen[0][1], states[1], atol=1e-5, rtol=1e-4)


def records_of(task, change=lambda W: W):
    "Nearest codes of changed weights."
    grids = {n: minmax_grid(change(W), 2) for n, W in weights(task).items()}
    return {n: RoundedWeight.of(g.codes(change(weights(task)[n])), g) for n, g in grids.items()}


def test_a_method_that_fails_or_is_worse_than_rtn_leaves_nearest_values_and_says_why(model, monkeypatch):
    def wreck(task):
        task.block.input_layernorm.weight.mul_(2)  # as a method may that changes biases along with weights
        return records_of(task, lambda W: -3 * W)

    def gives_up(task):
        task.block.input_layernorm.weight.mul_(2)
        raise NumericalError("its matrix is singular: raise the damping")

    def explodes(task):
        records = records_of(task)
        r = records["self_attn.q_proj"]
        grid = replace(r.grid, scale=torch.full_like(r.grid.scale, 3e38))
        return records | {"self_attn.q_proj": r.on(grid)}

    plain = copy.deepcopy(model)
    quantize_model(plain, FEW, AespaConfig.preset("rtn"))
    saying = [(wreck, "round-to-nearest"), (gives_up, "singular"), (explodes, "reaches beyond torch.float32")]
    for method, said in saying:
        rounded, report = run(model, method, monkeypatch)
        assert all(torch.equal(a, b) for a, b in zip(rounded.parameters(), plain.parameters()))
        assert len(report.notes) == 2 and all(said in note for note in report.notes)


# --- solvers of one's own -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["layer", "attention", "gauss-newton"])
@pytest.mark.parametrize("changes", [{}, {"group_size": 16}, {"zfold": True}])
def test_a_solver_of_ones_own_does_what_the_same_one_inside_does(model, monkeypatch, objective, changes):
    monkeypatch.setitem(SOLVERS, "mine", lambda U, grid, loss, config: (gptq(U, loss.H, grid).codes, grid))
    mine, inside = copy.deepcopy(model), copy.deepcopy(model)
    for rounded, solver in ((mine, "mine"), (inside, "gptq")):
        report = quantize_model(rounded, FEW, AespaConfig(solver=solver, objective=objective, **changes))
        assert len(report.layers) == 14 and not report.notes
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), inside.parameters()))


def test_a_solver_of_ones_own_may_return_another_grid(model, monkeypatch):
    def doubled(U, grid, loss, config):
        grid = replace(grid, scale=2 * grid.scale)
        return grid.codes(U), grid

    monkeypatch.setitem(SOLVERS, "mine", doubled)
    nearest = AespaConfig.preset("rtn", bits=4)
    coarse, fine = (quantize_model(copy.deepcopy(model), FEW, c) for c in (replace(nearest, solver="mine"), nearest))
    for name, r in coarse.layers.items():  # worse than nearest: the last guard steps in
        assert torch.equal(r.weight(), fine.layers[name].weight())
    assert len(coarse.notes) == 14 and all("mine left" in note for note in coarse.notes)


SPOILT = [lambda c: c + 0.5, lambda c: c + 9, lambda c: c[..., :-1], lambda c: c * float("nan")]


@pytest.mark.parametrize("spoil", SPOILT)
def test_codes_that_the_grid_does_not_have_are_refused(model, monkeypatch, spoil):
    monkeypatch.setitem(SOLVERS, "mine", lambda U, grid, loss, config: (spoil(grid.codes(U)), grid))
    with pytest.raises(AespaError, match="solver 'mine': codes must be whole numbers of 2 bits"):
        quantize_model(copy.deepcopy(model), FEW, AespaConfig(solver="mine"))
