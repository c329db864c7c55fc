"""Windows, texts and where they are from."""

import copy
import io
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from aespa_nb.data.text import (
    CORPORA,
    Corpus,
    _read_split,
    calibration_windows,
    consecutive_windows,
    evaluation_windows,
    load_reference,
    mixture,
    own_words,
    random_windows,
    read_text,
    shared_text,
    shared_warning,
)
from aespa_nb.errors import AespaError
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig


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


def test_text_that_cannot_be_read(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "broken.json").write_text("{[")
    (tmp_path / "numbers.jsonl").write_text('{"text": 1}\n{"text": 2}')
    for source, message in {
        "b.txt": "UTF-8",
        "b.txt:column": "too many colons",
        "broken.json": "could not be loaded",
        "numbers.jsonl": "no text in column 'text'",
    }.items():
        with pytest.raises(AespaError, match=message) as e:
            read_text(f"{tmp_path}/{source}")
        assert "\n" not in str(e.value)
    with pytest.raises(AespaError, match="wikitext2"):
        read_text("wikitext3")


def test_a_mixture_has_its_shares(tmp_path):
    for name in ("a", "b", "c,d"):
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 500)
    tokenizer, a, b = load_reference().tokenizer, f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"
    assert mixture(f"{a}*3, {b}") == {a: 0.75, b: 0.25} and list(mixture(f"{tmp_path}/c,d.txt").values()) == [1]
    assert mixture("a.jsonl:messages*.5,b") == {"a.jsonl:messages": 1 / 3, "b": 2 / 3}
    wrong = {"*0,b": "above 0", ",": "a name", f",{a}": "of its own", ",b": "no text"}
    for source, message in ((f"{a}{rest}", message) for rest, message in wrong.items()):
        with pytest.raises(AespaError, match=message):
            calibration_windows(source, tokenizer, 8, 16)
    windows = calibration_windows(f"{a}*2,{b}", tokenizer, 7, 16, seed=3)
    of_b = ["b" in tokenizer.decode(w, skip_special_tokens=True) for w in windows.tokens]
    assert sum(of_b) == 2 and of_b != sorted(of_b) and windows.origin.windows == 7  # drawn, not one after the other
    assert torch.equal(windows.tokens, calibration_windows(f"{a}*2,{b}", tokenizer, 7, 16, seed=3).tokens)
    heldout = evaluation_windows(f"{a}*2,{b}", tokenizer, 16)
    assert len(heldout.tokens) == sum(len(evaluation_windows(x, tokenizer, 16).tokens) for x in (a, b))
    assert len(evaluation_windows(f"{a}*2,{b}", tokenizer, 16, 3).tokens) == 3
    assert shared_warning(windows, heldout) is not None  # each text says the same again and again


@pytest.fixture
def hub(monkeypatch):
    "A hub with the rows that the corpora's real layouts have; keeps what it was asked for."
    import datasets

    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        column = "sentence" if "ptb" in path else "text"
        rows = {s: [{column: f"{s} {i}", "n": i} for i in range(3000)] for s in ("train", "validation", "test")}
        return {s: map(dict, r) for s, r in rows.items() if not (s == "test" and "c4" in path)}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_corpora_join_the_right_split_and_column(hub):
    assert read_text("wikitext2").text.startswith("train 0\n\ntrain 1\n\n")
    assert read_text("wikitext2", evaluation=True).text.startswith("test 0\n\ntest 1\n\n")
    assert read_text("ptb", evaluation=True).text.startswith("test 0 test 1 ")
    c4 = read_text("c4", evaluation=True).text
    assert c4.startswith("validation 0 validation 1 ") and c4.endswith(" 1099")
    assert hub[0] == ("Salesforce/wikitext", {"name": "wikitext-2-raw-v1"}) and hub[3][1]["streaming"]


def test_hub_spellings(hub):
    assert read_text("org/name")[1:] == ("org/name", "train")
    assert read_text("org/name", evaluation=True)[1:] == ("org/name", "test")
    assert read_text("org/c4-like", evaluation=True)[1:] == ("org/c4-like", "validation")
    assert read_text("org/ptb/small:validation:sentence")[1:] == ("org/ptb/small", "validation")
    assert hub[-1] == ("org/ptb", {"streaming": True, "name": "small"})
    for source, message in {"org/name:dev": "train, validation, test", "org/ptb": "it has: sentence, n"}.items():
        with pytest.raises(AespaError, match=message):
            read_text(source)


def test_corpora_without_a_network_say_what_to_do(monkeypatch):
    import datasets

    def refuse(path, **kwargs):
        raise ConnectionError("offline\nand more")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    for name in [*CORPORA, "org/name"]:
        with pytest.raises(AespaError, match="offline.*check the name and the network"):
            read_text(name)


def test_a_stream_is_read_no_further_than_needed():
    "The limit of documents stops the stream, also one without an end."
    endless = ({"text": str(i)} for i in itertools.count())
    corpus = Corpus("x", documents=(5, None))
    with pytest.MonkeyPatch.context() as m:
        m.setattr("aespa_nb.data.text._load_dataset", lambda corpus: {"train": endless})
        assert _read_split(corpus).text == "0\n\n1\n\n2\n\n3\n\n4"


def test_splits_of_files_and_folders_do_not_overlap(tmp_path):
    "Real files; all but plain text go through datasets."
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    rows = [{"body": f"document {i}"} for i in range(50)]
    whole = "\n\n".join(r["body"] for r in rows)
    (tmp_path / "set").mkdir()
    (tmp_path / "a.txt").write_text(whole)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for name, part in {"a": rows, "set/train": rows[:40], "set/test": rows[40:]}.items():
        Dataset.from_list(part).to_parquet(tmp_path / f"{name}.parquet")
    for name in ("a.txt", "a.jsonl:body", "a.json:body", "a.parquet:body"):
        first, last = (read_text(f"{tmp_path}/{name}", e).text for e in (False, True))
        assert first + last == whole and len(first) == len(whole) * 9 // 10
    assert read_text(f"{tmp_path}/set:test:body").text == "\n\n".join(r["body"] for r in rows[40:])


def test_conversations_become_text_by_the_chat_template(tmp_path):
    tokenizer = load_reference().tokenizer
    talk = lambda i: [dict(role="user", content=f"question {i}"), dict(role="assistant", content="yes")]
    rows = [dict(messages=talk(i)) for i in range(40)]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = f"{tmp_path}/chat.jsonl:messages"
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    text = read_text(source, tokenizer=tokenizer).text
    assert text.startswith("<user> question 0 <assistant> yes \n\n<user> question 1")
    first = tokenizer.decode(calibration_windows(source, tokenizer, 1, 16).tokens[0])
    assert "user" in first or "assistant" in first
    shared = [{"from": "human", "value": "question 0"}, {"from": "gpt", "value": "yes"}]
    (tmp_path / "shared.json").write_text(json.dumps([dict(conversations=shared), dict(conversations=None)] * 9))
    said = read_text(f"{tmp_path}/shared.json:conversations", tokenizer=tokenizer, whole=True).text
    assert said.split("\n\n") == ["<user> question 0 <assistant> yes "] * 9
    (tmp_path / "odd.jsonl").write_text(json.dumps(dict(messages=[dict(role="user")])))
    tokenizer.chat_template = "{{ messages[0]['content'] + 1 }}"
    with pytest.raises(AespaError, match="odd.jsonl could not be loaded"):
        read_text(f"{tmp_path}/odd.jsonl:messages", tokenizer=tokenizer)


def test_text_as_people_have_it(tmp_path, monkeypatch):
    (tmp_path / "bom.txt").write_bytes("ab ".encode("utf-8-sig") + b"cd " * 9)
    assert read_text(f"{tmp_path}/bom.txt").text.startswith("ab cd")
    rows = [dict(text=None), dict(text="first"), dict(text=None), dict(text="last")]
    (tmp_path / "gaps.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_text(f"{tmp_path}/gaps.jsonl", whole=True).text == "first\n\nlast"
    (tmp_path / "none.jsonl").write_text("\n".join(json.dumps(dict(text=None)) for _ in range(3)))
    with pytest.raises(AespaError, match="has no text in column 'text' of train; it has: text"):
        read_text(f"{tmp_path}/none.jsonl")
    told = read_text(f"{tmp_path}/bom.txt", evaluation=True, whole=True)
    assert told.text == "ab " + "cd " * 9 and told.split == "all of it"
    monkeypatch.setattr("sys.stdin", io.StringIO("0123456789"))
    assert [read_text("-", e).text for e in (False, True)] == ["012345678", "9"]


@settings(deadline=None, derandomize=True, database=None, max_examples=50)
@given(seed=st.integers(0, 10**6), run=st.integers(1, 6), letters=st.integers(2, 4))
def test_shared_text_is_the_share_of_runs_found(seed, run, letters):
    g = torch.Generator().manual_seed(seed)
    calib, heldout = (torch.randint(0, letters, shape, generator=g) for shape in ((3, 8), (2, 11)))
    runs = lambda t: [tuple(w[i : i + run]) for w in t.tolist() for i in range(len(w) - run + 1)]
    found = [r in set(runs(calib)) for r in runs(heldout)]
    assert shared_text(calib, heldout, run) == pytest.approx(sum(found) / len(found))


def test_shared_text_is_said(tmp_path):
    tokenizer = load_reference().tokenizer
    (tmp_path / "same.txt").write_text("A tensor is an array that knows its shape. " * 300)
    both, file = (calibration_windows, evaluation_windows), str(tmp_path / "same.txt")
    calib, heldout = (f(file, tokenizer, seqlen=64) for f in both)
    assert "100% of the evaluation text" in shared_warning(calib, heldout)
    assert "last tenth" in str(heldout.origin) and heldout.origin.available > heldout.tokens.numel() - 64
    calib, heldout = (f("reference", tokenizer, seqlen=256) for f in both)
    assert shared_warning(calib, heldout) is None
    assert "the same text" in shared_warning(calib, heldout._replace(origin=calib.origin))


@pytest.mark.parametrize("cached", [True, False])
def test_what_a_model_writes_comes_from_its_predictions(cached):
    "A model that predicts each token's successor writes the numbers in a row."

    class Counts(torch.nn.Module):
        device, config = torch.device("cpu"), LlamaConfig(max_position_embeddings=16)

        def forward(self, tokens, **known):
            seen.append(tokens.shape[1])
            logits = torch.full((*tokens.shape, 64), -30.0).scatter(-1, (tokens[..., None] + 1) % 64, 30.0)
            return SimpleNamespace(logits=logits, **({"past_key_values": True} if cached else {}))

    class Begin(SimpleNamespace):
        def __len__(self):
            return 60

    seen, begin, model = [], Begin(bos_token_id=None, eos_token_id=5), Counts().eval()
    tokens = own_words(model, begin, samples=3, seqlen=8, batch_size=2)
    assert torch.equal(tokens, torch.arange(5, 13).expand(3, -1))
    assert seen == ([1] * 14 if cached else [*range(1, 8)] * 2)
    cases = {"neither BOS nor EOS": (Begin(bos_token_id=None, eos_token_id=None), 8), "lower seqlen": (begin, 17)}
    for words, (tokenizer, seqlen) in cases.items():
        with pytest.raises(AespaError, match=words):
            own_words(model, tokenizer, 1, seqlen)
    with pytest.raises(AespaError, match="training mode"):
        own_words(Counts(), begin, 1, 8)


def test_its_own_words_calibrate_in_a_mixture_and_do_not_measure(tmp_path):
    model, tokenizer, *_ = load_reference()
    (tmp_path / "notes.txt").write_text("A tensor is an array. " * 200)
    mixed = f"{tmp_path}/notes.txt,self"
    windows = calibration_windows(mixed, tokenizer, 4, 16, model=model)
    own = own_words(model, tokenizer, 2, 16)
    assert sum(any(torch.equal(w, o) for o in own) for w in windows.tokens) == 2
    assert "its own words" in str(windows.origin)
    for read, words in ((calibration_windows, "model=model"), (evaluation_windows, "can't measure")):
        with pytest.raises(AespaError, match=words):
            read("self", tokenizer, seqlen=16)
    talk = copy.deepcopy(tokenizer)
    talk.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    begin = torch.tensor(talk("<|user|>", add_special_tokens=False)["input_ids"])
    assert torch.equal(own_words(model, talk, 1, 16)[0, : len(begin)], begin)
    with pytest.raises(AespaError, match="raise seqlen"):
        own_words(model, talk, 1, len(begin))
    for template, words in (("{{ raise_exception('no') }}", "no question alone"), ("{{ 'hello' }}", "changes what")):
        talk.chat_template = template
        with pytest.raises(AespaError, match=words):
            own_words(model, talk, 1, 16)
    talk.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert own_words(model, talk, 1, 16)[0, 0] == tokenizer.bos_token_id
