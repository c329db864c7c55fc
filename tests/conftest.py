"""What every test stands on: the repository as current folder, one thread, no network for the hub."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the tests' tensors are small
os.environ.setdefault("MPLBACKEND", "agg")


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)
