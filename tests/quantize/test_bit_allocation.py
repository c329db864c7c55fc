"""Bits for each linear: prices against the divergence they stand for, the knapsack against brute force, the command."""

import itertools
import json

import pytest
import torch
from aespa_nb import AespaConfig, quantize_model
from aespa_nb.quantize.config import bits_of
from aespa_nb.quantize.bit_allocation import allocate_bits, auto_bits, bits_table, output_prices, predicted_losses
from aespa_nb.cli import main
from aespa_nb.model.blocks import linears_of, weight_of
from hypothesis import given, settings
from hypothesis import strategies as st
from models import refused, unchanged
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3MoeConfig, ViTConfig, ViTModel

BITS = (2, 3, 4, 5, 6)
loss = st.floats(0, 1e3, allow_nan=False)
layer = st.tuples(st.integers(1, 40), st.lists(loss, min_size=3, max_size=3))


def total(losses, bits):
    return sum(losses[name][b] for name, b in bits.items())


@settings(max_examples=150, deadline=None)
@given(st.lists(layer, min_size=1, max_size=5), st.floats(2, 4))
def test_allocation_is_the_best_there_is(layers, budget):
    losses = {str(i): dict(zip((2, 3, 4), values)) for i, (_, values) in enumerate(layers)}
    sizes = {str(i): size for i, (size, _) in enumerate(layers)}
    found, room = allocate_bits(losses, sizes, budget), budget * sum(sizes.values()) + 1e-6
    spent = lambda bits: sum(sizes[n] * b for n, b in bits.items())
    every = (dict(zip(losses, pick)) for pick in itertools.product((2, 3, 4), repeat=len(losses)))
    assert spent(found) <= room
    best = min(total(losses, bits) for bits in every if spent(bits) <= room)
    assert total(losses, found) == pytest.approx(best, rel=1e-12, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.lists(layer, min_size=30, max_size=60), st.sampled_from(BITS))
def test_allocation_is_never_worse_than_uniform(layers, budget):
    falling = lambda values: sorted([*values, values[0] / 2, 0.0], reverse=True)
    losses = {str(i): dict(zip(BITS, falling(values))) for i, (_, values) in enumerate(layers)}
    sizes = {str(i): 64 * size for i, (size, _) in enumerate(layers)}
    found = allocate_bits(losses, sizes, budget)
    assert sum(sizes[n] * b for n, b in found.items()) <= budget * sum(sizes.values())
    assert total(losses, found) <= sum(losses[n][budget] for n in losses) * (1 + 1e-12)


def test_coarse_units_stay_within_the_budget_and_near_the_best():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(50, generator=generator).tolist()
    losses = {str(i): {b: w * 4.0**-b for b in BITS} for i, w in enumerate(weights)}
    sizes = {str(i): int(n) for i, n in enumerate(torch.randint(10**6, 10**7, (50,), generator=generator))}
    fine, coarse = (allocate_bits(losses, sizes, 3, units) for units in (2**17, 2**12))
    assert sum(sizes[n] * b for n, b in coarse.items()) <= 3 * sum(sizes.values())
    assert total(losses, fine) <= total(losses, coarse) < 1.01 * total(losses, fine)


def test_a_budget_that_cannot_be_met_is_refused():
    with refused("too small"):
        allocate_bits({"a": {3: 1.0, 4: 0.5}}, {"a": 8}, 2.5)
    with refused("NaN"):
        allocate_bits({"a": {2: float("nan"), 4: 0.5}}, {"a": 8}, 4)


SMALL = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)


def build(config):
    "A small model from its configuration, and tokens for it."
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model, torch.randint(config.vocab_size, (6, 16))


def test_prices_are_half_the_fisher_information_of_the_outputs():
    "Sequences of one token: what is behind the last linear is a function of one vector."
    model, _ = build(LlamaConfig(**{**SMALL, "vocab_size": 7}))
    name, seen, tokens = "model.layers.1.mlp.down_proj", [], torch.arange(7).repeat(25)[:, None]
    handle = model.model.norm.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    model(tokens[:7])
    handle.remove()
    behind = lambda z: model.lm_head(model.model.norm(z)).log_softmax(-1)
    exact = 0
    for z in seen[0][:, 0]:
        slopes = torch.autograd.functional.jacobian(behind, z)
        exact = exact + 0.5 * (behind(z).exp()[:, None] * slopes**2).sum(0).detach() / 7
    with unchanged(model):
        found = output_prices(model, {"input_ids": tokens})
    assert set(found) == {f"model.layers.{i}.{n}" for i in range(2) for n in linears_of(model.model.layers[i])}
    assert torch.allclose(found[name], exact, rtol=0.25)


FAMILIES = {
    "experts": Qwen3MoeConfig(
        **SMALL, num_key_value_heads=1, head_dim=8, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2
    ),
    "fused": GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_any_family_within_the_budget(family):
    model, tokens = build(FAMILIES[family])
    with unchanged(model):
        config = auto_bits(model, tokens, AespaConfig.preset("gptq", 3), 3, choices=(2, 3, 4))
    quantized = quantize_model(model, tokens, config)
    assert set(quantized.layers) <= set(config.keep)
    assert all(r.grid.bits == config.keep[name] for name, r in quantized.layers.items())
    sizes = {name: weight_of(model, name).numel() for name in config.keep}
    assert sum(sizes[n] * b for n, b in config.keep.items()) <= 3 * sum(sizes.values())
    assert len(set(config.keep.values())) > 1 and len(bits_table(config))


def test_kept_patterns_win_and_count():
    model, tokens = build(LlamaConfig(**SMALL))
    given = AespaConfig.preset("gptq", 3, keep={"down_proj": 5, "o_proj": 16})
    config = auto_bits(model, tokens, given, 3, choices=(2, 3, 4))
    names = [f"model.layers.{i}.{n}" for i in range(2) for n in linears_of(model.model.layers[i])]
    bits = {name: bits_of(config, name) for name in names}
    assert {b for n, b in bits.items() if "down_proj" in n} == {5}
    assert {b for n, b in bits.items() if "o_proj" in n} == {16}
    sizes = {n: weight_of(model, n).numel() for n in names if "o_proj" not in n}
    assert sum(sizes[n] * bits[n] for n in sizes) <= 3 * sum(sizes.values())


def test_a_model_without_logits_is_refused():
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8)
    model = ViTModel(ViTConfig(**sizes, patch_size=4)).eval()
    with refused("no logits"):
        predicted_losses(model, {"pixel_values": torch.randn(2, 3, 8, 8)}, AespaConfig.preset("gptq"))


def test_the_command_shares_out_and_keeps(one_block, tmp_path, capsys):
    out = tmp_path / "out"
    words = "--preset rtn --auto-bits 5 --keep q_proj=3 --format gptq --samples 2 --eval-samples 2 --quiet --out"
    assert main(["quantize", one_block, *words.split(), str(out)]) == 0
    assert "bits, block by block" in capsys.readouterr().out
    layers = json.loads((out / "quantization.json").read_text())["layers"]
    assert {r["bits"] for r in layers if "q_proj" in r["layer"]} == {3} and len({r["bits"] for r in layers}) > 1


MISTAKES = {
    "range": ("--auto-bits 9", "between 2 and 6"),
    "pattern": ("--keep nowhere=4", "no linear's name contains"),
    "both": ("--bits 3 --auto-bits 3", "exclude each other"),
    "least": ("--auto-bits 2 --keep down_proj=4", "too small"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line(case, one_block, tmp_path, capsys):
    words, message = MISTAKES[case]
    line = f"quantize {one_block} {words} --preset rtn --samples 2 --eval-samples 2 --quiet --out {tmp_path / 'out'}"
    assert main(line.split()) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1 and not list(tmp_path.iterdir())
