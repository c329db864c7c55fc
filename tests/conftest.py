"""What every test stands on: the repository as current folder, one thread, no network for the hub."""

import contextlib
import functools
import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = "chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"  # the lightest first
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the tests' tensors are small
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line beside other work
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # before the first product, as the command line does
os.environ.setdefault("MPLBACKEND", "agg")


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def task():
    "Makes tasks of rounding a block (`blocks.new_task`); what they hold is freed in the end."
    from blocks import new_task

    with contextlib.ExitStack() as stack:
        yield functools.partial(new_task, stack)


@pytest.fixture(scope="session")
def one_block(tmp_path_factory):
    "A folder with the first block of the bundled model: trained weights for the command line, in a sixth of the time."
    from aespa_nb import load_reference

    folder, (model, tokenizer, *_) = tmp_path_factory.mktemp("one_block"), load_reference()
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def browser():
    "One headless Chromium for the site and for JupyterLab; no Chromium, no test."
    if not CHROMIUM:
        pytest.skip("no Chromium found (Debian: apt-get install chromium-headless-shell)")
    from playwright.sync_api import sync_playwright

    args = ["--no-sandbox", "--disable-gpu", "--no-first-run"]
    args += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=args)
        yield chromium
        chromium.close()
