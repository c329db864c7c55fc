"""Windows, corpora and measures."""

import math

import pytest
import torch
from aespa_nb.capture import zeta_groups
from aespa_nb.data import CORPORA, consecutive_windows, load_text, random_windows
from aespa_nb.evaluate import evaluate_model, kl_divergence, perplexity
from aespa_nb.notation import AespaError
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

SMALL = dict(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=16)


@settings(deadline=None, derandomize=True, database=None, max_examples=50)
@given(length=st.integers(2, 200), seqlen=st.integers(2, 50), samples=st.integers(1, 20), seed=st.integers(0, 99))
def test_windows_are_runs_of_the_text(length, seqlen, samples, seed):
    ids = torch.arange(length)
    if length < seqlen:
        with pytest.raises(AespaError):
            random_windows(ids, samples, seqlen, seed)
        return
    drawn, rest = random_windows(ids, samples, seqlen, seed), consecutive_windows(ids, seqlen)
    assert drawn.shape == (samples, seqlen) and (drawn.diff(dim=1) == 1).all()
    assert torch.equal(rest.flatten(), ids[: length // seqlen * seqlen])


def test_splits_of_a_file_do_not_overlap(tmp_path):
    file = tmp_path / "t.txt"
    file.write_text("".join(chr(97 + i % 26) for i in range(1000)))
    first, last = load_text(str(file)), load_text(str(file), evaluation=True)
    assert first + last == file.read_text() and len(last) == 100


def test_text_that_cannot_be_read(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AespaError, match="UTF-8"):
        load_text(str(tmp_path / "b.txt"))
    with pytest.raises(AespaError, match="wikitext2"):
        load_text("wikitext3")


def test_corpora_without_a_network_say_what_to_do(monkeypatch):
    import datasets

    def refuse(path, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    for name in CORPORA:
        with pytest.raises(AespaError, match="check the network"):
            load_text(name)


def test_corpora_join_the_right_split_and_column(monkeypatch):
    import datasets

    asked = []

    def fake(path, split, **kwargs):
        asked.append((path, split))
        return datasets.Dataset.from_dict({"text": ["one", "two"], "sentence": ["uno", "dos"]})

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert load_text("wikitext2") == "one\n\ntwo" and load_text("ptb", evaluation=True) == "uno\n\ndos"
    assert asked == [("Salesforce/wikitext", "train"), ("ptb-text-only/ptb_text_only", "test")]


def test_measures_on_a_model_with_known_answers():
    "Zero output weights: every token has probability 1 / 32."
    model = LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=16)).eval()
    tokens = torch.randint(0, 32, (3, 16), generator=torch.Generator().manual_seed(0))
    other = LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=16)).eval()
    other.lm_head.weight.data.zero_()
    assert perplexity(other, tokens) == pytest.approx(32, rel=1e-5)
    p = model(tokens).logits.softmax(-1)
    expected = (p * (p * 32).log()).sum(-1).mean().item()
    assert kl_divergence(model, other, tokens) == pytest.approx(expected, rel=1e-3)
    assert evaluate_model(model, tokens, model, batch_size=2).top1 == 1.0


def test_nan_predictions_are_an_error():
    model = LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=16)).eval()
    model.lm_head.weight.data[0, 0] = math.nan
    with pytest.raises(AespaError, match="NaN"):
        perplexity(model, torch.zeros(1, 8, dtype=torch.int64))


def test_where_zeta_is_free():
    gqa = LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, intermediate_size=16))
    mha = LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=16))
    post = OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=16, word_embed_proj_dim=16, do_layer_norm_before=False))
    gelu = OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=16, word_embed_proj_dim=16, activation_function="gelu"))
    free = lambda model: [s for s, _ in zeta_groups(model)]
    assert "self_attn.v_proj" not in free(gqa) and "self_attn.v_proj" in free(mha)
    assert free(post) == ["self_attn.v_proj", "fc1"] and "fc1" not in free(gelu)
