"""The bridge from nbdev to Sphinx.

The pages are raw copies of nbs/, so that the download and Colab buttons hand out the real notebook. While a page is
read, its `#|` directives become the cell tags that MyST-NB knows, folded cells are labelled with what is in them, and
names in backticks link to the API reference. The start page is README.md, which is made from nbs/index.ipynb.
"""

from __future__ import annotations

import ast
import html
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

from execnb.nbio import dict2nb, nb2dict
from fastcore.docments import docments
from nbdev.config import get_config
from nbdev.process import NBProcessor
from nbdev.processors import filter_stream_, hide_line

from floors import ANYWHERE, FLOORS
from make_readme import SITE, figures_of, minutes

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "aespa_nb"

# --- before the build: the sources of the pages -------------------------------------------------------------------


def modules():
    "The modules and their chapters, {'rounding.gptq': 'rounding/13_gptq'}: lowest floor first, then in reading order."
    found = {}
    for path in LIBRARY.rglob("*.py"):
        if chapter := re.search(r"File to edit: (?:\.\./)+nbs/([\w/]+)\.ipynb", path.read_text(encoding="utf-8")):
            found[".".join(path.relative_to(LIBRARY).with_suffix("").parts)] = chapter[1]
    order = lambda m: ([*FLOORS, *ANYWHERE].index(m.split(".")[0]), found[m].rsplit("/", 1)[-1])
    return {m: found[m] for m in sorted(found, key=order)}


def lay_out_sources(app, config):
    "Copies the chapters to docs/nbs/ and writes a stub for each module to docs/api/generated/."
    pages, stubs = Path(app.srcdir) / "nbs", Path(app.srcdir) / "api/generated"
    for folder in (pages, stubs):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "nbs", pages, ignore=shutil.ignore_patterns("[._]*", "index.ipynb", "runs"))
    stubs.mkdir()
    for m in modules():
        (stubs / f"{m}.md").write_text(f"# {m}\n\n```{{eval-rst}}\n.. automodule:: aespa_nb.{m}\n```\n")


# --- while a page is read -----------------------------------------------------------------------------------------


ANSWER = "the answer as code, tested"


def first_line(text):
    return (text or "").strip().split("\n")[0]


def imports_only(statements):
    "Imports, and a call that sets the style of the figures."
    call = lambda n: isinstance(n, ast.Expr) and "style" in ast.unparse(n)
    return any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in statements) and all(
        isinstance(n, (ast.Import, ast.ImportFrom)) or call(n) for n in statements
    )


def label(cell, after=""):
    "What the bar of a folded cell says is in it; `after`: the text before the cell."
    directives, code = re.match(r"((?:\s*#\|.*\n?)*)(.*)", cell.source, flags=re.S).groups()
    statements = ast.parse(re.sub(r"^\s*[%!].*$", "", code, flags=re.M)).body
    if imports_only(statements):
        return "imports of the module" if "export" in cell.directives_ else "imports"
    if "<summary>Answer" in after:
        return ANSWER
    if figures_of(cell):
        title = re.search(r"title[(=]\s*\"([^\"{$]+)\"", code) or re.search(r"fig-alt: \"?([^,.:;]+)", directives)
        return f"plot: {title[1]}" if title else "plot"
    statements += [n for s in statements if isinstance(s, (ast.If, ast.Try)) for n in s.body]
    defined = [n for n in statements if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    if defined:
        purpose = next(filter(None, (first_line(ast.get_docstring(n)) for n in defined)), "").replace("`", "")
        return ", ".join(n.name for n in defined) + (f": {purpose}" if purpose else "")
    if any(isinstance(n, ast.Assert) or ast.unparse(n).startswith("test_") for n in statements):
        return "checks"
    targets = (t for n in statements if isinstance(n, ast.Assign) for t in n.targets)
    return ", ".join(t.id for t in targets if isinstance(t, ast.Name)) or "setup"


def tag_cell(cell, after=""):
    "`#| hide`, `#| fig-alt: text` and their like become tags and metadata of the cell; `after`: the text before it."
    d, tags, meta = cell.directives_, set(cell.metadata.get("tags", [])), {}
    false = {k.rstrip(":") for k, v in d.items() if v and v[0].lower() == "false"}
    if alt := re.search(r"^#\|\s*fig-alt:\s*(.+)$", cell.source, flags=re.M):
        meta["image"] = {"alt": alt[1].strip().strip('"')}
    shows = "" if "default_exp" in d else label(cell, after)
    cell.source = re.sub(r"\A(?:\s*#\|.*\n?)+", "", cell.source)
    if "default_exp" in d or "include" in false or not cell.source.strip():
        tags.add("remove-cell")
    if "echo" in false:
        tags.add("remove-input")
    if "output" in false:
        tags.add("remove-output")
    if "export" in d:
        tags.add("nb-export")
    if not tags & {"remove-cell", "remove-input"}:
        if {"hide", "exporti"} & d.keys():  # one click away, so that what is copied runs
            tags.add("hide-cell" if cell.outputs and not figures_of(cell) else "hide-input")
        elif shows == ANSWER:
            tags.add("hide-cell")
        elif "code-fold" not in false and (
            "code-fold:" in d or shows.startswith("imports") or (figures_of(cell) and "export" not in d)
        ):
            tags.add("hide-input")
        if tags & {"hide-cell", "hide-input"}:
            meta |= {"code_prompt_show": shows, "code_prompt_hide": shows}
    if meta:
        cell.metadata["mystnb"] = meta
    if tags:
        cell.metadata["tags"] = sorted(tags)


def symbols():
    "From the name of an exported symbol to its full name."
    scope = {}
    exec((LIBRARY / "_modidx.py").read_text(), scope)
    public = lambda name: not name.rsplit(".", 1)[-1].startswith("_")
    return {k.removeprefix(f"{m}."): k for m, names in scope["d"]["syms"].items() for k in names if public(k)}


def link_code(text, syms):
    "`quantize_model` in prose becomes a link to its reference; links out of nbs/ lead to their place on the site."
    lines, fenced = [], False
    for line in text.splitlines(True):
        if line.lstrip().startswith(("```", "~~~", "$$")):
            fenced = not fenced
        elif not fenced and not line.startswith("#"):
            line = (
                re.sub(
                    r"(?<![`\[}])`([A-Za-z_][\w.]*)(?:\(\))?`(?!`|\])",
                    lambda m: f"{{py:obj}}`{m[1]} <{syms[m[1]]}>`" if m[1] in syms else m[0],
                    line,
                )
                .replace("](../index.ipynb", "](../../index.md")
                .replace("](../../docs/", "](../../")
            )
        lines.append(line)
    return "".join(lines)


def link_cell(cell, syms):
    "Links the names in a cell of prose, or in what a cell has written in Markdown."
    if cell.cell_type == "markdown":
        cell.source = link_code(cell.source, syms)
    for data in (o["data"] for o in cell.get("outputs", ()) if "data" in o):
        if "text/markdown" in data:
            data["text/markdown"] = link_code("".join(data["text/markdown"]), syms)


def read_chapter(docname, source, way):
    "The notebook, its cells tagged and linked; under its title the minutes it takes and its place on the short way."
    nb, syms = dict2nb(json.loads(source)), symbols()
    about = [f"{minutes(nb)} minutes"]
    if docname in way:
        at = way.index(docname)
        about.append(f"page {at + 1} of {len(way)} of *the paper in two hours*")
        if at + 1 < len(way):
            about.append(f"next: [](/{way[at + 1]}.ipynb)")
    NBProcessor(nb=nb, procs=[filter_stream_, hide_line, lambda cell: link_cell(cell, syms)], process=True)
    for before, cell in pairwise([dict2nb({"cells": [{"cell_type": "markdown", "source": ""}]}).cells[0], *nb.cells]):
        if cell.cell_type == "code":
            tag_cell(cell, before.source)
    title, below = next(c for c in nb.cells if c.cell_type == "markdown"), f"{{.minutes}}\n{' · '.join(about)}"
    title.source = re.sub(r"(\A# .*\n\s*(?:>.*\n?)*)", rf"\1\n\n{below}\n\n", title.source, count=1)
    return json.dumps(nb2dict(nb))


def module_table():
    "A table of the modules: name, promise, chapter."
    rows = ["| module | what it does | chapter |", "|---|---|---|"]
    for m, chapter in modules().items():
        text = (LIBRARY / f"{m.replace('.', '/')}.py").read_text(encoding="utf-8")
        promise = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].replace("\n", " ")
        rows.append(f"| [{m}](generated/{m}.md) | {promise} | [](../nbs/{chapter}.ipynb) |")
    toctree = "\n".join(["```{toctree}", ":hidden:", *(f"generated/{m}" for m in modules()), "```"])
    return "\n".join(rows) + "\n\n" + toctree


def start_page():
    "README.md with its links to the site and its figures turned into local ones."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(re.escape(SITE) + r"nbs/([\w/]+)\.html", r"nbs/\1.ipynb", text)
    text = re.sub(re.escape(SITE) + r"(\w+)\.html", r"\1.md", text)
    return text.replace("](docs/_static/", "](_static/")


def read(app, docname, source):
    if docname.startswith("nbs/"):
        source[0] = read_chapter(docname, source[0], short_way(app.srcdir))
    elif docname == "index":
        source[0] = source[0].replace("{{ README }}", start_page())
    elif docname == "api/index":
        source[0] = source[0].replace("{{ modules }}", module_table())


# --- two ways through the book ------------------------------------------------------------------------------------


def short_way(srcdir):
    "The pages of the first table of contents on the start page."
    return re.findall(r"^nbs/\S+", (Path(srcdir) / "index.md").read_text(encoding="utf-8").split("```")[1], flags=re.M)


def follow_the_ladder(app, env):
    "A page of the short way stands twice in the side bar: its neighbours are those of its second place, on the ladder."
    pages = env.toctree_includes["index"]
    env.toctree_includes["index"] = list(dict.fromkeys(reversed(pages)))[::-1]


# --- docstrings ---------------------------------------------------------------------------------------------------


def to_rst(text):
    "Our docstrings are Markdown: `code`, $math$, and no other markup."
    out = []
    for part in re.split(r"(`[^`]+`|\$[^$\n]+\$)", text):
        if part[:1] == "`":
            out.append(f"``{part[1:-1]}``\\ ")  # an escaped space ends it, even within a word, and is not shown
        elif part[:1] == "$" and len(part) > 1:
            out.append(f":math:`{part[1:-1]}`")
        else:
            out.append(re.sub(r"([*|]|\b_|_\b)", r"\\\1", part))
    return "".join(out)


def document(app, what, name, obj, options, lines):
    "Markdown to reStructuredText, and the comments beside the parameters to a list of fields."
    lines[:] = to_rst("\n".join(lines)).split("\n")
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


def drop_unread_sources(app):
    "Takes modules whose source viewcode could not read out of its index: they have no page."
    sources = getattr(app.env, "_viewcode_modules", {})
    for name in [name for name, entry in sources.items() if not entry]:
        del sources[name]
    return []


# --- after the build ----------------------------------------------------------------------------------------------


def card(path):
    "What a link to the site looks like elsewhere: its name, and what is left of round-to-nearest's error."
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    from aespa_nb.plots import COLOURS, use_style

    use_style()
    rows = json.loads((ROOT / "nbs/runs/demo.json").read_text(encoding="utf-8"))["rows"]
    kl = {r["method"]: r["kl"] for r in rows if r["bits"] == 2}
    fig, ax = plt.subplots(figsize=(12, 6.3), dpi=100)
    fig.subplots_adjust(left=0.13, right=0.92, bottom=0.08, top=0.62)
    ax.barh(list(kl), list(kl.values()), color=[COLOURS[name == "best"] for name in kl])
    for i, value in enumerate(kl.values()):
        ax.text(value, i, f" {value:.2f}", va="center", fontsize=18)
    ax.invert_yaxis()
    ax.tick_params(labelsize=20, length=0)
    ax.set(xticks=[])
    ax.grid(False)
    ax.spines[:].set_visible(False)
    fig.text(0.05, 0.86, "aespa_nb", fontsize=44, weight="bold")
    fig.text(0.05, 0.74, "Attention-aware quantization of Transformers, step by step", fontsize=24)
    fig.text(0.05, 0.66, "KL to the full model at 2 bits per weight", fontsize=18, color="0.4")
    with plt.rc_context({"savefig.bbox": None}):
        fig.savefig(path)
    plt.close(fig)


def finish(app, exception):
    "Takes the theme's script of icons off the pages (custom.css draws those in use), and says what a link shows."
    if exception or app.builder.name != "html":
        return
    out, cfg = Path(app.outdir), get_config(path=ROOT)
    card(out / "_static/card.png")
    shown = {"title": cfg.title, "description": cfg.description, "image": f"{app.config.html_baseurl}_static/card.png"}
    tags = "".join(f'<meta property="og:{k}" content="{html.escape(v)}">' for k, v in shown.items())
    tags += '<meta name="twitter:card" content="summary_large_image">'
    for page in out.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        text = re.sub(r"<script[^>]*/fontawesome\.js[^>]*></script>", "", text)
        text = re.sub(r"<link[^>]*/fontawesome\.js[^>]*>", "", text)
        page.write_text(text.replace("</head>", tags + "</head>", 1), encoding="utf-8")
    for path in (out / "_static/scripts").glob("fontawesome*"):
        path.unlink()


def setup(app):
    get_config(path=ROOT)
    app.connect("build-finished", finish)
    app.connect("config-inited", lay_out_sources, priority=100)
    app.connect("source-read", read)
    app.connect("html-collect-pages", drop_unread_sources, priority=100)
    app.connect("env-updated", follow_the_ladder)
    app.connect("autodoc-process-docstring", document, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
