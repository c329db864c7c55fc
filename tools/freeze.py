"""Write constraints.txt: the versions in this environment, which are those that CI uses."""

import re
from importlib.metadata import distributions
from pathlib import Path

SKIP = {"aespa-nb", "pip"}
HEAD = "# The exact set that CI uses, for Python 3.11 and newer. Written by tools/freeze.py: make constraints\n"


def pin(dist):
    "Its normalised name, to sort by, and its line. 2.13.0+cpu is any build of 2.13.0."
    name, version = dist.metadata["Name"], dist.version.split("+")[0]
    return re.sub(r"[-_.]+", "-", name).lower(), f"{name}=={version}\n"


if __name__ == "__main__":
    pins = dict(sorted(map(pin, distributions())))
    Path("constraints.txt").write_text(HEAD + "".join(line for name, line in pins.items() if name not in SKIP))
