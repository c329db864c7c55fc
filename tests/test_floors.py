"""No module imports from a room above, none in a circle, no private name crosses modules, and names say where from."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from floors import ANYWHERE, FLOORS

ROOT = Path(__file__).parents[1]

FACE = {"__init__", "__main__", "_modidx"}  # these stand outside: they may import anything


def imports(tree, here):
    "(line, module, name) for each name that comes from the package, imports inside functions included."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name.split("."), None) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) - node.level] if node.level else []
            module = [*above, *(node.module or "").split(".")] if node.module else above
            yield from ((node.lineno, module, a.name) for a in node.names)


def problems(library):
    "One line for each import that is not as it should be."
    paths = {(library.name, *p.relative_to(library).with_suffix("").parts): p for p in library.rglob("*.py")}
    graph = {}
    for here, path in sorted(paths.items()):
        if here[-1] in FACE:
            continue
        if here[1] not in [*FLOORS, *ANYWHERE]:
            yield f"{path}: {here[1]} is no floor; give it a place in tools/floors.py"
            continue
        for line, module, name in imports(ast.parse(path.read_text(encoding="utf-8")), here):
            if name == "*":
                yield f"{path}:{line}: star import"
            module = (*module, name) if (*module, name) in paths else tuple(module)
            if module[0] != library.name or name == "__version__":
                continue
            if len(module) == 1 and here[1] in FLOORS[-2:]:
                continue  # the command line speaks to the library as its users do
            if module not in paths or len(module) == 1:
                yield f"{path}:{line}: imports {'.'.join(module)}, which is no module"
                continue
            graph.setdefault(here, set()).add(module)
            if (name or "").startswith("_"):
                yield f"{path}:{line}: {name} is private to {'.'.join(module)}"
            if module[1] in ANYWHERE or here[1] in ANYWHERE:
                continue
            if FLOORS.index(module[1]) > FLOORS.index(here[1]):
                yield f"{path}:{line}: {here[1]} imports {module[1]}, which stands above"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        yield "a circle: " + " <- ".join(".".join(module) for module in e.args[1])


def test_the_library_is_in_order():
    assert not list(problems(ROOT / "aespa_nb"))


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("from aespa_nb.attention.forward import f", "rounding imports attention, which stands above"),
        ("def f():\n    from ..attention import forward", "rounding imports attention, which stands above"),
        ("import aespa_nb.attention.forward", "rounding imports attention, which stands above"),
        ("from .grid import Grid", "a circle"),
        ("from .gptq import _fast", "_fast is private"),
        ("from math import *", "star import"),
        ("from aespa_nb import quantize_model", "which is no module"),
        ("import torch\nfrom .. import __version__\nfrom ..errors import AespaError\nfrom .gptq import gptq", None),
    ],
)
def test_what_is_refused(tmp_path, source, complaint):
    for name in ("rounding/gptq", "attention/forward", "errors", "__init__"):
        (tmp_path / f"aespa_nb/{name}.py").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"aespa_nb/{name}.py").write_text("")
    (tmp_path / "aespa_nb/rounding/grid.py").write_text(source + "\n")
    found = list(problems(tmp_path / "aespa_nb"))
    assert len(found) == bool(complaint) and (complaint or "") in "".join(found), found


def test_a_module_without_a_floor(tmp_path):
    (tmp_path / "aespa_nb").mkdir()
    (tmp_path / "aespa_nb/nowhere.py").write_text("")
    assert "is no floor" in next(problems(tmp_path / "aespa_nb"))
