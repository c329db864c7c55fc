"""Make .venv and install aespa_nb in it: `python3 tools/install.py [dev,docs]`. Called by the Makefile.

Only torch needs care: its default build for Linux brings gigabytes of CUDA. So, in this order:
a torch that is already there is kept; where pip is told of a local wheel, that is taken; a machine with an
NVIDIA GPU, or not Linux, gets the default build; else the CPU build is fetched from PyTorch's own index.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
CONSTRAINTS = ROOT / "constraints.txt"
PINNED_FROM = (3, 11)  # on Python 3.10 some of the pinned versions do not exist; pip then chooses within pyproject.toml
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def pip(*args, check=True):
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", *map(str, args)]
    return subprocess.run(command, check=check, cwd=ROOT).returncode == 0


def torch_version():
    "The version of the torch that .venv sees, or None."
    code = "from importlib.metadata import version; print(version('torch'))"
    out = subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True)
    return out.stdout.strip() if out.returncode == 0 else None


def has_gpu():
    smi = shutil.which("nvidia-smi")
    return bool(smi) and subprocess.run([smi, "-L"], capture_output=True).returncode == 0


def reachable(url):
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5)
    except OSError:
        return False
    return True


def install_torch(wanted):
    "`wanted` is the pin, torch==x.y.z."
    if pip("--no-index", "--no-deps", "--quiet", wanted, check=False):  # a wheel in a folder that pip is told of
        return
    if sys.platform == "linux" and not has_gpu() and reachable(CPU_INDEX + "/torch/"):
        if pip("--no-deps", "--index-url", CPU_INDEX, wanted, check=False):
            return
    pip(wanted)


def main(extras):
    if sys.version_info < (3, 10):  # noqa: UP036 - run by whatever python3 is
        sys.exit(f"aespa_nb needs Python 3.10 or newer; this is {sys.version.split()[0]}. Try: make PYTHON=python3.11")
    if not PYTHON.exists():
        print(f"Making {VENV}", flush=True)
        shared = importlib.util.find_spec("torch") is not None  # let .venv see this Python's torch
        venv.create(VENV, with_pip=True, system_site_packages=shared)
    pins = CONSTRAINTS.read_text()
    torch_pin = re.search(r"^torch==\S+", pins, flags=re.M)[0]
    if torch_version() is None:
        print(f"Installing {torch_pin}", flush=True)
        install_torch(torch_pin)
    if torch_version().split("+")[0] != torch_pin[len("torch==") :]:
        print(f"Keeping torch {torch_version()}, which is here already; the tests are made for {torch_pin}", flush=True)
        pins = pins.replace(torch_pin, "")
    if sys.version_info < PINNED_FROM:
        pins = ""
    with tempfile.TemporaryDirectory() as tmp:
        constraints = Path(tmp) / "constraints.txt"
        constraints.write_text(pins)
        pip("-c", constraints, "-e", f".[{extras}]" if extras else ".")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
