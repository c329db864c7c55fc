"""The bundled model: loads without a network, and is what its card says."""

import json
from pathlib import Path

import aespa_nb
import pytest
import torch
from aespa_nb import evaluate_model, load_reference
from aespa_nb.data.text import calibration_windows, evaluation_windows

FOLDER = Path(aespa_nb.__file__).parent / "reference"


@pytest.fixture(scope="module")
def reference():
    return load_reference()


def test_sizes_and_shapes(reference):
    model, tokenizer, calib, heldout = reference
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) < 16e6
    assert not [f for f in FOLDER.iterdir() if f.suffix in (".pt", ".pkl", ".bin")]
    assert calib.dtype == heldout.dtype == torch.int64
    assert calib.shape[1] == heldout.shape[1] == model.config.max_position_embeddings == 256
    assert len(tokenizer) == model.config.vocab_size


def test_calibration_and_heldout_share_no_window(reference):
    runs = lambda tokens: {tuple(w.tolist()) for row in tokens for w in row.unfold(0, 32, 16)}
    assert not runs(reference.calib) & runs(reference.heldout)


def test_tokenizer_round_trip(reference):
    text = "Return a new array of given shape and type, filled with ones."
    assert reference.tokenizer.decode(reference.tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text


def test_perplexity_is_the_cards(reference):
    "On every 32nd held-out window, against the number for the whole split."
    card = json.loads((FOLDER / "training.json").read_text())
    measured = evaluate_model(reference.model, reference.heldout[::32]).perplexity
    assert measured == pytest.approx(card["heldout"]["perplexity"], rel=0.1)


def test_tokens_by_name(reference):
    a, b = (calibration_windows("reference", reference.tokenizer, 4, 128, seed=s).tokens for s in (0, 1))
    assert a.shape == b.shape == (4, 128) and not torch.equal(a, b)
    assert torch.equal(evaluation_windows("reference", reference.tokenizer, 256, 3).tokens, reference.heldout[:3])
