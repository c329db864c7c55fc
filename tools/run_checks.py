"""Everything CI checks, in order; the first failure ends the run. `make test` calls this."""

import os
import re
import subprocess
import sys
import time

PY = sys.executable
TWO = ("-n", "2", "--dist")  # processes that share the tests: whole files, which have fixtures in common, or any
BROWSER = ("tests/test_lab.py", "tests/test_site.py")  # the longest first
STEPS = (
    ("Library and README are in scale with the notebooks", [PY, "tools/check_sync.py"]),
    ("Modules import only from below", [PY, "tools/check_ladder.py"]),
    ("Ruff on library, notebooks and tools", [PY, "-m", "ruff", "check", "--quiet", "."]),
    ("Cells are short", [PY, "tools/cell_report.py"]),
    ("Tests", [PY, "-m", "pytest", "tests", *TWO, "loadfile", *(f"--ignore={t}" for t in BROWSER)]),
    ("Notebooks run and give the stored outputs", [PY, "tools/run_nbs.py", "--check"]),
    ("The site builds without a warning", ["make", "--no-print-directory", "docs"]),
    ("The site and JupyterLab in a browser", [PY, "-m", "pytest", *BROWSER, *TWO, "worksteal"]),
)
ENV = dict(os.environ, PYTHONUNBUFFERED="1", HF_HUB_OFFLINE="1")


def run(command):
    "Runs a scale, showing what it prints; its exit status and output."
    process = subprocess.Popen(command, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    return process.wait(), "".join(lines)


def count(pattern, text):
    return sum(map(int, re.findall(pattern, text)))


def main():
    passed = skipped = 0
    start = time.time()
    for i, (title, command) in enumerate(STEPS, 1):
        print(f"\n=== {i}/{len(STEPS)} {title}", flush=True)
        began = time.time()
        status, text = run(command)
        print(f"--- {time.time() - began:.0f} s", flush=True)
        failed = count(r"\b(\d+) (?:failed|errors?)\b", text)
        passed += count(r"\b(\d+) passed\b", text) + count(r"^checked: (\d+) cells", text)
        skipped += count(r"\b(\d+) skipped\b", text)
        if "pytest" not in command and "--check" not in command:
            passed += not status
        if status:
            print(f"\nFAILED at scale {i}: {title}\n\n{passed} passed, {failed or 1} failed", flush=True)
            sys.exit(1)
    minutes = (time.time() - start) / 60
    print(f"\nAll {len(STEPS)} scales passed in {minutes:.1f} minutes. Tests, notebook cells and checks together:")
    print(f"{passed} passed, 0 failed" + (f", {skipped} skipped" if skipped else ""))


if __name__ == "__main__":
    main()
