"Scales and norm weights of a whole rounded model, learned from its predictions: what moves, and what stays."

import copy

import pytest
import torch
from models import loud, small
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaModel

from aespa_nb import AespaConfig, AespaError, UnsupportedModelError, evaluate_model, quantize_model
from aespa_nb.model.block_tuning import norm_weights
from aespa_nb.model.end_to_end import Predictions, free_scales, tune_end_to_end

TOKENS = torch.randint(0, 64, (12, 16), generator=torch.Generator().manual_seed(0))


def rounded(model, **changes):
    model = copy.deepcopy(model)
    return model, quantize_model(model, TOKENS, AespaConfig.preset("gptq", 2, **changes))


def kl(model, full):
    return evaluate_model(model, TOKENS, full).kl


@pytest.mark.parametrize("kind, group_size", [("llama", 8), ("opt", None)])
def test_the_divergence_falls_and_codes_stay(kind, group_size):
    full = loud(kind)
    model, report = rounded(full, group_size=group_size)
    tuned, after = rounded(full, group_size=group_size, end_to_end=30)
    assert kl(tuned, full) < 0.97 * kl(model, full)
    for name, record in after.layers.items():
        old = report.layers[name]
        assert torch.equal(record.words, old.words) and torch.equal(record.grid.zero, old.grid.zero)
        assert torch.equal(tuned.get_submodule(name).weight, record.weight()) and record.loss == old.loss
    moved = {n for n, p in tuned.named_parameters() if not torch.equal(p, model.get_parameter(n))}
    assert moved == {f"{n}.weight" for n in after.layers} | set(norm_weights(full))


def test_nothing_stays_patched_and_nothing_changes_before_the_end():
    full = loud()
    model, report = rounded(full)
    learning = [p.requires_grad for p in model.parameters()]
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        logits = model(TOKENS).logits
        with free_scales(model, report.layers) as scales:
            assert torch.equal(model(TOKENS).logits, logits)  # all factors are one
            assert [n for n, p in model.named_parameters() if p.requires_grad] == []
            scales["model.norm"].factors["weight"].mul_(2)
            assert torch.allclose(model(TOKENS).logits, 2 * logits, rtol=1e-4)
        assert torch.equal(model(TOKENS).logits, logits)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == learning
    assert not any("forward" in vars(m) for m in model.modules())


def test_the_divergence_is_that_of_the_scores_with_bent_logits_too():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    config = Gemma2Config(vocab_size=64, num_hidden_layers=2, final_logit_softcapping=2.0, **sizes)
    full = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        full.model.embed_tokens.weight.mul_(20)
        kept = Predictions(full, dict(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)), batch_size=5)
        other = copy.deepcopy(full)
        other.model.layers[0].mlp.down_proj.weight.zero_()
        assert abs(float(kept.divergence(other, torch.arange(12))) / kl(other, full) - 1) < 1e-4
        assert float(kept.divergence(full, torch.arange(12))) < 1e-7


def test_the_gradient_of_a_batch_is_the_mean_over_its_parts():
    full = loud()
    model, report = rounded(full)
    found = []
    for size in (1, 4):
        kept, copied = Predictions(full, TOKENS, size), copy.deepcopy(model)
        found.append(tune_end_to_end(copied, report.layers, kept, iterations=3))
    assert found[0].curve[-1][2] == pytest.approx(found[1].curve[-1][2], rel=1e-4)


@pytest.mark.parametrize("broken", ["no gain", "nan"])
def test_what_gains_nothing_is_dropped(broken, monkeypatch):
    full = loud()
    model, report = rounded(full)
    before, kept = copy.deepcopy(model.state_dict()), Predictions(full, TOKENS)
    if broken == "nan":
        value, calls = Predictions.divergence, []
        bad = lambda *args: value(*args) * (float("nan") if calls.append(1) or len(calls) > 1 else 1)
        monkeypatch.setattr(Predictions, "divergence", bad)
    found = tune_end_to_end(model, report.layers, kept, iterations=4, lr=0.02 if broken == "nan" else 30.0)
    assert found.step == 0 and found.records is report.layers
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_a_run_in_which_it_gains_nothing_says_so():
    full = small("llama")
    with torch.no_grad():
        full.lm_head.weight.zero_()  # predicts nothing, whatever its scales are
    _, report = rounded(full, end_to_end=2)
    assert any("end to end" in note for note in report.notes)


def test_what_it_cannot_work_with_is_refused():
    full = small("llama")
    with pytest.raises(AespaError, match="only one"):
        quantize_model(full, TOKENS[:1], AespaConfig.preset("gptq", 2, end_to_end=2))
    assert all(torch.equal(p, q) for p, q in zip(full.parameters(), small("llama").parameters()))
    with pytest.raises(UnsupportedModelError, match="predicts no tokens"):
        Predictions(LlamaModel(full.config), TOKENS)
    with pytest.raises(AespaError, match="iterations"):
        tune_end_to_end(full, {}, Predictions(full, TOKENS), iterations=0)


def test_linears_that_are_no_modules_keep_their_scales():
    full = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4)).eval()
    with torch.no_grad():
        for p in full.parameters():
            p.mul_(5 if p.ndim == 2 else 1)
    model, report = rounded(full)
    tuned, after = rounded(full, end_to_end=10)
    assert all(not isinstance(full.get_submodule(n), nn.Linear) for n in report.layers)
    assert all(torch.equal(r.grid.scale, after.layers[n].grid.scale) for n, r in report.layers.items())
    assert kl(tuned, full) < kl(model, full)
    assert any("8 linears are no nn.Linear" in note for note in after.notes)


def test_weights_that_blocks_share_stay():
    full = loud()
    full.model.layers[1].mlp = full.model.layers[0].mlp
    model, report = rounded(full)
    kept = Predictions(full, TOKENS)
    found = tune_end_to_end(model, report.layers, kept, iterations=20)
    left = float(kept.divergence(model, torch.randperm(12, generator=torch.Generator().manual_seed(0))[:1]))
    assert found.step and left < found.curve[0][2] and left == pytest.approx(min(c[2] for c in found.curve), rel=1e-5)
    shared = [n for n in report.layers if "mlp" in n]
    assert shared and all(torch.equal(found.records[n].grid.scale, report.layers[n].grid.scale) for n in shared)


def test_padding_has_no_weight():
    full = loud()
    model, report = rounded(full)
    mask = torch.ones_like(TOKENS)
    mask[:8, 4:] = 0
    inputs = dict(input_ids=TOKENS * mask, attention_mask=mask)
    learn = lambda size: tune_end_to_end(
        copy.deepcopy(model), report.layers, Predictions(full, inputs, size), iterations=3
    )
    curves = [learn(size).curve for size in (1, 4)]
    assert curves[0][0][2] == pytest.approx(curves[1][0][2], rel=1e-4)
    assert curves[0][-1] == pytest.approx(curves[1][-1], rel=1e-3)
