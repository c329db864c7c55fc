"""The bridge from nbdev to Sphinx.

The pages are raw copies of nbs/, so that the download and Colab buttons hand out the real notebook. While a page is
read, its `#|` directives become the cell tags that MyST-NB knows, and names in backticks link to the API reference.
The start page is README.md, which is made from nbs/index.ipynb.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path

from execnb.nbio import dict2nb, nb2dict
from fastcore.docments import docments
from nbdev.config import get_config
from nbdev.process import NBProcessor
from nbdev.processors import filter_stream_, hide_line

from check_ladder import LADDER
from make_readme import SITE

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "aespa_nb"

# --- before the build: the sources of the pages -------------------------------------------------------------------


def modules():
    "The library's modules that exist, lowest rung first; those of a package in the order of their names."
    inside = lambda rung: sorted(f"{rung}.{p.stem}" for p in (LIBRARY / rung).glob("[a-z]*.py"))
    return [m for rung in LADDER for m in (inside(rung) or [rung]) if (LIBRARY / f"{m.replace('.', '/')}.py").exists()]


def lay_out_sources(app, config):
    "Copies the chapters to docs/nbs/ and writes a stub for each module to docs/api/generated/."
    pages, stubs = Path(app.srcdir) / "nbs", Path(app.srcdir) / "api/generated"
    for folder in (pages, stubs):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "nbs", pages, ignore=shutil.ignore_patterns("[._]*", "index.ipynb"))
    stubs.mkdir()
    for m in modules():
        (stubs / f"{m}.md").write_text(f"# {m}\n\n```{{eval-rst}}\n.. automodule:: aespa_nb.{m}\n```\n")


# --- while a page is read -----------------------------------------------------------------------------------------

FOLDED = {"hide", "exporti"}  # setup and internal helpers: one click away, so that what is copied runs


def tag_cells(cell):
    "`#| hide`, `#| fig-alt: text` and their like become tags and metadata of the cell."
    if cell.cell_type != "code":
        return
    d, tags, meta = cell.directives_, set(cell.metadata.get("tags", [])), cell.metadata
    false = {k.rstrip(":") for k, v in d.items() if v and v[0].lower() == "false"}
    if "default_exp" in d or "include" in false:
        tags.add("remove-cell")
    if FOLDED & d.keys():
        tags.add("hide-cell" if cell.outputs else "hide-input")
    if "echo" in false:
        tags.add("remove-input")
    if "output" in false:
        tags.add("remove-output")
    if "code-fold:" in d:
        tags.add("hide-input")
    if "export" in d:
        tags.add("nb-export")
    if alt := re.search(r"^#\|\s*fig-alt:\s*(.+)$", cell.source, flags=re.M):
        meta["mystnb"] = {"image": {"alt": alt[1].strip().strip('"')}}
    cell.source = re.sub(r"\A(?:\s*#\|.*\n?)+", "", cell.source)
    if not cell.source.strip():
        tags.add("remove-cell")
    if tags:
        meta["tags"] = sorted(tags)


def symbols():
    "From the name of an exported symbol to its full name."
    index = LIBRARY / "_modidx.py"
    scope = {}
    if index.exists():
        exec(index.read_text(), scope)
    syms = scope.get("d", {}).get("syms", {})
    public = lambda name: not name.rsplit(".", 1)[-1].startswith("_")
    return {k.removeprefix(f"{m}."): k for m, names in syms.items() for k in names if public(k)}


def link_code(text, syms):
    "`quantize_model` in prose becomes a link to its reference."
    lines, fenced = [], False
    for line in text.splitlines(True):
        if line.lstrip().startswith(("```", "~~~", "$$")):
            fenced = not fenced
        elif not fenced and not line.startswith("#"):
            line = re.sub(
                r"(?<![`\[}])`([A-Za-z_][\w.]*)(?:\(\))?`(?!`|\])",
                lambda m: f"{{py:obj}}`{m[1]} <{syms[m[1]]}>`" if m[1] in syms else m[0],
                line,
            ).replace("](index.ipynb", "](../index.md").replace("](../docs/", "](../")
        lines.append(line)
    return "".join(lines)


def link_cell(cell, syms):
    "Links the names in a cell of prose, or in what a cell has written in Markdown."
    if cell.cell_type == "markdown":
        cell.source = link_code(cell.source, syms)
    for data in (o["data"] for o in cell.get("outputs", ()) if "data" in o):
        if "text/markdown" in data:
            data["text/markdown"] = link_code("".join(data["text/markdown"]), syms)


def module_table():
    "A table of the modules: name, promise, chapter."
    rows = ["| module | what it does | chapter |", "|---|---|---|"]
    for m in modules():
        text = (LIBRARY / f"{m.replace('.', '/')}.py").read_text(encoding="utf-8")
        promise = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].replace("\n", " ")
        chapter = re.search(r"File to edit: (?:\.\./)+nbs/(\w+)\.ipynb", text)
        chapter = f"[{chapter[1]}](../nbs/{chapter[1]}.ipynb)" if chapter else ""
        rows.append(f"| [{m}](generated/{m}.md) | {promise} | {chapter} |")
    toctree = "\n".join(["```{toctree}", ":hidden:", *(f"generated/{m}" for m in modules()), "```"])
    return "\n".join(rows) + "\n\n" + toctree


def start_page():
    "README.md with its links to the site and its figures turned into local ones."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(re.escape(SITE) + r"(\w+)\.html", r"nbs/\1.ipynb", text)
    return text.replace("](docs/_static/", "](_static/")


def entry(line, pages):
    "A line `nbs/04_gptq` of the table of contents with its number and title, or nothing if it is not written yet."
    page = pages / f"{line[1]}.ipynb"
    if not page.exists():
        return ""
    number = re.match(r"nbs/0?([0-3]?\d[a-z]?)_", line[1])
    title = re.search(r'"# (.+?)(?:\\n)?"', page.read_text(encoding="utf-8"))[1]
    return f"{number[1]} {title} <{line[1]}>\n" if number else line[0]


def read(app, docname, source):
    if docname.startswith("nbs/"):
        nb, syms = dict2nb(json.loads(source[0])), symbols()
        procs = [filter_stream_, hide_line, tag_cells, lambda cell: link_cell(cell, syms)]
        NBProcessor(nb=nb, procs=procs, process=True)
        source[0] = json.dumps(nb2dict(nb))
    elif docname == "index":
        contents = re.sub(r"^(nbs/\w+)\n", lambda line: entry(line, Path(app.srcdir)), source[0], flags=re.M)
        source[0] = contents.replace("{{ README }}", start_page())
    elif docname == "api/index":
        source[0] = source[0].replace("{{ modules }}", module_table())


# --- docstrings ---------------------------------------------------------------------------------------------------


def to_rst(text):
    "Our docstrings are Markdown: `code`, $math$, and no other markup."
    out = []
    for part in re.split(r"(`[^`]+`|\$[^$\n]+\$)", text):
        if part[:1] == "`":
            out.append(f"``{part[1:-1]}``")
        elif part[:1] == "$" and len(part) > 1:
            out.append(f":math:`{part[1:-1]}`")
        else:
            out.append(re.sub(r"([*|]|\b_|_\b)", r"\\\1", part))
    return "".join(out)


def document(app, what, name, obj, options, lines):
    "Markdown to reStructuredText, and the comments beside the parameters to a list of fields."
    lines[:] = [to_rst(line) for line in lines]
    if what not in ("function", "method", "class"):
        return
    try:
        about = docments(obj, full=True, returns=True)
    except Exception:  # fastcore cannot read the source of generated methods
        return
    fields = []
    for k, v in about.items():
        if v.docment:
            fields.append(f":{'returns' if k == 'return' else f'param {k}'}: {to_rst(' '.join(v.docment.split()))}")
    if fields:
        lines.extend(["", *fields, ""])


def setup(app):
    get_config(path=ROOT)
    app.connect("config-inited", lay_out_sources, priority=100)
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", document, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
