"""Sharing a rounded model by name: uploaded by the hub's own command, loaded, measured and refused under its name.

The hub is a server in this process, which answers as the real one is documented to.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from aespa_nb.cli import main

NAME, COMMIT = "you/rounded", "a" * 40
SCRIPTS = Path(sys.executable).parent


class Hub(BaseHTTPRequestHandler):
    "One repository, without history; files are uploaded inside the commit."

    files: dict[str, bytes]

    def log_message(self, *_):
        pass

    def answer(self, body, status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": len(body), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        sent = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path == "/api/repos/create":
            self.answer(dict(url=f"https://huggingface.co/{NAME}", name=NAME))
        elif self.path.startswith(f"/api/models/{NAME}/preupload/"):
            how = dict(uploadMode="regular", shouldIgnore=False)
            self.answer(dict(files=[dict(path=f["path"], **how) for f in json.loads(sent)["files"]]))
        elif self.path.startswith(f"/api/models/{NAME}/commit/"):
            for line in map(json.loads, sent.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(dict(commitOid=COMMIT, commitUrl=f"https://huggingface.co/{NAME}/commit/{COMMIT}"))
        else:  # /api/validate-yaml: the head of the model card
            self.answer(dict(errors=[], warnings=[]))

    def do_GET(self):
        file = re.fullmatch(rf"/{NAME}/resolve/\w+/(.+)", self.path)
        if file and file[1] in self.files:
            body = self.files[file[1]]
            self.answer(body, ETag=hashlib.sha1(body).hexdigest())
        elif self.path.startswith(f"/api/models/{NAME}/tree/"):
            self.answer([dict(type="file", path=p, size=len(b), oid=COMMIT) for p, b in self.files.items()])
        elif self.path.startswith(f"/api/models/{NAME}"):
            self.answer(dict(id=NAME, sha=COMMIT, siblings=[dict(rfilename=p) for p in self.files]))
        else:
            self.answer(dict(error="not found"), 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET


MAIN = """
import contextlib, io, json, sys
from aespa_nb.cli import main
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        code = main(words)
    print(json.dumps([code, said.getvalue()]))
"""


@pytest.fixture
def hub(tmp_path):
    "Runs a program for which this server is the hub: its exit code and what it said."
    Hub.files = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    odd = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(odd) and not k.lower().endswith("_proxy")}
    env |= dict(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_TOKEN="hf_x", HF_HOME=str(tmp_path / "home"))

    def run(*words):
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout + done.stderr

    yield run
    server.shutdown()
    server.server_close()


def test_a_folder_is_shared_by_name(hub, tmp_path, capsys):
    "A name that nobody has is one line."
    brief = ["--samples", "2", "--seqlen", "32", "--eval-samples", "4", "--quiet"]
    out, again = tmp_path / "4", str(tmp_path / "again")
    assert main(["quantize", "reference", "--preset", "rtn", "--bits", "4", *brief, "--out", str(out)]) == 0
    code, said = hub(SCRIPTS / "hf", "upload", NAME, str(out))
    assert code == 0, said
    assert Hub.files.keys() == {p.name for p in out.iterdir()} and b"aespa_nb" in Hub.files["README.md"]

    measure = lambda place: ["eval", place, "--seqlen", "32", "--eval-samples", "4"]
    rounded = ["quantize", NAME, "--preset", "rtn", *brief, "--out", again]
    code, said = hub(sys.executable, "-c", MAIN, json.dumps([measure(NAME), rounded, measure("you/nothing")]))
    assert code == 0, said
    (code, by_name), refused, nobody = map(json.loads, said.splitlines())
    capsys.readouterr()
    assert code == main(measure(str(out))) == 0 and by_name == "".join(capsys.readouterr()) and "perplexity" in by_name
    assert refused[0] == 2 and "rounded already" in refused[1] and not Path(again).exists()
    assert nobody[0] == 2 and nobody[1].startswith("aespa_nb: error: 'you/nothing'") and nobody[1].count("\n") == 1
