"""The checks in tools/ fail when they should."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import check_numbers
import check_sync
import nbformat
import pytest
import run_nbs
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).parents[1]
SETTINGS = (ROOT / "settings.ini").read_text()
EXPORTED = "#| export\ndef double(x: float) -> float:\n    'Twice the number.'\n    return 2 * x"
SVG = '<svg xmlns="http://www.w3.org/2000/svg"><path d="M 1.000000 2.000000"/></svg>'


def notebook(*cells):
    nb = new_notebook(metadata={"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}})
    nb.cells = [
        new_markdown_cell(c[3:], id=f"cell{i}") if c.startswith("md ") else new_code_cell(c, id=f"cell{i}")
        for i, c in enumerate(cells)
    ]
    return nb


@pytest.fixture(scope="module")
def in_line(tmp_path_factory):
    "A repository of one chapter and a README, everything in line."
    root = tmp_path_factory.mktemp("repo")
    (root / "nbs/rounding").mkdir(parents=True)
    (root / "aespa_nb").mkdir()
    (root / "settings.ini").write_text(SETTINGS)
    (root / "aespa_nb/__init__.py").write_text('__version__ = "0.1.0"\n')
    head = ("#| default_exp rounding.grid", "md # Grid\n> What rounding does.")
    chapter = notebook(*head, EXPORTED, "assert double(2) == 4")
    index = notebook("md # aespa_nb\nSee [the grid](rounding/10_grid.ipynb).", "#| fig-alt: a line\nplot()")
    index.cells[1].outputs = [new_output("display_data", {"image/svg+xml": SVG})]
    for name, nb in (("rounding/10_grid", chapter), ("index", index)):
        nbformat.write(nb, root / f"nbs/{name}.ipynb")
    check_sync.generate(root)
    return root


@pytest.fixture
def repo(in_line, tmp_path):
    return shutil.copytree(in_line, tmp_path / "repo")


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# --- check_sync ---------------------------------------------------------------------------------------------------


def test_sync_names_each_file_that_differs_and_leaves_the_tree_alone(repo):
    "In one run, which exports everything anew."
    lines, n = check_sync.differences(repo)
    assert lines == [] and n >= 6
    text = (repo / "README.md").read_text()
    assert "![a line](docs/_static/index-1.svg)" in text
    assert "https://aespa-nb.github.io/aespa_nb/nbs/rounding/10_grid.html" in text
    assert (repo / "docs/_static/index-1.svg").read_text().startswith("<svg")

    edit(repo / "nbs/rounding/10_grid.ipynb", "return 2 * x", "return x + x")
    edit(repo / "nbs/rounding/10_grid.ipynb", '"execution_count": null', '"execution_count": 7')
    edit(repo / "nbs/index.ipynb", "See ", "Look at ")
    edit(repo / "nbs/index.ipynb", "M 1.000000", "M 3.000000")
    shutil.copy(repo / "aespa_nb/rounding/grid.py", repo / "aespa_nb/rounding/orphan.py")
    before = {p: p.read_bytes() for p in repo.rglob("*") if p.is_file()}
    lines, _ = check_sync.differences(repo)
    wrong = "aespa_nb/rounding/grid.py", "README.md", "docs/_static/index-1.svg", "nbs/rounding/10_grid.ipynb"
    for blamed in (*wrong, "aespa_nb/rounding/orphan.py: no notebook"):
        assert [line for line in lines if line.startswith(blamed)], lines
    assert before == {p: p.read_bytes() for p in repo.rglob("*") if p.is_file()}


# --- notebooks ----------------------------------------------------------------------------------------------------


def test_cells_are_whole_ideas_and_no_longer():
    "A class or function stands whole in its cell, up to about 60 lines."
    paths = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
    cells = {p.name: [len("".join(c["source"]).splitlines()) for c in json.loads(p.read_text())["cells"] if
                      c["cell_type"] == "code"] for p in paths}  # fmt: skip
    assert {name: max(lengths) for name, lengths in cells.items() if max(lengths, default=0) > 80} == {}


def test_numbers_are_unique_over_the_rooms():
    "nbdev exports in their order, and run_nbs runs in it."
    numbers = [p.name.split("_")[0] for p in (ROOT / "nbs").rglob("*.ipynb") if p.name[0].isdigit()]
    assert len(set(numbers)) == len(numbers)


def test_numbers_in_prose_without_a_source_are_found(tmp_path):
    prose = "md Of 250 tokens, 3 or 34 % are lost: .128 instead of .131, of 1,200. Since 1998; $.777$, `.888`."
    nb = notebook(prose, "tokens, share = 250, 0.337")
    nb.cells[1].outputs = [new_output("stream", text="now 0.1279, out of 1200")]
    nbformat.write(nb, tmp_path / "a.ipynb")
    assert [number for number, _ in check_numbers.unsourced(tmp_path / "a.ipynb")] == [".131"]
    assert check_numbers.explained("start/08_puzzles") == {".30", ".35"}


# --- run_nbs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("near", "old", "new", "svg", "verdict"),
    [
        ("close", "loss 1.2345", "loss 1.2345", False, "equal"),
        ("close", "loss 1.2345", "loss 1.2346", False, "close"),
        ("close", "loss 1.2345", "loss 1.2445", False, "different"),
        ("close", "loss 1.2345", "gain 1.2345", False, "different"),
        ("close", "12 rows", "13 rows", False, "different"),
        ("close", "3.1e-06", "3.2e-06", False, "close"),
        ("close", "3.1e-06", "8.2e-06", False, "different"),
        ("close", "3.1e-16", "8.2e-16", False, "close"),
        ("close", "<path d='M 1.000001'/>", "<path d='M 1.000002'/>", True, "close"),
        ("close", "<path id='m0123456789'/>", "<path id='mabcdef0123'/>", True, "close"),
        ("close", "<path d='M 1.0'/>", "<path d='M 4.0'/>", True, "different"),
        ("alike", "KL 0.286", "KL 0.275", False, "close"),  # of another processor
        ("alike", "KL 0.286", "KL 0.386", False, "different"),
        ("alike", "KL 0.286", "gain 0.286", False, "different"),
        ("alike", "2 bits", "3 bits", False, "different"),
        ("alike", "<path d='M 1.0'/>", "<path d='M 4.0 2.0'/>", True, "close"),
    ],
)
def test_outputs_are_compared_up_to_rounding(near, old, new, svg, verdict):
    assert run_nbs.same(old, new, svg, getattr(run_nbs, near)) == verdict


def with_outputs(made_by, *outputs):
    nb = notebook("print(loss)", "#| varies\nprint(text)")
    nb.metadata.arithmetic = made_by
    for cell, text in zip(nb.cells, outputs):
        cell.outputs = [new_output("stream", name="stdout", text=text)]
    return nb


def test_only_another_processor_may_have_other_outputs():
    compare, stored = run_nbs.compare, with_outputs("a", "loss 0.20", "one text")
    assert compare(stored, with_outputs("b", "loss 0.21", "other words")) == ([], 2)
    assert len(compare(stored, with_outputs("a", "loss 0.22", "other words"))[0]) == 2
    assert len(compare(stored, with_outputs("b", "gain 0.20", "one text"))[0]) == 1


def runner(folder, *args):
    command = [sys.executable, ROOT / "tools/run_nbs.py", *args]
    return subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True)


def test_notebook_runner_stores_and_checks(repo, monkeypatch):
    "In its own folder; wrong outputs and failing cells are found, `eval: false` left alone."
    path, wrong, fails = (repo / f"nbs/rounding/{name}.ipynb" for name in ("11_run", "12_wrong", "13_fails"))
    nbformat.write(notebook("1 / 8", "import os\nprint(os.path.basename(os.getcwd()))", "#| eval: false\n1 / 0"), path)
    monkeypatch.chdir(repo)
    complaints = run_nbs.one(path, check=False, flags=(), made_by="another machine")[3]
    text = path.read_text()
    assert not complaints and '"rounding\\n"' in text and set(re.findall(r'"execution_count": (\w+)', text)) == {"null"}

    shutil.copy(path, wrong)
    edit(wrong, "0.125", "0.225")
    nbformat.write(notebook("1 / 0"), fails)
    done = runner(repo, "--check", path, wrong, fails)
    assert done.returncode == 1 and "now:    0.125" in done.stdout and "ZeroDivisionError" in done.stdout
    assert re.findall(r"(ok|FAILED) +rounding/(\d+)", done.stdout) == [("ok", "11"), ("FAILED", "12"), ("FAILED", "13")]
    assert "checked: 4 cells in 3 notebooks" in done.stdout and "0.225" in wrong.read_text()


def test_chapters_end_with_three_exercises_of_rising_difficulty():
    graded = [("1", "easy"), ("2", "medium"), ("3", "hard")]
    rooms = "start/0[2-5]*.ipynb", "rounding/*.ipynb", "attention/*.ipynb", "baselines/*.ipynb"
    for path in (p for room in rooms for p in (ROOT / "nbs").glob(room) if p.stem != "15_moves"):  # an appendix
        cells = nbformat.read(path, as_version=4).cells
        found = [(m[1], m[2], c.source) for c in cells if (m := re.match(r"\*\*Exercise (\d)\*\* \((\w+)\)", c.source))]
        assert [f[:2] for f in found] == graded, path
        assert all("<summary>Answer</summary>" in source for *_, source in found), path
