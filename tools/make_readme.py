"""README.md from nbs/index.ipynb: prose, code, outputs, and figures as files that GitHub can show.

Links to other chapters lead to the site; in the section on the ways through the book they say how long a page takes.
`--root DIR` does the same in a copy of the repository.
"""

import argparse
import itertools
import re
from pathlib import Path

import nbformat

SITE = "https://aespa-nb.github.io/aespa_nb/"
FIGURES = Path("docs/_static")  # index-1.svg and so on: the site's start page shows them too
NOTE = "<!-- Generated from nbs/index.ipynb by tools/make_readme.py: edit the notebook. -->\n\n"


WAYS = "## Two ways through the book"
WORDS, LINES = 200, 40  # that are read in a minute: of prose, and of code that is not folded


def directives(cell):
    "The `#|` lines of a code cell, and the rest."
    head = re.match(r"(?:\s*#\|.*\n?)*", cell.source)[0]
    lines = [line.strip().removeprefix("#|").strip() for line in head.splitlines() if line.strip()]
    pairs = (re.match(r"([\w-]+):?\s*(.*)", line).groups() for line in lines)
    return dict(pairs), cell.source[len(head) :].strip()


def figures_of(cell):
    "The drawings that a cell shows."
    return [o["data"]["image/svg+xml"] for o in cell.outputs if "image/svg+xml" in o.get("data", {})]


def minutes(nb):
    "How long a page takes to read, its exercises aside."
    read = list(itertools.takewhile(lambda c: not c.source.startswith("## Exercises"), nb.cells))
    words = sum(len(c.source.split()) for c in read if c.cell_type == "markdown")
    shown = [c for c in read if c.cell_type == "code" and not figures_of(c)]
    shown = [code for d, code in map(directives, shown) if not {"hide", "exporti", "default_exp"} & d.keys()]
    return max(1, round(words / WORDS + sum(bool(s.strip()) for code in shown for s in code.splitlines()) / LINES))


def say_minutes(text, nbs):
    "Adds minutes to each link to a chapter, and the sum of its line to the name of a part, which opens it in bold."
    lines, link = [], r"\[[^\]]*\]\(([\w/]+\.ipynb)\)"
    for line in text.splitlines():
        spent, unit = [minutes(nbformat.read(nbs / page, as_version=4)) for page in re.findall(link, line)], " min"
        if part := re.match(r"- \*\*.+?\*\*", line):
            line, unit = f"{part[0]}, {sum(spent)} minutes{line[part.end() :]}", ""
        lines.append(re.sub(link, lambda m: f"{m[0]} ({spent.pop(0)}{unit})", line))  # noqa: B023
    return "\n".join(lines)


def outputs(cell, alt, figures):
    "The outputs of a cell as Markdown; figures are added to the dictionary of files."
    for o in cell.outputs:
        data = o.get("data") or {"text/plain": o.text}
        kind = next(k for k in ("image/svg+xml", "text/markdown", "text/html", "text/plain") if k in data)
        if kind == "image/svg+xml":
            path = FIGURES / f"index-{len(figures) + 1}.svg"
            figures[path] = data[kind].rstrip() + "\n"
            yield f"![{alt}]({path.as_posix()})"
        else:
            yield f"```text\n{data[kind].rstrip()}\n```" if kind == "text/plain" else data[kind].strip()


def readme(nb, nbs):
    "The text of README.md and its figures, {path: svg}; `nbs`: the folder of the chapters."
    parts, figures = [], {}
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            text = say_minutes(cell.source, nbs) if cell.source.startswith(WAYS) else cell.source
            parts.append(re.sub(r"\]\((?!https?:|#)([\w./-]+)\.ipynb", rf"]({SITE}nbs/\1.html", text))
        elif cell.cell_type == "code":
            d, code = directives(cell)
            if {"hide", "default_exp"} & d.keys() or d.get("include") == "false":
                continue
            if code and d.get("echo") != "false":
                parts.append(f"```python\n{code}\n```")
            if d.get("output") != "false":
                parts += outputs(cell, d.get("fig-alt", ""), figures)
    return NOTE + "\n\n".join(p.strip() for p in parts) + "\n", figures


def main(root):
    text, figures = readme(nbformat.read(root / "nbs/index.ipynb", as_version=4), root / "nbs")
    (root / FIGURES).mkdir(parents=True, exist_ok=True)
    for old in (root / FIGURES).glob("index-*.svg"):
        old.unlink()
    for path, content in {Path("README.md"): text, **figures}.items():
        (root / path).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--root", type=Path, default=Path("."))
    main(p.parse_args().root)
