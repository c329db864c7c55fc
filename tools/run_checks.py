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
    "Numbers in prose have a source": [PY, "tools/check_numbers.py"],
    "Tests": [PY, "-m", "pytest", "tests", *TWO, "loadfile", *(f"--ignore={t}" for t in BROWSER)],
    "Notebooks run and give the stored outputs": [PY, "tools/run_nbs.py", "--check"],
    "The site builds without a warning": ["make", "--no-print-directory", "docs"],
    "The site and JupyterLab in a browser": [PY, "-m", "pytest", *BROWSER, *TWO, "worksteal", "--timeout=400"],
}
RETRIED = list(STEPS)[-1]  # a browser may hang or crash on its own: what failed is tried once more, in a new one
ENV = dict(os.environ, PYTHONUNBUFFERED="1", HF_HUB_OFFLINE="1")


def run(command):
    "Runs a step, showing what it prints; its exit status, and how many of its parts passed, failed or were skipped."
    with subprocess.Popen(command, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        text = "".join(print(line, end="", flush=True) or line for line in process.stdout)
    ends = (r"\b(\d+) (?:passed|cells in)\b", r"\b(\d+) (?:failed|errors?)\b", r"\b(\d+) skipped\b")
    return process.returncode, [sum(map(int, re.findall(end, text))) for end in ends]


if __name__ == "__main__":
    start, passed, skipped = time.time(), 0, 0
    for i, (title, command) in enumerate(STEPS.items(), 1):
        print(f"\n=== {i}/{len(STEPS)} {title}", flush=True)
        began = time.time()
        status, (ok, failed, left_out) = run(command)
        if status and title == RETRIED:
            status, (more, failed, _) = run([*command, "--last-failed"])
            ok += more
        print(f"--- {time.time() - began:.0f} s", flush=True)
        passed, skipped = passed + (ok or not status), skipped + left_out
        if status:
            sys.exit(f"\nFAILED at step {i}: {title}\n\n{passed} passed, {failed or 1} failed")
    print(f"\nAll {len(STEPS)} steps passed in {(time.time() - start) / 60:.1f} minutes; tests, cells and checks:")
    print(f"{passed} passed, 0 failed" + (f", {skipped} skipped" if skipped else ""))
