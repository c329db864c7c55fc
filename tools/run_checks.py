"""Everything CI checks, in order; the first failure ends the run. `make test` calls this."""

import os
import re
import subprocess
import sys
import time

PY = sys.executable
TWO = ("-n", "2", "--dist")  # processes that share the tests: whole files, which have fixtures in common, or any
BROWSER = ("tests/test_lab.py", "tests/test_site.py")  # the longest first
STEPS = {
    "Library and README are what the notebooks say": [PY, "tools/check_sync.py"],
    "Ruff on library, notebooks and scripts": [PY, "-m", "ruff", "check", "--quiet", "."],
    "Tests": [PY, "-m", "pytest", "tests", *TWO, "loadfile", *(f"--ignore={t}" for t in BROWSER)],
    "Notebooks run and give the stored outputs": [PY, "tools/run_nbs.py", "--check"],
    "The site builds without a warning": ["make", "--no-print-directory", "docs"],
    "The site and JupyterLab in a browser": [PY, "-m", "pytest", *BROWSER, *TWO, "worksteal"],
}
ENV = dict(os.environ, PYTHONUNBUFFERED="1", HF_HUB_OFFLINE="1")


def run(command):
    "Runs a step, showing what it prints; its exit status and output."
    process = subprocess.Popen(command, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    return process.wait(), "".join(lines)


if __name__ == "__main__":
    start, total = time.time(), dict(passed=0, skipped=0)
    for i, (title, command) in enumerate(STEPS.items(), 1):
        print(f"\n=== {i}/{len(STEPS)} {title}", flush=True)
        began = time.time()
        status, text = run(command)
        print(f"--- {time.time() - began:.0f} s", flush=True)
        count = lambda pattern, text=text: sum(map(int, re.findall(pattern, text)))
        total["passed"] += count(r"\b(\d+) passed\b") + count(r"(?m)^checked: (\d+) cells")
        total["skipped"] += count(r"\b(\d+) skipped\b")
        total["passed"] += not ("pytest" in command or "--check" in command or status)
        if status:
            failed = count(r"\b(\d+) (?:failed|errors?)\b") or 1
            sys.exit(f"\nFAILED at step {i}: {title}\n\n{total['passed']} passed, {failed} failed")
    skipped = f", {total['skipped']} skipped" if total["skipped"] else ""
    minutes = (time.time() - start) / 60
    print(f"\nAll {len(STEPS)} steps passed in {minutes:.1f} minutes. Tests, cells and checks together:")
    print(f"{total['passed']} passed, 0 failed{skipped}")
