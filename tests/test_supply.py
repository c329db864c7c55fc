"""What users install: the runtime dependencies are enough, their licences are known, and tools stay out."""

import json
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import supply  # noqa: E402

ALONE = """
import importlib.metadata, json, sys
hidden, names = (set(x) for x in json.loads(sys.argv[1]))


class Hiding:
    "A finder that does not see what is hidden."

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *args):
        return None if name.split(".")[0] in hidden else self.finder.find_spec(name, *args)

    def find_distributions(self, *args):
        found = getattr(self.finder, "find_distributions", lambda *args: ())(*args)
        return (d for d in found if d.metadata["Name"] not in names)


sys.meta_path[:] = map(Hiding, sys.meta_path)
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import aespa_nb, aespa_nb.cli, aespa_nb.experiments.cost, aespa_nb.experiments.comparison
from aespa_nb.export.checkpoint import export_model, read_quantized
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
model, tokens = LlamaForCausalLM(LlamaConfig(**sizes)), torch.randint(0, 64, (4, 16))
for preset in ("best", "max", "omniquant"):
    config = aespa_nb.AespaConfig.preset(preset, 4, iterations=2)
    report = aespa_nb.quantize_model(model, tokens, config)
export_model(model, report, sys.argv[2])
read_quantized(sys.argv[2])
there = {m.split(".")[0] for m in sys.modules} & hidden
print(json.dumps(sorted(there)))
"""


def test_runtime_dependencies_are_enough(tmp_path):
    names = {supply.normal(n) for n in supply.runtime()} | {"aespa-nb"}
    owners = packages_distributions()
    hidden = [top for top, dists in owners.items() if not any(supply.normal(d) in names for d in dists)]
    others = sorted({d for dists in owners.values() for d in dists if supply.normal(d) not in names})
    assert {"pytest", "hypothesis", "nbdev", "jupyterlab", "fastcore", "sphinx"} & set(hidden)
    command = [sys.executable, "-c", ALONE, json.dumps([hidden, others]), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_licences_are_known_and_open():
    for name, (dist, _) in supply.runtime().items():
        assert supply.is_open(supply.licence(dist)), name
    assert not supply.is_open("unknown") and not supply.is_open("MIT AND GPL-3.0-only") and supply.is_open("MIT, 0BSD")


def test_the_page_lists_them():
    page, pins = supply.PAGE.read_text(), (ROOT / "constraints.txt").read_text()
    for need in supply.wanted():
        name = re.match(r"[\w-]+", need)[0]
        assert f"| {name} |" in page
    mine = supply.page()
    versions = re.findall(r"^\| ([\w.-]+) \| (\S+) \|", mine, re.M)[1:]
    if any(f"\n{name}=={version}\n" not in pins for name, version in versions):
        pytest.skip("other versions than the pinned ones are installed")
    assert mine == page


def test_tools_stay_out_of_what_users_install():
    tools = {"nbdev", "fastcore", "jupyterlab", "pytest", "hypothesis", "ruff", "sphinx", "numba", "pip-audit"}
    assert not tools & set(supply.runtime())
    assert not re.search(r"pip.audit|cyclonedx|pip.licenses", (ROOT / "constraints.txt").read_text())
