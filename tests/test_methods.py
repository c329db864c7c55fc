"""Methods that round a whole block, as `quantize_model` runs them."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from aespa_nb import AespaConfig, quantize_model
from aespa_nb.quantize.config import METHODS, SOLVERS
from aespa_nb.quantize.report import report_rows
from aespa_nb.rounding.gptq import gptq
from aespa_nb.errors import AespaError, NumericalError, UnsupportedModelError
from aespa_nb.model.block_tuning import Rounded

SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
TOKENS = torch.randint(0, 64, (6, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, max_position_embeddings=32)).eval()


def run(model, method, monkeypatch=None, **changes):
    if monkeypatch:
        monkeypatch.setitem(METHODS, "mine", method)
        method = "mine"
    rounded = copy.deepcopy(model)
    return rounded, quantize_model(rounded, TOKENS, AespaConfig(method=method, **changes))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("changes", [{}, {"group_size": 16}, {"symmetric": True}, {"bits": 3, "keep": {"v_proj": 16}}])
def test_weights_are_codes_on_grids_and_errors_below_rtn(model, method, changes):
    rounded, report = run(model, method, iterations=10, **changes)
    assert len(report.layers) == (12 if "keep" in changes else 14)
    for name, r in report.layers.items():
        assert int(r.codes.max()) < 2**r.grid.bits and r.loss <= r.loss_rtn
        W_hat = r.grid.values(r.codes.double()) * r.zeta
        torch.testing.assert_close(W_hat, r.weight.detach().double(), atol=1e-5, rtol=1e-4)
        assert torch.equal(r.weight, rounded.get_submodule(name).weight)
    rows = report_rows(report)
    assert {row["bits"] for row in rows} == {changes.get("bits", 2)}
    assert torch.isfinite(rounded(TOKENS).logits).all()


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_work_is_one_line(model, method):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    with pytest.raises(UnsupportedModelError, match="c_attn is no nn.Linear") as caught:
        run(GPT2LMHeadModel(config).eval(), method)
    assert "\n" not in str(caught.value)
    with pytest.raises(AespaError, match="group"):
        run(model, method, group_size=7)


def test_an_unknown_method_is_refused():
    with pytest.raises(AespaError, match="method must be one of layers, "):
        AespaConfig(method="magic")


def test_a_method_gets_the_drifted_stream_and_the_full_precision_target(model, monkeypatch):
    seen = []

    def spy(task):
        seen.append((task.stream.hidden.clone(), task.target.clone()))
        raise AespaError("seen enough")

    with pytest.raises(AespaError, match="enough"):
        run(model, spy, monkeypatch)
    with torch.no_grad():
        states = model.model(TOKENS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(seen[0][0], states[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(seen[0][1], states[1], atol=1e-5, rtol=1e-4)


def test_a_block_left_worse_than_rtn_is_rounded_to_nearest_and_named(model, monkeypatch):
    def wreck(task):
        for name in task.bits:
            task.block.get_submodule(name).weight.mul_(-3)
        task.block.input_layernorm.weight.mul_(2)  # as a method may that changes biases along with weights
        return {name: Rounded(None, None) for name in task.bits}

    rounded, report = run(model, wreck, monkeypatch)
    plain = copy.deepcopy(model)
    quantize_model(plain, TOKENS, AespaConfig.preset("rtn"))
    for a, b in zip(rounded.parameters(), plain.parameters()):
        assert torch.equal(a, b)
    assert len(report.notes) == 2 and all("round-to-nearest" in note for note in report.notes)


# --- solvers of one's own -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["layer", "attention", "gauss-newton"])
@pytest.mark.parametrize("changes", [{}, {"group_size": 16}, {"zfold": True}, {"shares": 2}])
def test_a_solver_of_ones_own_does_what_the_same_one_inside_does(model, monkeypatch, objective, changes):
    monkeypatch.setitem(SOLVERS, "mine", lambda U, grid, loss, config: (gptq(U, loss.H, grid).codes, grid))
    mine, inside = copy.deepcopy(model), copy.deepcopy(model)
    for rounded, solver in ((mine, "mine"), (inside, "gptq")):
        report = quantize_model(rounded, TOKENS, AespaConfig(solver=solver, objective=objective, **changes))
        assert len(report.layers) == 14 and not report.notes
    for a, b in zip(mine.parameters(), inside.parameters()):
        assert torch.equal(a, b)


def test_a_solver_of_ones_own_may_return_another_grid(model, monkeypatch):
    def doubled(U, grid, loss, config):
        grid = replace(grid, scale=2 * grid.scale)
        return grid.codes(U), grid

    monkeypatch.setitem(SOLVERS, "mine", doubled)
    nearest = AespaConfig.preset("rtn", bits=4)
    coarse, fine = (quantize_model(copy.deepcopy(model), TOKENS, c) for c in (replace(nearest, solver="mine"), nearest))
    for name, r in coarse.layers.items():  # worse than nearest: the last guard scales in
        assert torch.equal(r.weight, fine.layers[name].weight)
    assert len(coarse.notes) == 14 and all("mine left" in note for note in coarse.notes)


SPOILT = [lambda c: c + 0.5, lambda c: c + 9, lambda c: c[..., :-1], lambda c: c * float("nan")]


@pytest.mark.parametrize("spoil", SPOILT)
def test_codes_that_the_grid_does_not_have_are_refused(model, monkeypatch, spoil):
    monkeypatch.setitem(SOLVERS, "mine", lambda U, grid, loss, config: (spoil(grid.codes(U)), grid))
    with pytest.raises(AespaError, match="solver 'mine': codes must be whole numbers of 2 bits"):
        quantize_model(copy.deepcopy(model), TOKENS, AespaConfig(solver="mine"))


def test_a_solver_that_nobody_has_named_is_refused():
    with pytest.raises(AespaError, match="solver must be one of rtn, gptq, .* not 'mine'"):
        AespaConfig(solver="mine")


def test_a_method_that_fails_leaves_nearest_values_and_says_why(model, monkeypatch):
    def gives_up(task):
        task.block.input_layernorm.weight.mul_(2)
        raise NumericalError("its matrix is singular: raise the damping")

    def explodes(task):
        task.block.self_attn.q_proj.weight.fill_(float("inf"))
        return {name: Rounded(None, None) for name in task.bits}

    plain = copy.deepcopy(model)
    quantize_model(plain, TOKENS, AespaConfig.preset("rtn"))
    for method, said in ((gives_up, "its matrix is singular"), (explodes, "reaches beyond torch.float32")):
        rounded, report = run(model, method, monkeypatch)
        assert all(torch.equal(a, b) for a, b in zip(rounded.parameters(), plain.parameters()))
        assert len(report.notes) == 2 and all(said in n and "rounded to nearest" in n for n in report.notes)
