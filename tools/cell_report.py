"""How long the chapters' cells are: a table, and a failure for a cell of more than 25 lines.

A cell holds one idea: about 4 lines, seldom more than 12.
"""

import argparse
import statistics
import sys
from pathlib import Path

import nbformat

LIMIT, LONG = 25, 12
COLUMNS = ("notebook", "prose", "code", "median", "longest", f"over {LONG}", "figures", "no alt")


def lines(cell):
    return len(cell.source.splitlines())


def figures(cell):
    return sum("image/svg+xml" in o.get("data", {}) for o in cell.outputs)


def row(path):
    "The table's row for a notebook, and its cells that are too long as (number, lines)."
    cells = list(enumerate(nbformat.read(path, as_version=4).cells))
    code = [(i, c) for i, c in cells if c.cell_type == "code" and c.source.strip()]
    sizes = [lines(c) for _, c in code] or [0]
    shown = [c for _, c in code if figures(c)]
    no_alt = sum("fig-alt:" not in c.source for c in shown)
    prose = sum(c.cell_type == "markdown" for _, c in cells)
    numbers = (prose, len(code), f"{statistics.median(sizes):g}", max(sizes), sum(n > LONG for n in sizes))
    return (path.stem, *numbers, sum(map(figures, shown)), no_alt), [(i, lines(c)) for i, c in code if lines(c) > LIMIT]


def main(paths):
    rows, bad = [COLUMNS], []
    for path in paths:
        r, long_cells = row(path)
        rows.append(r)
        bad += [f"{path}: cell {i} has {n} lines; {LIMIT} at most" for i, n in long_cells]
    widths = [max(len(str(r[i])) for r in rows) for i in range(len(COLUMNS))]
    for r in rows:
        print(f"{r[0]:{widths[0]}}  " + "  ".join(f"{v:>{w}}" for v, w in zip(r[1:], widths[1:])))
    print(*bad, sep="\n", end="\n" if bad else "")
    return bool(bad)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("paths", nargs="*", type=Path)
    sys.exit(main(p.parse_args().paths or sorted(Path("nbs").glob("*.ipynb"))))
