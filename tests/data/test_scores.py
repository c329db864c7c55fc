"""Measures: perplexity with and without overlap, divergence, tasks."""

import importlib.util
import json
import math

import pytest
import torch
from aespa_nb.cli import main
from aespa_nb.data.text import consecutive_windows, load_reference
from aespa_nb.data.scores import evaluate_model, kl_divergence, new_positions, perplexity
from aespa_nb.errors import AespaError
from aespa_nb.data.tasks import run_tasks
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

SMALL = dict(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=16)


def small(seed=0):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=16)).eval()
    for p in model.parameters():
        p.data.mul_(4)  # far from uniform predictions
    return model


def test_measures_on_a_model_with_known_answers():
    "Zero output weights: every token has probability 1 / 32."
    model, other = small(0), small(1)
    tokens = torch.randint(0, 32, (3, 16), generator=torch.Generator().manual_seed(0))
    other.lm_head.weight.data.zero_()
    assert perplexity(other, tokens) == pytest.approx(32, rel=1e-5)
    p = model(tokens).logits.softmax(-1)
    expected = (p * (p * 32).log()).sum(-1).mean().item()
    assert kl_divergence(model, other, tokens) == pytest.approx(expected, rel=1e-3)
    assert evaluate_model(model, tokens, model, batch_size=2).top1 == 1.0
    for m in (model, other):  # tokens that neither can say
        m.lm_head.register_forward_hook(lambda module, args, out: out.index_fill(-1, torch.tensor([0, 1]), -math.inf))
    assert 0 < kl_divergence(model, other, tokens.clamp(min=2)) < math.inf


def test_a_stride_of_nothing_and_nan_predictions_are_errors():
    model, tokens = small(), torch.zeros(2, 16, dtype=torch.int64)
    with pytest.raises(AespaError, match="stride"):
        perplexity(model, tokens, stride=0)
    model.lm_head.weight.data[0, 0] = math.nan
    with pytest.raises(AespaError, match="NaN"):
        perplexity(model, tokens)


@torch.no_grad()
def token_by_token(model, other, text, seqlen, stride):
    "Every measure from one forward pass per token, on the part of its window that stands before it."
    nll, kl, agree = [], [], []
    last = (len(text) - seqlen) // stride * stride + seqlen  # end of the last full window
    for t in range(last):
        start = max(0, -(-(t + 1 - seqlen) // stride) * stride)  # first window that holds t
        here = text[None, start : t + 1]
        log_p, log_q = (m(here).logits[0, -1].double().log_softmax(-1) for m in (model, other))
        kl.append((log_p.exp() * (log_p - log_q)).sum())
        agree.append(log_p.argmax() == log_q.argmax())
        if t > start:
            nll.append(-other(here[:, :-1]).logits[0, -1].double().log_softmax(-1)[text[t]])
    return math.exp(sum(nll) / len(nll)), float(sum(kl) / len(kl)), float(sum(agree) / len(agree))


@pytest.mark.parametrize("seqlen, stride", [(12, 12), (12, 4), (12, 5), (8, 1), (16, 15)])
def test_overlapping_windows_score_each_token_once(seqlen, stride):
    model, other = small(0), small(1)
    text = torch.randint(0, 32, (41,), generator=torch.Generator().manual_seed(seqlen))
    windows = consecutive_windows(text, seqlen, stride)
    expected = token_by_token(model, other, text, seqlen, stride)
    for batch_size in (1, 3):
        found = evaluate_model(other, windows, model, batch_size, stride)
        assert found == pytest.approx(expected, rel=1e-4)


@settings(deadline=None, derandomize=True, database=None, max_examples=50)
@given(length=st.integers(2, 60), seqlen=st.integers(2, 20), stride=st.integers(1, 20))
def test_new_positions_are_the_text(length, seqlen, stride):
    if seqlen > length or stride > seqlen:
        return
    windows = consecutive_windows(torch.arange(length), seqlen, stride)
    new = windows[new_positions(windows, stride)]
    assert torch.equal(new, torch.arange(windows[-1, -1] + 1))


def test_many_positions_in_one_batch():
    "More than are worked on at a time."
    model, tokens = small(), torch.randint(0, 32, (90, 16), generator=torch.Generator().manual_seed(1))
    one, all_at_once = (evaluate_model(model, tokens, small(3), b) for b in (1, 90))
    assert one == pytest.approx(all_at_once, rel=1e-5)


def test_eval_states_its_protocol(tmp_path, capsys):
    (tmp_path / "t.txt").write_text(" ".join(f"Array number {i} knows its shape." for i in range(900)))
    words = ["eval", "reference", "--data", str(tmp_path / "t.txt"), "--seqlen", "32", "--eval-samples", "4", "--quiet"]
    assert main(words) == 0
    plain = capsys.readouterr().out
    assert "4 x 32 tokens, behind BOS, without overlap" in plain and "all of it" in plain
    assert main([*words, "--no-bos"]) == 0 and "4 x 32 tokens, without overlap" in capsys.readouterr().out
    assert main([*words, "--stride", "8"]) == 0
    strided = capsys.readouterr().out
    assert "a window every 8" in strided and "last 8 tokens" in strided
    assert main([*words, "--stride", "33"]) == 2 and "stride must lie in 1..31" in capsys.readouterr().err


TASK = """task: continue
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/continue.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def task(tmp_path):
    "Held-out text: which of four pieces of 12 tokens follows?"
    _, tokenizer, _, heldout = load_reference()
    rows = []
    for i in range(16):
        choices = [tokenizer.decode(heldout[(i + 5 * k) % 128, 40:52]) for k in range(4)]
        choices[0], choices[i % 4] = choices[i % 4], choices[0]
        rows.append(dict(text=tokenizer.decode(heldout[i, :40]), choices=choices, answer=i % 4))
    (tmp_path / "continue.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "continue.yaml").write_text(TASK.replace("FOLDER", str(tmp_path)))
    return tmp_path / "continue.yaml", rows


@torch.no_grad()
def right(model, tokenizer, row):
    "Is the true continuation the likeliest?"
    sums = []
    for choice in row["choices"]:
        start, ids = len(tokenizer(row["text"])["input_ids"]), tokenizer(row["text"] + choice)["input_ids"]
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        sums.append(sum(log_p[i - 1, ids[i]].item() for i in range(start, len(ids))))
    return sums.index(max(sums)) == row["answer"]


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra `tasks`")
@pytest.mark.filterwarnings("default")
def test_tasks_agree_with_the_definition(task, capsys):
    file, rows = task
    model, tokenizer = load_reference()[:2]
    table = run_tasks(model, tokenizer, [str(file)])
    line = next(line for line in table.splitlines() if line.startswith("|continue"))
    assert f"{sum(right(model, tokenizer, r) for r in rows) / 16:.4f}" in line and "acc" in line and "±" in line
    assert main(["eval", "reference", "--tasks", str(file), "--limit", "4"]) == 0
    assert "|continue" in capsys.readouterr().out
    (file.parent / "empty.yaml").write_text("x: 1\n")
    messages = {"no_such_task": "no task file and no task", file.parent / "empty.yaml": "could not be run"}
    for name, message in messages.items():
        with pytest.raises(AespaError, match=message) as e:
            run_tasks(model, tokenizer, [str(name)])
        assert "\n" not in str(e.value)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="the harness is installed")
def test_tasks_without_the_harness_say_what_to_install(capsys):
    assert main(["eval", "reference", "--tasks", "piqa"]) == 2
    assert "pip install" in (printed := capsys.readouterr().err) and printed.count("\n") == 1
