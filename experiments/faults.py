"""Kill runs at random moments and fill their disk, again and again: nothing may be lost, nothing may be wrong.

    python experiments/faults.py kills --count 300           SIGKILL, one process
    python experiments/faults.py kills --count 100 --ranks 2
    python experiments/faults.py disk --count 30             a disk that is full at each write (root: it mounts a tmpfs)

Each run quantizes a small LLaMA with `aespa_nb quantize`. A killed run goes on with --resume, is perhaps killed again,
and when it ends its files are compared with those of a run that nobody disturbed. The counts go to
nbs/runs/faults.json.
"""

import argparse
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

SETTINGS = [  # few steps, so that many runs fit into an hour; the first two can be shared by several processes
    "--preset best --bits 3 --group-size 32",
    "--preset aespa --bits 4 --iterations 5 --symmetric",
    "--preset max --bits 2 --format dense",
    "--preset turboboa --bits 3",
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
    "A small model and a text in a folder, in which runs are disturbed; each run writes into `out`."

    def __init__(self, folder):
        self.folder, self.calm = Path(folder), {}
        self.disk, self.tmp, self.logs = (self.folder / name for name in ("disk", "tmp", "logs"))
        for path in (self.disk, self.tmp, self.logs):
            path.mkdir()
        self.out = self.disk / "out"
        os.environ["TMPDIR"] = tempfile.tempdir = str(self.tmp)
        make_model(self.folder, 64, 96, 4)
        self.known = set(self.folder.iterdir())

    def start(self, setting, ranks=1):
        "Processes that run, or go on with, a setting; forked from this one: torch is loaded already."
        words = ["quantize", str(self.folder / "model"), "--calibration", str(self.folder / "text.txt")]
        words += f"--samples 8 --seqlen 32 --eval-samples 2 --quiet --resume {setting} --out".split() + [str(self.out)]
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            where = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]), WORLD_SIZE=str(ranks))
        envs = [where | dict(RANK=str(i), LOCAL_RANK=str(i)) if ranks > 1 else {} for i in range(ranks)]
        fork = multiprocessing.get_context("fork")
        processes = [fork.Process(target=work, args=(words, e, self.logs / str(i))) for i, e in enumerate(envs)]
        for p in processes:
            p.start()
        return processes

    def log(self):
        "What the first process of the last run has printed."
        return (self.logs / "0").read_text()

    def undisturbed(self, setting, ranks=1):
        "Digest of the files of a run that nobody disturbs, and its seconds; the first call needs `out` to be free."
        if (setting, ranks) not in self.calm:
            start = time.monotonic()
            assert ended(self.start(setting, ranks)) == [0] * ranks, self.log()
            self.calm[setting, ranks] = digest(self.out), time.monotonic() - start
            shutil.rmtree(self.out)
        return self.calm[setting, ranks]

    def finished(self):
        "Finished blocks of an unfinished run: name and content."
        return {p.name: p.read_bytes() for p in (self.out / UNFINISHED / "journal").glob("*.safetensors")}

    def lost(self, before):
        "Has a block gone, or changed, that was finished `before`?"
        return not before.items() <= self.finished().items()

    def go_on(self, found, setting, ranks=1):
        "Lets a disturbed run end, and counts what came of it."
        codes = ended(self.start(setting, ranks))
        whole = codes[0] == 0 and not (self.out / UNFINISHED).exists()
        found["identical"] += whole and digest(self.out) == self.undisturbed(setting, ranks)[0]
        found["tracebacks"] += "Traceback" in self.log()
        there = {*self.folder.iterdir(), *self.disk.iterdir(), *filter(Path.is_file, self.tmp.rglob("*"))}
        found["outside"] += bool(there - {*self.known, self.out})


def digest(out):
    "What two runs must have in common: all tensors and the configuration to the last bit, and the scores."
    content = hashlib.sha256()
    for path in sorted([*out.rglob("*.safetensors"), *out.rglob("config.json")]):
        content.update(path.name.encode() + path.read_bytes())
    rows = json.loads((out / "results.json").read_text())["rows"]
    content.update(json.dumps([[r.get(k) for k in ("bits", "perplexity", "kl", "top1")] for r in rows]).encode())
    return content.hexdigest()


def kills(sandbox, count, ranks=1, seed=0) -> dict:
    "Kills `count` runs at random moments; what came out."
    rng = random.Random(seed)
    found = dict(kills=0, runs=0, identical=0, lost=0, outside=0, hung=0, tracebacks=0)
    while found["kills"] < count:
        setting = rng.choice(SETTINGS if ranks == 1 else SETTINGS[:2])
        seconds = sandbox.undisturbed(setting, ranks)[1]
        for _ in range(min(rng.randint(1, 4), count - found["kills"])):
            before, processes = sandbox.finished(), sandbox.start(setting, ranks)
            time.sleep(rng.uniform(0, seconds))
            victim = rng.choice(processes)
            victim.kill()
            for p in processes:
                p is victim or p.terminate()  # as torchrun does when one of its processes is gone
            found["hung"] += None in ended(processes)
            if victim.exitcode != -signal.SIGKILL:  # it had ended
                break
            found["lost"] += not (sandbox.out / "results.json").exists() and sandbox.lost(before)
            found["kills"] += 1
        sandbox.go_on(found, setting, ranks)
        found["runs"] += 1
        shutil.rmtree(sandbox.out, ignore_errors=True)
    return found


def disk(sandbox, count) -> dict:
    "Runs on disks of many sizes, from nothing to nearly enough; then the disk grows, and the run goes on."
    found = dict(disks=0, told=0, identical=0, lost=0, outside=0, tracebacks=0)
    for i in range(count):
        setting = SETTINGS[i % len(SETTINGS)]
        sandbox.undisturbed(setting)
        need = 2600 if "max" in setting else 1400  # KiB; more than a run takes
        size = f"size={4 + need * i // count // 4 * 4}k"
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", sandbox.disk], check=True)
        try:
            [code] = ended(sandbox.start(setting))
            if code == 0:
                continue  # it was enough
            said, before = sandbox.log(), sandbox.finished()
            found["disks"] += 1
            found["told"] += code == 2 and said.strip().splitlines()[-1].startswith("aespa_nb: error: ")
            found["tracebacks"] += "Traceback" in said
            subprocess.run(["mount", "-o", "remount,size=64m", sandbox.disk], check=True)
            found["lost"] += sandbox.lost(before)
            sandbox.go_on(found, setting)
        finally:
            subprocess.run(["umount", "-l", sandbox.disk], check=True)
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
