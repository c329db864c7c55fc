"""Collectors: what they add up, over batches, processes and grouped heads."""

import contextlib
import copy
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.testing import assert_close
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from aespa_nb.attention.any_position import MeasuredStatistics
from aespa_nb.attention.forward import repeat_kv
from aespa_nb.errors import AespaError
from aespa_nb.model.blocks import stacks_of
from aespa_nb.model.capture import Probabilities, Watch, capture_attention, capturing
from aespa_nb.model.phases import timed
from aespa_nb.model.roles import Role
from aespa_nb.model.statistics import AttentionCollector, Batch, InputCollector, block_losses, parts_of, survey
from aespa_nb.model.stream import as_inputs, open_stream
from aespa_nb.rounding.hessian import Gram
from models import small

TOKENS = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))


@contextlib.contextmanager
def first_block(kind, tokens=TOKENS):
    "Model, first block, and the stream before it."
    model = small(kind, torch.float64)
    with torch.no_grad(), capturing(model), contextlib.closing(open_stream(model, as_inputs(tokens), 2)) as stream:
        yield model, model.get_submodule(stacks_of(model)[0])[0], stream


def read(kind, tokens, objective, team=None):
    "Losses, with a full-precision stream beside; it is the same but for a factor."
    with first_block(kind, tokens) as (model, block, stream), first_block(kind, tokens) as (_, reference, full):
        for part in getattr(full, "streams", [full]):
            part.hidden *= 1.1
        stream.team = team or stream.team
        return block_losses(model, block, stream, objective, full=(reference, full))


class Halves:
    "Two processes, one after the other: the second adds the sums that the first has left."

    def __init__(self):
        self.left = None

    def first(self, make):
        return make()

    def sums(self, statistics, done):
        for s in statistics:
            for name in s.SUMS if id(s) not in done else ():
                value = getattr(s, name)
                yield from self.sums([value], done) if hasattr(value, "SUMS") else [(s, name, value)]
            done.add(id(s))

    def sum(self, statistics):
        mine = [(s, name, v) for s, name, v in self.sums(statistics, set()) if v is not None]
        if self.left is None:
            self.left = [copy.deepcopy(v) for _, _, v in mine]
            return
        for (s, name, v), other in zip(mine, self.left, strict=True):
            setattr(s, name, v + other)


def apart(A, B):
    "Relative distance."
    return ((A - B).norm() / B.norm()).item()


def padded(lengths, left):
    "Rows of `TOKENS` cut to `lengths`, with padding on one side and the mask that says so."
    mask = torch.arange(TOKENS.shape[1]) < torch.tensor(lengths)[:, None]
    ids = torch.where(mask, TOKENS, 1)
    turn = lambda x: torch.stack([row.roll(len(row) - n) for row, n in zip(x, lengths)]) if left else x
    return dict(input_ids=turn(ids), attention_mask=turn(mask.long()))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("objective", ["layer", "attention", "gauss-newton"])
@pytest.mark.parametrize("kind", ["llama", "opt", "neox"])
def test_padding_counts_in_no_statistic(kind, objective, left):
    plain, found = read(kind, TOKENS[:, :11], objective), read(kind, padded([11] * 4, left), objective)
    assert found.tokens == plain.tokens == dict.fromkeys(plain.losses, 44)
    for key, loss in plain.losses.items():
        for a, b in zip((found.losses[key].H, found.losses[key].G), (loss.H, loss.G)):
            assert (a is None and b is None) or apart(a, b) < 1e-12
        assert apart(found.accumulated_errors[key].S, plain.accumulated_errors[key].S) < 1e-9


@pytest.mark.parametrize("left", [False, True])
def test_every_token_of_texts_of_several_lengths_counts_once(left):
    mixed = read("llama", padded([9, 16, 9, 16], left), "attention").losses
    short, long = (read("llama", tokens, "attention").losses for tokens in (TOKENS[::2, :9], TOKENS[1::2]))
    for key in mixed:
        assert apart(mixed[key].H, (9 * short[key].H + 16 * long[key].H) / 25) < 1e-12


@pytest.mark.parametrize("objective", ["layer", "attention", "gauss-newton"])
@pytest.mark.parametrize("kind", ["llama", "opt", "neox"])
def test_what_two_processes_have_read_adds_up(kind, objective):
    with mock.patch.dict(MeasuredStatistics.__init__.__kwdefaults__, probes=500):
        whole, team = read(kind, TOKENS, objective), Halves()
        read(kind, TOKENS[:2], objective, team)
        both = read(kind, TOKENS[2:], objective, team)
    drawn = ("[q]", "[k]") if kind == "neox" and objective != "layer" else ()  # measured with random vectors
    assert whole.losses.keys() == both.losses.keys() == whole.accumulated_errors.keys()
    assert whole.tokens == both.tokens == dict.fromkeys(whole.losses, TOKENS.numel())
    for key, loss in whole.losses.items():
        found = both.losses[key]
        if key.endswith(drawn):
            assert apart(found.H, loss.H) < 0.1 and apart(found.G, loss.G) < 0.1
        else:
            assert_close(found.H, loss.H)
            assert (loss.G is None) or torch.allclose(found.G, loss.G)
        for a, b in zip(whole.accumulated_errors[key], both.accumulated_errors[key]):
            assert (a is None) == (b is None) and (a is None or torch.allclose(a, b))


@pytest.mark.parametrize(
    "kind, adding", [("llama", {"self_attn.o_proj", "mlp.down_proj"}), ("neox", {"mlp.dense_4h_to_h"})]
)
def test_no_error_where_both_streams_are_the_same(kind, adding):
    "Also where the full-precision stream moves on, in whose place the block's outputs then stand."
    with first_block(kind) as (model, block, stream), first_block(kind) as (_, reference, full):
        found = block_losses(model, block, stream, full=(reference, full))
        assert stream.at == 0 and full.at == 1
    assert {key for key, e in found.accumulated_errors.items() if e.stream is not None} == adding
    assert not any(t.any() for e in found.accumulated_errors.values() for t in e if t is not None)


@pytest.mark.parametrize("objective", ["attention", "gauss-newton"])
def test_it_does_not_matter_whether_shared_heads_are_handed_over_repeated(objective):
    with first_block("llama") as (model, block, stream):
        found, expected = survey(model, block, stream), block_losses(model, block, stream, objective).losses
        batch, calls = Batch(), []
        hook = lambda m, args: batch.inputs.update(q=args[0].mT)
        handle = block.self_attn.q_proj.register_forward_pre_hook(hook)
        with capture_attention(lambda module, *tensors: calls.append((batch.inputs["q"], tensors)), within=block):
            stream.run(block)
        handle.remove()
    keys = {p.role: key for key, p in parts_of(block, found).items() if p.role}
    inputs = dict.fromkeys("qkv", InputCollector("q", list(keys.values()), Gram(32, dtype=torch.float64)))
    collector = AttentionCollector(block, found.attentions[0], keys, inputs, objective, 8)
    assert collector.fast and collector.kv_heads == 2
    for X, (Q, K, V, A) in calls:
        collector.add(Batch({"q": X}, attention=(Q, repeat_kv(K, 4), repeat_kv(V, 4), A)))
    losses = collector.losses(inputs["q"].losses())
    for key, loss in losses.items():
        assert_close(loss.H, expected[key].H, rtol=1e-4, atol=1e-4)
        assert loss.G is None or torch.allclose(loss.G, expected[key].G, rtol=1e-4, atol=1e-4)


def test_a_part_of_the_roles_is_measured():
    with first_block("llama") as (model, block, stream):
        found = survey(model, block, stream)
    keys = {"q": "self_attn.q_proj", "k": "self_attn.k_proj"}
    inputs = dict.fromkeys("qk", InputCollector("q", list(keys.values()), Gram(32, dtype=torch.float64)))
    collector = AttentionCollector(block, found.attentions[0], keys, inputs, "attention", 8)
    assert isinstance(collector.sums, MeasuredStatistics) and not inputs["q"].counted


def test_rows_of_one_linear_for_two_attention_calls_are_all_parts():
    rows, linear = torch.arange(24).view(2, 3, 2, 2), torch.nn.ModuleDict(dict(qkv=torch.nn.Linear(4, 24)))
    role = lambda i, j: Role("qkv", rows[i, j], "none", None, 1)
    calls = [SimpleNamespace(roles={name: role(i, j) for j, name in enumerate("qkv")}) for i in (0, 1)]
    parts = parts_of(linear, SimpleNamespace(attentions=calls, group_of=["qkv"]))
    assert sorted(torch.cat([p.rows for p in parts.values()]).tolist()) == list(range(24))


def test_phases_are_named_where_they_happen():
    with first_block("llama") as (model, block, stream), first_block("llama") as (_, reference, full):
        with timed() as seconds:
            block_losses(model, block, stream, full=(reference, full))
    assert set(seconds) == {"other", "survey", "forward", "hessians", "attention", "target"}


def whole(loss):
    "G as heavy as the pair of matrices."
    return loss.G * loss.H.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def test_a_constant_factor_before_attention_is_in_the_losses():
    "OPT scales its queries. Measured position maps contain such a factor without knowing of it."
    with first_block("opt") as (model, block, stream):
        assert survey(model, block, stream).attentions[0].roles["q"].gain == pytest.approx(8**-0.5)
        known = block_losses(model, block, stream, "attention").losses
        with torch.no_grad():
            keys = block.self_attn.k_proj(block.self_attn_layer_norm(stream.hidden))
        many = mock.patch.dict(MeasuredStatistics.__init__.__kwdefaults__, probes=1500)
        with many, mock.patch("aespa_nb.model.statistics._same_position", lambda q, k: False):
            measured = block_losses(model, block, stream, "attention").losses
    assert apart(whole(measured["self_attn.k_proj"]), whole(known["self_attn.k_proj"])) < 0.08
    q, d = known["self_attn.q_proj"].G, 8  # there, keys are taken about their mean in each sequence
    mean = keys.double().unflatten(-1, (-1, d)).mean(1)  # [seq heads d]
    expected = q - torch.einsum("shd,she->hde", mean, mean) / len(mean) / d
    assert apart(measured["self_attn.q_proj"].G, expected) < 0.08


def test_an_objective_that_is_none_is_refused():
    with first_block("llama") as (model, block, stream), pytest.raises(AespaError, match="gauss-newton"):
        block_losses(model, block, stream, "gauss_newton")


@pytest.mark.parametrize("early", [False, True])
def test_a_linear_that_runs_twice_is_read_to_the_end_in_a_pass_that_stops_early(early):
    with first_block("llama") as (model, block, stream):
        inner, gate, read = block.mlp.forward, block.mlp.gate_proj, []
        block.mlp.forward = lambda x: inner(x) + gate(2 * x).mean()
        found = survey(model, block, stream)
        group = [group for group in found.groups if "mlp.gate_proj" in group][-1]
        gate.register_forward_pre_hook(lambda module, args: read.append(args[0].mT))
        losses = block_losses(model, block, stream, "layer", groups=[group] if early else None, found=found).losses
    gram = Gram(32, dtype=torch.float64)
    list(map(gram.add, read))
    assert gram.tokens == 2 * TOKENS.numel()
    assert_close(losses["mlp.gate_proj"].H, gram.mean(), rtol=1e-9, atol=1e-12)


def test_capturing_puts_back_what_each_part_of_a_model_had():
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    vision, text = dict(size, image_size=8, patch_size=4), dict(size, vocab_size=64)
    config = LlavaConfig(vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**text))
    model = LlavaForConditionalGeneration(config)
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    parts = lambda: [c._attn_implementation for c in (config.vision_config, config.text_config)]
    with capturing(model):
        assert parts() == ["aespa_nb", "aespa_nb"]
    assert parts() == ["eager", "sdpa"]


@pytest.mark.parametrize("at", [(0, 1, 2), (..., slice(2)), (0, 0, [0], 0)])
def test_probabilities_refuse_what_they_would_get_wrong(at):
    A = Probabilities(torch.randn(2, 4, 8, 5), torch.randn(2, 2, 8, 5))
    with pytest.raises(AespaError, match="several queries"):
        A[at]


def test_a_watch_takes_products_by_name_and_of_vectors():
    heard, (Q, K, V) = [], torch.randn(3, 1, 2, 4, 8)
    with capture_attention(lambda *args: heard.append(args)), Watch():
        torch.dot(Q[0, 0, 0], K[0, 0, 0]), Q[0, 0, 0] @ K[0, 0, 0]
        torch.softmax(torch.randn(1, 2, 4, 4), -1)
        A = torch.matmul(Q, other=K.mT).softmax(-1)
        torch.matmul(A, other=V)
    assert len(heard) == 1 and torch.equal(heard[0][4], A)
