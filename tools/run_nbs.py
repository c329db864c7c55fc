"""Run notebooks, each in a kernel of its own, forked from a process that has imported what most of them need.

    python tools/run_nbs.py nbs/rounding/13_gptq.ipynb   write the outputs into the notebook
    python tools/run_nbs.py --check                            run all, compare with the stored outputs, write nothing

Stored outputs come out the same on every run: seeds are the notebooks' own, everything else is pinned here but the
processor. Each notebook knows the arithmetic that its outputs were made with; where that is this machine's, a check
wants them again. Another processor adds in another order, which a rounded model amplifies; there the words must be
the same and numbers alike, figures are not compared, and neither are cells marked `#| varies`. What a command prints
of the machine itself (seconds, memory in use, a temporary folder's name) is stored, and never compared.

Cells marked `#| eval: false`, or with a flag of `tst_flags` in settings.ini that is not asked for with --flags,
are not run and keep their outputs.
"""

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import nbformat
from jupyter_client.provisioning import local_provisioner
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.process import extract_directives

# One thread, no network, no progress bars, and instruction sets that every x86-64 machine of the last ten years has.
ENV = dict(
    PYTHONHASHSEED="0", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", ATEN_CPU_CAPABILITY="avx2", MKL_CBWR="AVX2,STRICT",
    OPENBLAS_CORETYPE="Haswell", ONEDNN_MAX_CPU_ISA="AVX2", CUDA_VISIBLE_DEVICES="",
    HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1",
    MPLBACKEND="module://matplotlib_inline.backend_inline", SOURCE_DATE_EPOCH="0",
    MATPLOTLIBRC=str(Path(__file__).with_name("matplotlibrc").resolve()), COLUMNS="100",
)  # fmt: skip
# Prints twelve digits that are the same where products, factors and functions come out with the same bits.
ARITHMETIC = """
import hashlib, torch
torch.manual_seed(0)
X, digest = torch.randn(300, 700), hashlib.sha256()
H = X @ X.mT
results = [H, X.mT @ X, X[:, :64].mT @ X[:, :256], torch.linalg.cholesky(H / 700), torch.linalg.eigh(H)[0]]
for result in [*results, X.softmax(-1), X.sum(), X.sin(), X.tanh(), X.mean(-1), torch.randn(4, 4, 256, 64).mean(-2)]:
    digest.update(result.contiguous().numpy().tobytes())
print(digest.hexdigest()[:12])
"""
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(  # and what this file imports, which a forked process runs first
    "ipykernel.kernelapp matplotlib.pyplot pandas aespa_nb.quantize.model nbclient nbdev.clean nbdev.process".split()
)
WIDGET = "application/vnd.jupyter.widget-view+json"
KERNEL = ["--log-level=40", '--InlineBackend.figure_formats={"svg"}']


def arithmetic():
    "This machine's, in the environment that notebooks have."
    return subprocess.run([sys.executable, "-c", ARITHMETIC], capture_output=True, text=True, check=True).stdout.strip()


def kernel(folder, arguments):
    "What a forked process does: it becomes an IPython kernel."
    from ipykernel.kernelapp import launch_new_instance

    os.chdir(folder)
    os.setsid()  # signals to the kernel and to what it starts reach nobody else
    launch_new_instance([*arguments, f"--IPKernelApp.parent_handle={os.getppid()}"])


class Forked(FORKS.Process):
    "A kernel that looks like a process of `subprocess`, as Jupyter wants it."

    stdin = stdout = stderr = None
    wait = FORKS.Process.join

    def __init__(self, command, cwd, **options):
        super().__init__(target=kernel, args=(cwd, command[command.index("ipykernel_launcher") + 1 :]))
        self.start()
        while self.is_alive() and os.getpgid(self.pid) != self.pid:
            time.sleep(0.01)  # Jupyter asks for the group at once

    def poll(self):
        return self.exitcode

    def send_signal(self, signal):
        os.kill(self.pid, signal)


def run(path, flags=()):
    "The notebook with fresh outputs, cleaned, run in its own folder; and how many cells were run."
    cfg, nb = get_config(), nbformat.read(path, as_version=4)
    skip = set(cfg.tst_flags.split()) - set(flags)
    code, kept = [c for c in nb.cells if c.cell_type == "code"], {}
    for c in code:
        d = extract_directives(c, remove=False)
        if d.get("eval:", [""])[0].lower() == "false" or skip & d.keys():
            kept[c.id] = c.outputs
            c.metadata.setdefault("tags", []).append("skip-execution")
    resources = {"metadata": {"path": str(Path(path).parent)}}
    options = dict(kernel_name="python3", record_timing=False, extra_arguments=KERNEL, resources=resources)
    NotebookClient(nb, timeout=600, coalesce_streams=True, **options).execute()
    nb.metadata.pop("widgets", None)
    for c in code:
        if c.id in kept:
            c.metadata.tags.remove("skip-execution")
        # progress bars and sliders have random names: not stored
        c.outputs = kept.get(c.id, [o for o in c.outputs if WIDGET not in o.get("data", {})])
    allowed = {key: cfg[key].split() for key in ("allowed_metadata_keys", "allowed_cell_metadata_keys")}
    clean_nb(nb, **allowed, clean_ids=cfg.clean_ids)
    return nb, len(code) - len(kept)


# --- comparing two runs -------------------------------------------------------------------------------------------

NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
OF_THE_MACHINE = re.compile(  # a temporary folder; memory; the seconds in a table of results, between top-1 and MB
    r"(?<=/tmp/)\w+|(?<=peak memory above the model )\d+(?= MiB)|(?<=\.\d%) +\d+(?= +\d+\.\d$)", re.MULTILINE
)
SVG_ID = re.compile(r"\b[mphc][0-9a-f]{10}\b")  # matplotlib names shapes after a hash of their points


def close(a, b, svg):
    "Equal up to the last digit, a rounding error; in a figure, a tenth of a point."
    x, y, exponent = float(a), float(b), Decimal(a).as_tuple().exponent
    if exponent == 0:
        return x == y
    return abs(x - y) <= (0.1 if svg else max(1.01 * 10.0**exponent, 1e-3 * abs(x), 1e-9))


def alike(a, b, svg):
    "What another order of additions may do to a rounded model."
    return close(a, b, svg) or abs(float(a) - float(b)) <= 0.3 * abs(float(a))


def same(a, b, svg=False, near=close):
    "'equal', 'close' (the same text around numbers that are `near`) or 'different'."
    if a == b or (svg and near is alike):
        return "equal" if a == b else "close"
    if svg:
        a, b = SVG_ID.sub("id", a), SVG_ID.sub("id", b)
    framed, pairs = NUMBER.sub("0", a) == NUMBER.sub("0", b), zip(NUMBER.findall(a), NUMBER.findall(b))
    return "close" if framed and all(near(*pair, svg) for pair in pairs) else "different"


def parts(output):
    "The texts and figures in one output, by name."
    if output.output_type == "stream":
        return {output.name: OF_THE_MACHINE.sub("*", output.text)}
    return {"error": output.evalue} if output.output_type == "error" else output.data


def compare(old, new):
    "One line for each cell whose outputs are not the stored ones, and the number of outputs that are only near them."
    near = close if old.metadata.get("arithmetic") == new.metadata.arithmetic else alike
    lines, rounded = [], 0
    for i, (a, b) in enumerate(zip(old.cells, new.cells)):
        stored, now = (list(map(parts, cell.get("outputs", []))) for cell in (a, b))
        if len(stored) != len(now):
            lines.append(f"cell {i}: {len(stored)} stored outputs, {len(now)} now\n{a.source}")
            continue
        varies = near is alike and "varies" in extract_directives(a, remove=False)
        for x, y in zip(stored, now):
            kinds = {k: same(x.get(k, ""), y.get(k, ""), "svg" in k, near) for k in sorted(x.keys() | y.keys())}
            rounded += varies or "close" in kinds.values()
            for k in [k for k, kind in kinds.items() if kind == "different" and not varies]:
                shown = "the figure differs" if "svg" in k else f"stored: {x.get(k)}\nnow:    {y.get(k)}"
                lines.append(f"cell {i} ({k}): {shown}\n{a.source}")
    return lines, rounded


def one(path, check, flags, made_by):
    "Run one notebook; (path, cells run, seconds, complaints, rounded outputs)."
    start = time.time()
    try:
        nb, cells = run(path, flags)
    except CellExecutionError as e:
        return path, 0, time.time() - start, [re.sub(r"\x1b\[[0-9;]*m", "", str(e))], 0
    nb.metadata.arithmetic = made_by
    outputs = [o for c in nb.cells for o in c.get("outputs", [])]
    lines, rounded = [f"wrote to stderr: {o.text}" for o in outputs if o.get("name") == "stderr"], 0
    if check:
        differing, rounded = compare(nbformat.read(path, as_version=4), nb)
        lines += differing
    else:
        path.write_text(nbformat.writes(nb).rstrip("\n") + "\n", encoding="utf-8")
    return path, cells, time.time() - start, lines, rounded


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("paths", nargs="*", type=Path, help="notebooks (default: all of nbs/)")
    p.add_argument("--check", action="store_true", help="compare with the stored outputs, write nothing")
    p.add_argument("--flags", default="", help="also run cells with these flags, e.g. 'slow cuda'")
    p.add_argument("-j", type=int, default=2, help="notebooks at a time")
    a = p.parse_args()
    os.environ.update({k: v for k, v in ENV.items() if k != "CUDA_VISIBLE_DEVICES" or "cuda" not in a.flags.split()})
    local_provisioner.launch_kernel = Forked
    paths = a.paths or [p for p in get_config().nbs_path.rglob("[!._]*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    paths.sort(key=lambda p: (p.stem != "index", p.name))  # the numbers are unique over all rooms
    cells, bad, made_by = 0, 0, arithmetic()
    with ThreadPoolExecutor(a.j) as pool:
        for path, n, seconds, lines, rounded in pool.map(lambda p: one(p, a.check, a.flags.split(), made_by), paths):
            note, name = f", {rounded} outputs near the stored ones" if rounded else "", "/".join(path.parts[-2:])
            print(f"{'FAILED' if lines else 'ok':6}  {name:36} {n:4} cells {seconds:6.1f} s{note}", flush=True)
            for line in lines:
                print("        " + line.strip().replace("\n", "\n        "))
            cells, bad = cells + n, bad + bool(lines)
    print(f"checked: {cells} cells in {len(paths)} notebooks")
    sys.exit(bool(bad))
