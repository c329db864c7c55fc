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

import torch
from aespa_nb import load_model
from aespa_nb.cli import main
from aespa_nb.quantize.journal import UNFINISHED
from common import resume
from transformers import LlamaConfig, LlamaForCausalLM

SETTINGS = [  # few steps, so that many runs fit into an hour; the first three can be shared by several processes
    "--preset gptq --bits 2",
    "--preset best --bits 3 --group-size 32",
    "--preset aespa --bits 4 --iterations 5 --symmetric",
    "--preset max --bits 2 --format dense",
    "--preset turboboa --bits 3",
    "--preset signround --bits 4 --iterations 4",
]
SIZES = dict(vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4)


class Sandbox:
    "A small model and a text in a folder, in which runs are disturbed."

    def __init__(self, folder):
        self.folder, self.calm = Path(folder), {}
        self.tmp = self.folder / "tmp"
        self.tmp.mkdir()
        os.environ["TMPDIR"] = tempfile.tempdir = str(self.tmp)
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=64)).save_pretrained(self.folder / "model")
        load_model("reference")[1].save_pretrained(self.folder / "model")
        text = "A tensor is an array that knows its shape, its dtype and its device. " * 400
        (self.folder / "model/text.txt").write_text(text)

    def start(self, setting, out, ranks=1):
        "Processes that run, or go on with, a setting; forked from this one: torch is loaded already."
        model = self.folder / "model"
        words = ["quantize", str(model), "--calibration", str(model / "text.txt"), "--out", str(out)]
        words += f"--samples 8 --seqlen 32 --eval-samples 2 --quiet --resume {setting}".split()
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            where = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]), WORLD_SIZE=str(ranks))
        pids = []
        for rank in range(ranks):
            pids.append(os.fork())
            if pids[-1]:
                continue
            if ranks > 1:
                os.environ.update(where, RANK=str(rank), LOCAL_RANK=str(rank))
            log = os.open(self.folder / f"log-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1), os.dup2(log, 2)
            sys.stdout, sys.stderr, code = os.fdopen(1, "w"), os.fdopen(2, "w"), 99
            try:
                code = main(words)
            except BaseException as e:  # what must not happen
                print(f"Traceback: {type(e).__name__}: {e}", file=sys.stderr)
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        return pids

    def log(self):
        "What the first process of the last run has printed."
        return (self.folder / "log-0").read_text()

    def undisturbed(self, setting, ranks=1):
        "Digest of the files of a run that nobody disturbs, and its seconds."
        if (setting, ranks) not in self.calm:
            out, start = self.folder / "calm", time.monotonic()
            assert wait(self.start(setting, out, ranks)) == [0] * ranks, self.log()
            self.calm[setting, ranks] = digest(out), time.monotonic() - start
            shutil.rmtree(out)
        return self.calm[setting, ranks]

    def strays(self, *known):
        "Files outside the folder of the run."
        names = {"model", "tmp", *(p.name for p in [*known, *self.folder.glob("log-*")])}
        files = [p for p in self.tmp.rglob("*") if p.is_file()]
        return files + [p for p in self.folder.iterdir() if p.name not in names]


def wait(pids, limit=120):
    "Exit codes; None for a process that had to be stopped after `limit` seconds."
    codes, end = {}, time.monotonic() + limit
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.kill(pid, signal.SIGKILL), os.waitpid(pid, 0)
                codes[pid] = None
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


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
            before, pids = finished(out), sandbox.start(setting, out, ranks)
            time.sleep(rng.uniform(0, 1.1 * seconds))
            victim = rng.choice(pids)
            os.kill(victim, signal.SIGKILL)
            for pid in set(pids) - {victim}:
                os.kill(pid, signal.SIGTERM)  # as torchrun does when one of its processes is gone
            codes = wait(pids)
            found["hung"] += None in codes
            if codes[pids.index(victim)] != -signal.SIGKILL:  # it had ended: the machine has become faster
                sandbox.calm[setting, ranks] = expected, 0.7 * seconds
                break
            found["lost"] += not (out / "results.json").exists() and lost(before, out)
            found["outside"] += bool(sandbox.strays(out))
            found["kills"] += 1
        codes = wait(sandbox.start(setting, out, ranks))
        found["runs"] += 1
        found["identical"] += codes[0] == 0 and digest(out) == expected and not (out / UNFINISHED).exists()
        found["tracebacks"] += "Traceback" in sandbox.log()
        found["outside"] += bool(sandbox.strays(out))
        shutil.rmtree(out, ignore_errors=True)
    return found


def disk(sandbox, count) -> dict:
    "Runs on disks of many sizes, from nothing to nearly enough; then the disk grows, and the run goes on."
    found = dict(disks=0, told=0, identical=0, lost=0, outside=0, tracebacks=0)
    mount = sandbox.folder / "disk"
    mount.mkdir()
    for i in range(count):
        setting, out = SETTINGS[i % len(SETTINGS)], mount / "out"
        expected = sandbox.undisturbed(setting)[0]
        need = 2600 if "max" in setting else 1400  # KiB; more than a run takes
        size = f"size={4 + need * i // count // 4 * 4}k"
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", mount], check=True)
        with contextlib.ExitStack() as stack:
            stack.callback(subprocess.run, ["umount", "-l", mount], check=True)
            [code] = wait(sandbox.start(setting, out))
            said, before = sandbox.log(), finished(out)
            if code == 0:
                continue  # it was enough
            found["disks"] += 1
            found["told"] += code == 2 and said.strip().splitlines()[-1].startswith("aespa_nb: error: ")
            found["tracebacks"] += "Traceback" in said
            subprocess.run(["mount", "-o", "remount,size=64m", mount], check=True)
            found["lost"] += lost(before, out)
            [code] = wait(sandbox.start(setting, out))
            found["identical"] += code == 0 and digest(out) == expected
        found["outside"] += bool(sandbox.strays(mount))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "disk"))
    parser.add_argument("--count", type=int, default=100, help="kills, or sizes of the disk (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=1, help="processes that share a run (default: 1)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sandbox = Sandbox(folder)
        if args.what == "kills":
            job = dict(kind="killed", ranks=args.ranks)
            resume("faults", [job], lambda job: kills(sandbox, args.count, args.ranks))
        else:
            resume("faults", [dict(kind="full disk", ranks=1)], lambda job: disk(sandbox, args.count))
