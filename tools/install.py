"""Make .venv and install aespa_nb in it: `python3 tools/install.py [dev,docs]`. Called by the Makefile.

Only torch needs care: its default build for Linux brings gigabytes of CUDA. So, in this order:
a torch that is already there is kept; where pip is told of a local wheel, that is taken; a machine with an
NVIDIA GPU, or not Linux, gets the default build; else the CPU build is fetched from PyTorch's own index.
"""

import argparse
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
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def python():
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def pip(*args, check=True):
    command = [str(python()), "-m", "pip", "install", "--disable-pip-version-check", *map(str, args)]
    return subprocess.run(command, check=check, cwd=ROOT).returncode == 0


def torch_version():
    "The version of the torch that the environment sees, or an empty text."
    code = "from importlib.metadata import version; print(version('torch'))"
    return subprocess.run([str(python()), "-c", code], capture_output=True, text=True).stdout.strip()


def install_torch(wanted):
    "`wanted` is the pin, torch==x.y.z."
    if pip("--no-index", "--no-deps", "--quiet", wanted, check=False):  # a wheel in a folder that pip is told of
        return
    smi = shutil.which("nvidia-smi")
    gpu = smi and subprocess.run([smi, "-L"], capture_output=True).returncode == 0
    if sys.platform == "linux" and not gpu:
        try:  # pip would try for minutes
            urllib.request.urlopen(urllib.request.Request(CPU_INDEX + "/torch/", method="HEAD"), timeout=5)
            if pip("--no-deps", "--index-url", CPU_INDEX, wanted, check=False):
                return
        except OSError:
            pass
    pip(wanted)


if __name__ == "__main__":
    if sys.version_info < (3, 10):  # noqa: UP036 - run by whatever python3 is
        sys.exit(f"aespa_nb needs Python 3.10 or newer; this is {sys.version.split()[0]}. Try: make PYTHON=python3.11")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extras", nargs="?", default="", help="of pyproject.toml, with commas")
    parser.add_argument("--venv", type=Path, default=VENV, help="the environment (default: %(default)s)")
    args = parser.parse_args()
    VENV = args.venv.resolve()
    if not python().exists():
        print(f"Making {VENV}", flush=True)
        shared = importlib.util.find_spec("torch") is not None  # let it see this Python's torch
        venv.create(VENV, with_pip=True, system_site_packages=shared)
    pins = (ROOT / "constraints.txt").read_text()
    torch_pin = re.search(r"^torch==\S+", pins, flags=re.M)[0]
    if not torch_version():
        print(f"Installing {torch_pin}", flush=True)
        install_torch(torch_pin)
    if torch_version().split("+")[0] != torch_pin[len("torch==") :]:
        print(f"Keeping torch {torch_version()}, which is here already; the tests are made for {torch_pin}", flush=True)
        pins = pins.replace(torch_pin, "")
    if sys.version_info < (3, 11):  # some of the pinned versions do not exist; pip chooses within pyproject.toml
        pins = ""
    with tempfile.TemporaryDirectory() as tmp:
        (constraints := Path(tmp) / "constraints.txt").write_text(pins)
        pip("-c", constraints, "-e", f".[{args.extras}]" if args.extras else ".")
