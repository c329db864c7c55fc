"""Kill runs at random moments and fill their disk, again and again: nothing may be lost, nothing may be wrong.

    python experiments/faults.py kills --count 300           SIGKILL, one process
    python experiments/faults.py kills --count 100 --ranks 2
    python experiments/faults.py disk --count 30             a disk that is full at each write (root: it mounts a tmpfs)

Each run quantizes a small LLaMA with `aespa_nb quantize`. A killed run goes on with --resume, is perhaps killed again,
and when it ends its files are compared with those of a run that nobody disturbed. The counts go to
nbs/runs/faults.json.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from aespa_nb.cli import main
from aespa_nb.quantize.journal import UNFINISHED
from common import make_model, resume

SETTINGS = [  # few steps, so that many runs fit into an hour; the first three can be shared by several processes
    "--preset gptq --bits 2",
    "--preset best --bits 3 --group-size 32",
    "--preset aespa --bits 4 --iterations 5 --symmetric",
    "--preset max --bits 2 --format dense",
    "--preset turboboa --bits 3",
    "--preset signround --bits 4 --iterations 4",
]


def work(words, env, log):
    os.environ.update(env)
    sys.stdout = sys.stderr = open(log, "w", buffering=1)
    sys.exit(main(words))


def ended(processes, limit=120):
    "Exit codes; None for a process that had to be stopped after `limit` seconds."
    for p in processes:
        p.join(limit)
    codes = [p.exitcode for p in processes]
    for p in processes:
        p.kill(), p.join()
    return codes


class Sandbox:
    "A small model and a text in a folder, in which runs are disturbed."

    def __init__(self, folder):
        self.folder, self.calm = Path(folder), {}
        self.tmp = self.folder / "tmp"
        self.tmp.mkdir()
        os.environ["TMPDIR"] = tempfile.tempdir = str(self.tmp)
        make_model(self.folder, 64, 96, 4)

    def start(self, setting, out, ranks=1):
        "Processes that run, or go on with, a setting; forked from this one: torch is loaded already."
        words = ["quantize", str(self.folder / "model"), "--calibration", str(self.folder / "text.txt")]
        words += f"--samples 8 --seqlen 32 --eval-samples 2 --quiet --resume {setting}".split()
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            where = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]), WORLD_SIZE=str(ranks))
        envs = [where | dict(RANK=str(i), LOCAL_RANK=str(i)) if ranks > 1 else {} for i in range(ranks)]
        given = [([*words, "--out", str(out)], env, self.folder / f"log-{i}") for i, env in enumerate(envs)]
        processes = [multiprocessing.get_context("fork").Process(target=work, args=args) for args in given]
        for p in processes:
            p.start()
        return processes

    def log(self):
        "What the first process of the last run has printed."
        return (self.folder / "log-0").read_text()

    def undisturbed(self, setting, ranks=1):
        "Digest of the files of a run that nobody disturbs, and its seconds."
        if (setting, ranks) not in self.calm:
            out, start = self.folder / "calm", time.monotonic()
            assert ended(self.start(setting, out, ranks)) == [0] * ranks, self.log()
            self.calm[setting, ranks] = digest(out), time.monotonic() - start
            shutil.rmtree(out)
        return self.calm[setting, ranks]

    def go_on(self, found, setting, out, ranks=1):
        "Lets a disturbed run end, and counts what came of it."
        codes = ended(self.start(setting, out, ranks))
        whole = codes[0] == 0 and not (out / UNFINISHED).exists()
        found["identical"] += whole and digest(out) == self.undisturbed(setting, ranks)[0]
        found["tracebacks"] += "Traceback" in self.log()
        found["outside"] += bool(self.strays(out))

    def strays(self, out):
        "Files outside the folder of the run."
        known = {"model", "text.txt", "tmp", "disk", out.name, *(p.name for p in self.folder.glob("log-*"))}
        files = [p for p in self.tmp.rglob("*") if p.is_file()]
        return files + [p for p in self.folder.iterdir() if p.name not in known]


def digest(out):
    "What two runs must have in common: all tensors and the configuration to the last bit, and the scores."
    content = hashlib.sha256()
    for path in sorted(p for p in out.rglob("*") if p.suffix == ".safetensors" or p.name == "config.json"):
        content.update(path.name.encode() + path.read_bytes())
    rows = json.loads((out / "results.json").read_text())["rows"]
    content.update(json.dumps([[r.get(k) for k in ("bits", "perplexity", "kl", "top1")] for r in rows]).encode())
    return content.hexdigest()


def finished(out):
    "Finished blocks of an unfinished run: name and content."
    return {p.name: p.read_bytes() for p in (out / UNFINISHED / "journal").glob("*.safetensors")}


def lost(before, out):
    "Has a block gone, or changed, that was finished `before`?"
    return any(finished(out).get(name) != content for name, content in before.items())


def kills(sandbox, count, ranks=1, seed=0) -> dict:
    "Kills `count` runs at random moments; what came out."
    rng, out = random.Random(seed), sandbox.folder / "out"
    found = dict(kills=0, runs=0, identical=0, lost=0, outside=0, hung=0, tracebacks=0)
    while found["kills"] < count:
        setting = rng.choice(SETTINGS if ranks == 1 else SETTINGS[:3])
        expected, seconds = sandbox.undisturbed(setting, ranks)
        for _ in range(min(rng.randint(1, 4), count - found["kills"])):
            before, processes = finished(out), sandbox.start(setting, out, ranks)
            time.sleep(rng.uniform(0, 1.1 * seconds))
            victim = rng.choice(processes)
            victim.kill()
            for p in processes:
                p is victim or p.terminate()  # as torchrun does when one of its processes is gone
            found["hung"] += None in ended(processes)
            if victim.exitcode != -signal.SIGKILL:  # it had ended: the machine has become faster
                sandbox.calm[setting, ranks] = expected, 0.7 * seconds
                break
            found["lost"] += not (out / "results.json").exists() and lost(before, out)
            found["outside"] += bool(sandbox.strays(out))
            found["kills"] += 1
        sandbox.go_on(found, setting, out, ranks)
        found["runs"] += 1
        shutil.rmtree(out, ignore_errors=True)
    return found


def disk(sandbox, count) -> dict:
    "Runs on disks of many sizes, from nothing to nearly enough; then the disk grows, and the run goes on."
    found = dict(disks=0, told=0, identical=0, lost=0, outside=0, tracebacks=0)
    mount = sandbox.folder / "disk"
    mount.mkdir()
    for i in range(count):
        setting, out = SETTINGS[i % len(SETTINGS)], mount / "out"
        need = 2600 if "max" in setting else 1400  # KiB; more than a run takes
        size = f"size={4 + need * i // count // 4 * 4}k"
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", mount], check=True)
        with contextlib.ExitStack() as stack:
            stack.callback(subprocess.run, ["umount", "-l", mount], check=True)
            [code] = ended(sandbox.start(setting, out))
            said, before = sandbox.log(), finished(out)
            if code == 0:
                continue  # it was enough
            found["disks"] += 1
            found["told"] += code == 2 and said.strip().splitlines()[-1].startswith("aespa_nb: error: ")
            found["tracebacks"] += "Traceback" in said
            subprocess.run(["mount", "-o", "remount,size=64m", mount], check=True)
            found["lost"] += lost(before, out)
            sandbox.go_on(found, setting, out)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "disk"))
    parser.add_argument("--count", type=int, default=100, help="kills, or sizes of the disk (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=1, help="processes that share a run (default: 1)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sandbox = Sandbox(folder)
        run = disk if args.what == "disk" else lambda sandbox, count: kills(sandbox, count, args.ranks)
        job = dict(kind="full disk" if args.what == "disk" else "killed", ranks=args.ranks)
        resume("faults", [job], lambda job: run(sandbox, args.count))
