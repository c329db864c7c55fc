"""What a user of the library installs: names, versions, licences. Read from pyproject.toml and this environment.

    python tools/supply.py licences      write docs/licences.md
    python tools/supply.py check         fail if the page is not that of this environment, or a licence is not known
    python tools/supply.py pins          print the runtime packages with their versions, for pip-audit and the SBOM

`make audit` runs all that needs a network: pip-audit, and an SBOM in the CycloneDX format.
"""

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement

PAGE = Path("docs/licences.md")
OPEN = r"MIT|BSD|Apache|PSF|Python Software Foundation|ISC|MPL-2\.0|CNRI-Python|Zlib|CC0-1\.0|BSL-1\.0|LLVM-exception"
BUILD = r"nvidia|cuda|triton"  # what the CUDA build of torch brings on Linux
HEAD = """# Licences

aespa_nb is under the Apache License 2.0. Who installs it without extras installs these packages, too; the licences are
those that the packages name themselves. The page is written by `tools/supply.py` and checked by a test: a package that
is new here, or changes its licence to one that is not permissive, is noticed. On Linux the CUDA build of torch brings
Triton (MIT) and NVIDIA's libraries, which are under NVIDIA's own licences; the CPU build has neither.

| package | version | licence | needed by |
|---|---|---|---|
"""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def wanted(pyproject: Path = Path("pyproject.toml")) -> list[str]:
    "The direct dependencies."
    block = re.search(r"^dependencies = \[(.*?)^\]", pyproject.read_text(encoding="utf-8"), re.M | re.S)[1]
    return re.findall(r'"([^"]+)"', block)


def needs(dist, extras) -> list[Requirement]:
    "What a distribution requires here, with these extras."
    found = map(Requirement, dist.requires or ())
    fits = lambda r: r.marker is None or any(r.marker.evaluate({"extra": e}) for e in (*extras, ""))
    return [r for r in found if fits(r) and not re.match(BUILD, r.name)]


def runtime() -> dict:
    "Normalised name -> (distribution, the packages that need it), of all that comes with the library."
    there = {normal(d.metadata["Name"]): d for d in distributions()}
    todo, seen, found = [(Requirement(text), "aespa_nb") for text in wanted()], set(), {}
    while todo:
        need, by = todo.pop()
        name = normal(need.name)
        dist, users = found.setdefault(name, (there[name], set()))
        users.add(by)
        if (name, *sorted(need.extras)) not in seen:
            seen.add((name, *sorted(need.extras)))
            todo += [(r, dist.metadata["Name"]) for r in needs(dist, need.extras)]
    return dict(sorted(found.items()))


def licence(dist) -> str:
    "As the package names it: an SPDX expression, its classifiers, or the first line of its field."
    data = dist.metadata
    classifiers = [c.split(" :: ")[-1] for c in data.get_all("Classifier") or () if c.startswith("License ::")]
    field = (data.get("License") or "").strip().split("\n")[0].strip()
    short = field if len(field) < 40 and re.search(OPEN, field) else ""
    return data.get("License-Expression") or short or ", ".join(classifiers) or "unknown"


def is_open(text: str) -> bool:
    "Whether every licence of an expression is permissive (or, weakly copyleft, MPL-2.0)."
    parts = [part.strip(" ()") for part in re.split(r" AND | OR | WITH |, ", text)]
    return all(re.search(OPEN, part) or part == "0BSD" for part in parts)


def page() -> str:
    "The page."
    cells = lambda d, by: (d.metadata["Name"], d.version.split("+")[0], licence(d), ", ".join(sorted(by)))
    return HEAD + "".join(f"| {' | '.join(cells(*entry))} |\n" for entry in runtime().values())


def problems() -> list[str]:
    "One line for each thing that is not as it should be."
    closed = [f"{n}: the licence is {licence(d)!r}" for n, (d, _) in runtime().items() if not is_open(licence(d))]
    stale = PAGE.read_text(encoding="utf-8") != page()
    return closed + [f"{PAGE} is not of this environment: python tools/supply.py licences"] * stale


if __name__ == "__main__":
    command = (sys.argv[1:] or ["check"])[0]
    if command == "licences":
        PAGE.write_text(page(), encoding="utf-8")
    elif command == "pins":
        print("\n".join(f"{d.metadata['Name']}=={d.version.split('+')[0]}" for d, _ in runtime().values()))
    elif found := problems():
        sys.exit("\n".join(found))
