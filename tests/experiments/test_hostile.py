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


FRESH = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
from aespa_nb.cli import main
print([main(words) for words in json.loads(sys.argv[1])])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_in_a_process_of_its_own_with_6_gib_of_address_space(base, tmp_path):
    roots, trees = [tmp_path / "huge", tmp_path / "code"], lambda: [hostile.tree(r, r / "out") for r in roots]
    for root, change in zip(roots, ({"hidden_size": 10**9}, {"model_type": "mine"})):
        shutil.copytree(base, root)
        hostile.edit(root / "model/config.json", lambda c, change=change: c.update(change))
    hostile.own_code(roots[1], random.Random(0))
    before, words = trees(), json.dumps([hostile.words(root) for root in roots])
    done = subprocess.run([sys.executable, "-c", FRESH, words], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "[2, 2]\n" and done.stderr.count("\n") == 2, done.stderr
    assert all(line.startswith("aespa_nb: error: ") for line in done.stderr.splitlines())
    assert trees() == before
