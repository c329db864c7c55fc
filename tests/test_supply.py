"""What users install: the runtime dependencies are enough, their licences are known and open, and tools stay out.

`make audit` asks for known vulnerabilities, too, and writes the page on licences anew.
"""

import json
import re
import subprocess
import sys
from importlib.metadata import distributions, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
OPEN = re.search(r"^OPEN := (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].replace(";", "|")
BUILD = "nvidia|cuda|triton"  # what the CUDA build of torch brings on Linux
HERE = {re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower(): d for d in distributions()}

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
from aespa_nb import export_model, read_quantized
sizes = dict(vocab_size=64, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
model, tokens = LlamaForCausalLM(LlamaConfig(**sizes)), torch.randint(0, 64, (2, 8))
for preset, few in (("max", dict(end_to_end=2, tuning=2)), ("omniquant", dict(iterations=2))):
    config = aespa_nb.AespaConfig.preset(preset, 4, **few)
    report = aespa_nb.quantize_model(model, tokens, config)
export_model(model, report, sys.argv[2])
read_quantized(sys.argv[2])
there = {m.split(".")[0] for m in sys.modules} & hidden
print(json.dumps(sorted(there)))
"""


@pytest.fixture(scope="module")
def runtime():
    "The names of all that comes with the library."
    todo, seen = [Requirement("aespa_nb")], set()
    while todo:
        need = todo.pop()
        name = re.sub(r"[-_.]+", "-", need.name).lower()
        key = (name, *sorted(need.extras))
        if key in seen or re.match(BUILD, name):
            continue
        seen.add(key)
        fits = lambda r, need=need: not r.marker or any(r.marker.evaluate({"extra": e}) for e in ("", *need.extras))
        todo += filter(fits, map(Requirement, HERE[name].requires or ()))
    return {name for name, *_ in seen} - {"aespa-nb"}


def test_runtime_dependencies_are_enough(tmp_path, runtime):
    names, owners = runtime | {"aespa-nb"}, packages_distributions()
    known = lambda dist: re.sub(r"[-_.]+", "-", dist).lower() in names
    hidden = [top for top, dists in owners.items() if not any(map(known, dists))]
    others = sorted({d for dists in owners.values() for d in dists if not known(d)})
    assert {"pytest", "hypothesis", "nbdev", "jupyterlab", "fastcore", "sphinx"} & set(hidden)
    command = [sys.executable, "-c", ALONE, json.dumps([hidden, others]), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_the_page_lists_them_with_open_licences(runtime):
    page = (ROOT / "docs/licences.md").read_text()
    rows = {re.sub(r"[-_.]+", "-", n).lower(): (v, licence) for n, v, licence in
            re.findall(r"^\| *([\w.-]+) *\| *(\d\S*) *\| *([^|]+?) *\|", page, re.M)}  # fmt: skip
    assert runtime <= set(rows)
    parts = {part.strip(" ()") for _, licence in rows.values() for part in re.split(" AND | OR | WITH |[,;]", licence)}
    assert not {part for part in parts if not re.search(f"{OPEN}|LLVM-exception", part)}
    pins = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text().lower(), re.M))
    pins = {re.sub(r"[-_.]+", "-", name): version for name, version in pins.items()}
    assert {n: v.split("+")[0] for n, (v, _) in rows.items() if n in runtime} == {n: pins[n] for n in runtime}


def test_tools_stay_out_of_what_users_install(runtime):
    tools = {"nbdev", "fastcore", "jupyterlab", "pytest", "hypothesis", "ruff", "sphinx", "numba", "pip-audit"}
    assert not tools & runtime
    assert not re.search(r"pip.audit|cyclonedx|pip.licenses", (ROOT / "constraints.txt").read_text())
