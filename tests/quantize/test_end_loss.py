"What an error of a linear's output costs the predictions: the matrices, and who uses them."

import copy

import pytest
import torch
from models import TOKENS, loud, refused, small, unchanged
from transformers import FalconConfig, FalconForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaModel
from transformers import T5Config, T5ForConditionalGeneration

from aespa_nb import AespaConfig, NumericalError, UnsupportedModelError, quantize_model
from aespa_nb.quantize.end_loss import output_metrics, read_gradients, shrink_
from aespa_nb.attention.kronecker_losses import KroneckerLoss
from aespa_nb.model.blocks import reading_inputs
from aespa_nb.rounding.hessian import Gram

@torch.no_grad()
def divergence(full, other):
    p, q = (m(TOKENS).logits.double().log_softmax(-1) for m in (full, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_the_loss_is_the_divergence_of_small_errors(kind):
    "In nats per token; means over labels and over directions, whose noise is the tolerance."
    full = loud(kind)
    metrics = [output_metrics(full, TOKENS, seed) for seed in range(12)]
    grams = {name: Gram(full.get_submodule(name).in_features) for name in metrics[0]}
    with torch.no_grad(), reading_inputs(full, grams, lambda name, x: grams[name].add(x.mT)):
        full(TOKENS)
    last = [name for name in grams if ".1." in name and not name.endswith(("q_proj", "k_proj", "v_proj"))]
    assert len(last) >= 3
    for name in last:
        loss = KroneckerLoss(grams[name].mean(), sum(m[name] for m in metrics) / len(metrics))
        true = predicted = 0
        for seed in range(6):
            other = copy.deepcopy(full)
            W = other.get_submodule(name).weight
            dW = 3e-3 * W.std() * torch.randn(W.shape, generator=torch.Generator().manual_seed(seed))
            W += dW
            true, predicted = true + divergence(full, other), predicted + float(loss(dW))
        assert 0.7 < predicted / true < 1.3, name


def test_the_model_is_what_it_was():
    full = loud().requires_grad_(True)
    full.lm_head.weight.requires_grad_(False)
    with unchanged(full):
        metrics = output_metrics(full, TOKENS)
    assert all(torch.equal(G, G.T) and torch.linalg.eigvalsh(G.double()).min() > -1e-6 for G in metrics.values())
    again = output_metrics(full, dict(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)))
    assert all(torch.allclose(G, again[n], rtol=1e-3, atol=1e-6 * float(G.max())) for n, G in metrics.items())


@pytest.mark.parametrize("objective, more", [("attention", {"gate_proj", "up_proj"}), ("gauss-newton", set())])
def test_linears_with_a_loss_of_their_own_keep_it(objective, more):
    codes = []
    for end_loss in (False, True):
        model = loud()
        del model.model.layers[1]
        config = AespaConfig(bits=2, objective=objective, solver="descent", end_loss=end_loss)
        codes.append({n: r.codes for n, r in quantize_model(model, TOKENS, config).layers.items()})
    moved = {n.split(".")[-1] for n in codes[0] if not torch.equal(codes[0][n], codes[1][n])}
    assert moved == {"o_proj", "down_proj"} | more


def test_encoders_conv1d_and_outputs_changed_in_place_have_metrics():
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, num_layers=2, num_decoder_layers=2, d_model=32, d_kv=8, d_ff=48, num_heads=4)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4)).eval()
    t5 = T5ForConditionalGeneration(T5Config(**sizes)).eval()
    small_falcon = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, parallel_attn=True)
    falcon = FalconForCausalLM(FalconConfig(**small_falcon, new_decoder_architecture=False)).eval()
    both = dict(input_ids=TOKENS, decoder_input_ids=TOKENS)
    for model, inputs in ((t5, both), (gpt, TOKENS), (falcon, TOKENS)):
        metrics = output_metrics(model, inputs)
        assert len(metrics) >= 8 and all(G.trace() > 0 for G in metrics.values())


def test_a_metric_is_the_second_moment_of_gradients_shrunk_by_what_is_noise():
    "By hand, sequence by sequence; half of them are short, which is no noise."
    full, mask, sums = loud(), torch.ones_like(TOKENS), {}
    mask[::2, 5:] = 0
    inputs = dict(input_ids=TOKENS, attention_mask=mask)
    counts = read_gradients(full, inputs, lambda name, g: sums.setdefault(name, []).append(g.double().T @ g.double()))
    assert counts == mask.sum(1).tolist()
    share = torch.tensor(counts).double().square().sum() / sum(counts) ** 2  # 1 / K for sequences of one length
    for name, G in output_metrics(full, inputs).items():
        parts, eye = torch.stack(sums[name]), torch.eye(len(G)).double()
        total = parts.sum(0)
        mean = total.trace() / len(G) * eye
        noise = (parts.square().sum() - share * total.square().sum()) / (1 - share)
        a = min(1, float(noise / (total - mean).square().sum()))
        shrunk = ((1 - a) * total + a * mean) / (2 * sum(counts))
        assert 0 < a and torch.allclose(G.double(), shrunk, rtol=1e-3, atol=1e-12)
    assert any(not torch.allclose(G, G[0, 0] * torch.eye(len(G))) for G in output_metrics(full, inputs).values())


def test_padding_counts_for_nothing():
    full, mask = loud(), torch.ones_like(TOKENS)
    mask[:, 10:] = 0
    padded = TOKENS.masked_fill(mask == 0, 0)
    short = output_metrics(full, TOKENS[:, :10])
    long = output_metrics(full, dict(input_ids=padded, attention_mask=mask))
    assert all(torch.allclose(G, long[n], rtol=1e-3, atol=1e-5 * float(G.max())) for n, G in short.items())


def test_nan_and_what_looks_at_no_output_are_refused():
    full = loud()
    full.lm_head.weight[3] = float("nan")
    with refused("NaN or Inf") as error:
        output_metrics(full, TOKENS)
    assert isinstance(error.value, NumericalError)
    for changes in (dict(solver="gptq"), dict(method="awq")):
        with refused("end_loss weighs outputs"):
            AespaConfig(end_loss=True, **changes)
    with pytest.raises(UnsupportedModelError, match="end_loss=False"):  # predicts nothing
        output_metrics(LlamaModel(small("llama").config), TOKENS)


def test_what_is_noise_is_shrunk_away():
    "Against the obvious form; of pure noise nothing is left, of many samples nearly all; nearer to the truth."
    generator = torch.Generator().manual_seed(0)
    root = torch.diag(torch.logspace(0, 0.5, 24, dtype=torch.float64))  # of the true second moment
    for count, low, high in ((2, 0.5, 1.0), (12, 0.3, 0.9), (3000, 0.0, 0.02)):
        errors = []
        for _ in range(10):
            X = torch.randn(count, 24, 4, generator=generator, dtype=torch.float64)
            parts = root @ X @ X.mT @ root
            total, squares = parts.sum(0), float(parts.square().sum())
            mean = total.diagonal().mean() * torch.eye(24)
            noise = count * (parts - parts.mean(0)).square().sum() / (count - 1)
            share = shrink_(shrunk := total.clone(), squares, count)
            assert abs(share - min(1, float(noise / (total - mean).square().sum()))) < 1e-9 and low <= share <= high
            assert torch.allclose(shrunk, (1 - share) * total + share * mean)
            errors.append([float((M - 4 * count * root @ root).norm()) for M in (shrunk, total)])
        after, before = torch.tensor(errors).mean(0)
        assert after < (0.9 if count < 100 else 1.001) * before
    one = parts[0].clone()
    assert shrink_(one, float(one.square().sum()), 1) == 1
    assert torch.allclose(one, parts[0].trace() / 24 * torch.eye(24, dtype=torch.float64))
    white = torch.randn(40, 24, 4, generator=generator, dtype=torch.float64)
    white = white @ white.mT
    assert shrink_(white.sum(0), float(white.square().sum()), 40) > 0.8
