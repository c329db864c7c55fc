"""A slice of experiments/hostile.py, and arguments that hypothesis makes up.

AESPA_NB_HOSTILE=20 multiplies the cases by twenty.
"""

import json
import os
import random
import shutil
import string
import subprocess
import sys

import hostile
import pytest
from aespa_nb.model.checkpoint import load_checkpoint as load_model
from aespa_nb.errors import AespaError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MORE = int(os.environ.get("AESPA_NB_HOSTILE", "1"))
SLOW = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "Good folders, to be damaged."
    folder = tmp_path_factory.mktemp("base")
    hostile.make_base(folder)
    return folder


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", hostile.KINDS)
def test_one_line_and_nothing_else(base, kind):
    for seed in range(100, 100 + MORE):
        row = hostile.one(base, kind, seed)
        assert row["verdict"] not in hostile.BAD, row


MUST = {  # what can never work, and what is said
    "config.json is damaged": lambda r: hostile.put(r / hostile.CONFIG, b"\x8f\xe0"),
    "a shard is damaged": lambda r: hostile.put(r / hostile.WEIGHTS, b"\xff" * 99),
    "names no files of this folder": lambda r: hostile.edit(
        r / hostile.INDEX, lambda i: i["weight_map"].update({"lm_head.weight": "../../../etc/passwd"})),
    "model.safetensors.index.json": lambda r: hostile.put(r / hostile.INDEX, "{}"),
}  # fmt: skip


@pytest.mark.parametrize("said", MUST)
def test_what_is_said(base, tmp_path, said):
    root = tmp_path / "x"
    shutil.copytree(base, root)
    MUST[said](root)
    code, text = hostile.call(hostile.words(root, model="sharded" if "files" in said or "index" in said else "model"))
    assert code == 2 and said in text, text


WORDS = st.one_of(
    st.sampled_from([*hostile.NUMBERS, "--keep", "--format", "--preset", "--symmetric", "--quiet", "--device"]),
    st.sampled_from(hostile.VALUES),
    st.integers().map(str),
    st.floats().map(str),
    st.text(string.printable, max_size=12),
)


@settings(max_examples=25 * MORE, **SLOW)
@given(words=st.lists(WORDS, max_size=5))
def test_arguments_of_any_kind(base, tmp_path, words):
    words = [w for w in words if w not in ("-h", "--help")]
    code, text = hostile.call(["quantize", str(tmp_path / "nowhere"), *words, "--out", str(tmp_path / "out")], 30)
    assert code in (2, "usage"), (code, text)
    assert code == "usage" or (text.startswith("aespa_nb: error: ") and text.count("\n") == 1)
    assert not list(tmp_path.iterdir())


CONFIG = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=20 * MORE, **SLOW)
@given(data=st.data())
def test_configurations_of_any_kind(base, tmp_path, data):
    source, folder = base / "model", tmp_path / "model"
    folder.mkdir(exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    names = st.sampled_from([*sorted(config), "quantization_config", "head_dim", "rope_scaling", "auto_map"])
    config |= data.draw(st.dictionaries(names, CONFIG, min_size=1, max_size=2))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    try:
        load_model(str(folder))
    except AespaError as e:
        assert "could not be loaded" in str(e)


def fresh(words, cwd):
    "The command line in a process of its own, with 6 GiB of address space."
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))\n"
    code += "from aespa_nb.cli import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=cwd)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
@pytest.mark.parametrize("change", [{"hidden_size": 10**9}, {"auto_map": {}}])
def test_in_a_process_of_its_own(base, tmp_path, change):
    shutil.copytree(base, tmp_path / "x")
    root = tmp_path / "x"
    if "auto_map" in change:
        hostile.own_code(root, random.Random(0))
        change = {"model_type": "mine"}
    hostile.edit(root / "model/config.json", lambda c: c.update(change))
    before = hostile.tree(root, root / "out")
    done = fresh(hostile.words(root), root)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("aespa_nb: error: ") and hostile.tree(root, root / "out") == before
