"""A module imports only modules below it on the ladder, so nothing is used before its chapter has explained it.

Read from the syntax trees, imports inside functions included. Star imports are refused: they hide where a name is from.
"""

import ast
import sys
from pathlib import Path

# Lowest rung first. A new chapter puts its module at its place here. The modules of a package share its rung.
LADDER = (
    "notation grid hessian gridfit gptq adaround descent zfold attention relax precompute gaussnewton target measured "
    "distributed capture loading families losses data evaluate tasks tune journal baselines aespa bits export "
    "comparison bench plan plots cli"
).split()
LIBRARY = Path("aespa_nb")
FACE = {"__init__", "__main__"}  # these two stand outside: they may import anything, and no module imports them


def imported(tree, package, inside=""):
    "Pairs (line, module or package within `package` that is imported); `inside`: the package that holds the importer."
    here = [package, *filter(None, inside.split("."))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) + 1 - node.level] if node.level else []
            names = [".".join(filter(None, [*above, node.module, a.name])) for a in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == package and not name.endswith(".__version__"):
                yield node.lineno, (name.split(".") + ["__init__"])[1]


def problems(library=LIBRARY, ladder=LADDER):
    "One line for each import that breaks the ladder."
    for path in sorted(library.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        inside = ".".join(path.relative_to(library).parts[:-1])
        name = inside.split(".")[0] or path.stem
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names):
                yield f"{path}:{node.lineno}: star import from {node.module}"
        if path.stem in FACE or name == "_modidx":
            continue
        if name not in ladder:
            yield f"{path}: not on the ladder; give it a place in tools/check_ladder.py"
            continue
        for line, other in dict.fromkeys(imported(tree, library.name, inside)):
            if other not in ladder:
                yield f"{path}:{line}: imports {library.name}.{other}, which is not on the ladder"
            elif ladder.index(other) >= ladder.index(name):
                yield f"{path}:{line}: {name} imports {other}, which stands above it"


if __name__ == "__main__":
    bad = list(problems())
    print(*bad, sep="\n", end="\n" if bad else "")
    print(f"checked: {len(list(LIBRARY.rglob('*.py')))} modules")
    sys.exit(bool(bad))
