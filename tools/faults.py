"""Kill runs at random moments and fill their disk, again and again: nothing may be lost, nothing may be wrong.

    python tools/faults.py kills --count 200       # SIGKILL, one process
    python tools/faults.py kills --count 60 --ranks 2
    python tools/faults.py disk                    # a disk that is full at each write (needs root: it mounts a tmpfs)

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

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from aespa_nb import load_model
from aespa_nb.cli import main
from aespa_nb.quantize.journal import UNFINISHED, unfinished_config, write_json
from rich.progress import track
from transformers import LlamaConfig, LlamaForCausalLM

RECORDS = Path(__file__).parents[1] / "nbs/runs/faults.json"
SETTINGS = [  # (preset, further words); few steps, so that many runs fit into an hour
    ("gptq", ["--bits", "2"]),
    ("best", ["--bits", "3", "--group-size", "32"]),
    ("aespa", ["--bits", "4", "--iterations", "5", "--symmetric"]),
    ("max", ["--bits", "2", "--format", "dense"]),
    ("turboboa", ["--bits", "3"]),
    ("signround", ["--bits", "4", "--iterations", "4"]),
]
TOGETHER = SETTINGS[:3]  # what several processes can share


def build_model(folder):
    "A small LLaMA with the bundled tokenizer, and a text."
    torch.manual_seed(0)
    sizes = dict(vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4)
    LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64)).save_pretrained(folder)
    load_model("reference")[1].save_pretrained(folder)
    (folder / "text.txt").write_text("A tensor is an array that knows its shape, its dtype and its device. " * 400)


class Sandbox:
    "A model, and folders in which runs are disturbed."

    def __init__(self, folder):
        self.folder, self.calm = Path(folder), {}
        self.tmp = self.folder / "tmp"
        self.tmp.mkdir()
        os.environ["TMPDIR"] = tempfile.tempdir = str(self.tmp)
        build_model(self.folder / "model")

    def words(self, setting, out, shares=None):
        "The command line of a run; one that goes on knows its shares."
        text, (preset, more) = str(self.folder / "model/text.txt"), setting
        words = ["quantize", str(self.folder / "model"), "--calibration", text, "--samples", "8", "--seqlen", "32"]
        words += ["--eval-samples", "2", "--quiet", "--preset", preset, *more, "--out", str(out)]
        return words + (["--shares", str(shares)] if shares and not unfinished_config(out) else [])

    def start(self, words, ranks=1):
        "Processes that run the command line, forked from this one: torch is loaded already."
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        return [self._fork(words, rank, ranks, port) for rank in range(ranks)]

    def _fork(self, words, rank, ranks, port):
        if pid := os.fork():
            return pid
        if ranks > 1:
            where = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank))
            os.environ.update(where, RANK=str(rank), WORLD_SIZE=str(ranks))
        log = os.open(self.folder / f"log-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        code = 99
        try:
            code = main(words)
        except BaseException as e:  # a traceback is what must not happen
            print(f"traceback: {type(e).__name__}: {e}", file=sys.stderr)
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

    def log(self, rank=0):
        "What a process of the last run has printed."
        return (self.folder / f"log-{rank}").read_text()

    def undisturbed(self, setting, shares=None):
        "Digest of the files of a run that nobody disturbs, and its seconds."
        key = json.dumps([setting, shares])
        if key not in self.calm:
            out, start = self.folder / "calm", time.monotonic()
            assert wait(self.start(self.words(setting, out, shares))) == [0], self.log()
            self.calm[key] = digest(out), time.monotonic() - start
            shutil.rmtree(out)
        return self.calm[key]

    def hurry(self, setting, shares):
        "Expects runs of this kind to take less time than they did."
        key = json.dumps([setting, shares])
        self.calm[key] = self.calm[key][0], 0.7 * self.calm[key][1]


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
    for path in sorted(p for p in Path(out).rglob("*") if p.suffix in (".safetensors",) or p.name == "config.json"):
        content.update(path.name.encode() + path.read_bytes())
    keys = ("method", "bits", "perplexity", "kl", "top1")
    rows = json.loads((out / "results.json").read_text())["rows"]
    content.update(json.dumps([[r.get(k) for k in keys] for r in rows]).encode())
    return content.hexdigest()


def finished(out):
    "Finished blocks of an unfinished run: name and content."
    return {p.name: p.read_bytes() for p in (out / UNFINISHED / "journal").glob("*.safetensors")}


def strays(sandbox, out):
    "Files outside the folder of the run."
    known = {"model", "tmp", out.name, *(p.name for p in sandbox.folder.glob("log-*"))}
    temporary = [p for p in sandbox.tmp.rglob("*") if p.is_file()]
    return [p for p in sandbox.folder.iterdir() if p.name not in known] + temporary


def kills(sandbox, count, ranks, seed, minutes=None, progress=True):
    "Kills `count` runs at random moments, or as many as fit into some minutes; a record of what came out."
    end = time.monotonic() + 60 * (minutes or 1e6)
    rng, found = random.Random(seed), dict(kills=0, runs=0, identical=0, lost=0, outside=0, hung=0, tracebacks=0)
    bar = iter(track(range(count), f"kills, {ranks} ranks", disable=not progress))
    while found["kills"] < count and time.monotonic() < end:
        setting = rng.choice(SETTINGS if ranks == 1 else TOGETHER)
        shares, out = (4 if ranks > 1 else None), sandbox.folder / "out"
        expected, seconds = sandbox.undisturbed(setting, shares)
        for _ in range(min(rng.randint(1, 4), count - found["kills"])):
            if kill_once(sandbox, sandbox.words(setting, out, shares) + ["--resume"], out, ranks, rng, seconds, found):
                next(bar)
            else:  # it had ended: the machine has become faster
                sandbox.hurry(setting, shares)
                break
        codes = wait(sandbox.start(sandbox.words(setting, out, shares) + ["--resume"], rng.randint(1, ranks)))
        found["runs"] += 1
        found["identical"] += codes[0] == 0 and digest(out) == expected and not (out / UNFINISHED).exists()
        found["tracebacks"] += "traceback" in sandbox.log()
        found["outside"] += bool(strays(sandbox, out))
        shutil.rmtree(out, ignore_errors=True)
    return dict(kind="killed", ranks=ranks) | found


def kill_once(sandbox, words, out, ranks, rng, seconds, found):
    "Starts a run and kills a process of it at a random moment; False if it had ended before."
    before = finished(out)
    pids = sandbox.start(words, ranks)
    time.sleep(rng.uniform(0, 1.1 * seconds))
    victim = rng.choice(pids)
    os.kill(victim, signal.SIGKILL)
    for pid in set(pids) - {victim}:
        os.kill(pid, signal.SIGTERM)  # as torchrun does when one of its processes is gone
    codes = wait(pids)
    found["hung"] += None in codes
    if codes[pids.index(victim)] != -signal.SIGKILL:
        return False  # it had ended: that is no kill
    complete = (out / "results.json").exists()
    found["lost"] += not complete and any(finished(out).get(name) != content for name, content in before.items())
    found["outside"] += bool(strays(sandbox, out))
    found["kills"] += 1
    return True


@contextlib.contextmanager
def small_disk(folder, kib):
    "A disk of `kib` KiB at `folder`."
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def disk(sandbox, steps, progress=True):
    "Runs on disks of many sizes, from nothing to nearly enough; then the disk grows, and the run goes on."
    found = dict(disks=0, told=0, identical=0, lost=0, outside=0, tracebacks=0)
    for i in track(range(steps), "full disks", disable=not progress):
        setting = SETTINGS[i % len(SETTINGS)]
        expected, mount = sandbox.undisturbed(setting)[0], sandbox.folder / "disk"
        out = mount / "out"
        need = 1400 if setting[0] != "max" else 2600  # KiB; more than a run takes
        with small_disk(mount, 4 + need * i // steps // 4 * 4):
            [code] = wait(sandbox.start(sandbox.words(setting, out)))
            said, before = sandbox.log(), finished(out)
            if code == 0:
                continue  # it was enough
            found["disks"] += 1
            found["told"] += code == 2 and said.strip().splitlines()[-1].startswith("aespa_nb: error: ")
            found["tracebacks"] += "raceback" in said
            subprocess.run(["mount", "-o", "remount,size=64m", mount], check=True)
            found["lost"] += any(finished(out).get(name) != content for name, content in before.items())
            [code] = wait(sandbox.start(sandbox.words(setting, out) + ["--resume"]))
            found["identical"] += code == 0 and digest(out) == expected
        found["outside"] += bool([p for p in strays(sandbox, out) if p != mount])
    return dict(kind="full disk", ranks=1) | found


def record(row):
    "Replaces the record of the same kind."
    rows = json.loads(RECORDS.read_text()) if RECORDS.exists() else []
    rows = [r for r in rows if (r["kind"], r["ranks"]) != (row["kind"], row["ranks"])] + [row]
    write_json(RECORDS, sorted(rows, key=lambda r: (r["kind"], r["ranks"])))


def command_line():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "disk"))
    parser.add_argument("--count", type=int, default=100, help="kills, or sizes of the disk (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=1, help="processes that share a run (default: 1)")
    parser.add_argument("--minutes", type=float, help="stop killing after so long")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    args = command_line()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sandbox = Sandbox(folder)
        if args.what == "kills":
            row = kills(sandbox, args.count, args.ranks, args.seed, args.minutes)
        else:
            row = disk(sandbox, args.count)
    print(json.dumps(row))
    record(row | dict(seed=args.seed))
