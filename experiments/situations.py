"""Random situations of users: models, texts and options as people bring them, drawn together.

300 of them, to nbs/runs/situations.json; `situation(17)` is one. Each is a call of `aespa_nb quantize` in this
process. It ends well, and then stock transformers (for gptq: our reader) load the folder and find the perplexity that
was reported, and its codes say what bits were asked for; or in one line and exit code 2, with nothing written.
Anything else is named: see `BAD`.
"""

import contextlib
import io
import json
import random
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
import transformers as hf
from aespa_nb import evaluate_model, load_model, read_quantized
from aespa_nb.cli import main
from aespa_nb.data import text
from common import resume
from families import FAMILIES, MORE
from formats import CHANGES

BAD = ("traceback", "several lines", "left something", "half written", "other perplexity", "other bits")
SKIPPED = {"BERT", "ViT", "Whisper", "T5"}  # no decoders of text
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
TALK = [dict(role="user", content="What is a tensor?"), dict(role="assistant", content="An array with a dtype.")]


def texts(folder: Path, documents: list[str]) -> dict[str, str]:
    "Sources by name, most of them good."
    rows = [dict(text=d) for d in documents]
    shared = [{"from": "human", "value": d[:40]} for d in documents]
    contents = {
        "plain.txt": "\n".join(documents), "mark.txt": "\ufeff" + "\n".join(documents), "short.txt": "Hello.",
        "rows.jsonl": "\n".join(map(json.dumps, rows)), "rows.json": json.dumps(rows), "empty.jsonl": "",
        "gaps.jsonl": "\n".join(json.dumps(r if i % 3 else dict(text=None)) for i, r in enumerate(rows)),
        "chat.jsonl": "\n".join(json.dumps(dict(messages=TALK)) for _ in documents),
        "shared.json": json.dumps([dict(conversations=shared[i : i + 2]) for i in range(len(shared))]),
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8")
    (folder / "zeros.txt").write_bytes(bytes(999))
    columns = {"chat.jsonl": ":messages", "shared.json": ":conversations"}
    places = {name: f"{folder}/{name}{columns.get(name, '')}" for name in [*contents, "zeros.txt", "nowhere.txt"]}
    return places | {"standard input": "-", "no column": f"{folder}/rows.jsonl:body", "bundled": "reference"}


def make_model(draw: random.Random, folder: Path, tokenizer) -> str:
    "A small model of some family in a folder as people have them; gives what it is, in words."
    family = draw.choice(sorted({*FAMILIES, *MORE} - SKIPPED))
    kind, fields = (FAMILIES | MORE)[family]
    fields = fields | CHANGES.get(family, {})
    fields |= dict(vocab_size=len(tokenizer), tie_word_embeddings=draw.random() < 0.4)
    fields |= dict(pad_token_id=0, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(draw.randrange(99))
    model = hf.AutoModelForCausalLM.from_config(getattr(hf, f"{kind}Config")(**fields), dtype=torch.float32)
    dtype = draw.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
    size = draw.choice(["1GB", "300KB"])
    if draw.random() < 0.3:
        model.generation_config = hf.GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=[0, 5])
    model.to(dtype).save_pretrained(folder, max_shard_size=size)
    if with_tokenizer := draw.random() < 0.95:
        tokenizer.chat_template = TEMPLATE if draw.random() < 0.9 else None
        tokenizer.save_pretrained(folder)
    return f"{family}, {dtype}, shards of {size}{'' if with_tokenizer else ', no tokenizer'}"


def options(draw: random.Random, sources: dict[str, str]) -> list[str]:
    "Words of the command line."
    good = ["plain.txt", "rows.jsonl", "gaps.jsonl", "chat.jsonl", "mark.txt", "standard input", "shared.json"]
    source = lambda: sources[draw.choice(good) if draw.random() < 0.93 else draw.choice(sorted(sources))]
    words = ["--calibration", source(), "--preset", draw.choice("rtn rtn gptq gptq gptaq best best zfold".split())]
    words += ["--evaluation", source()] * (draw.random() < 0.5)
    rarely = lambda share, *more: list(more) if draw.random() < share else []
    words += rarely(0.8, "--bits", draw.choice("2 3 4 5 8".split())) or rarely(0.5, "--auto-bits", "3")
    words += rarely(0.5, "--group-size", draw.choice("32 32 32 16 16 7".split())) + rarely(0.4, "--symmetric")
    words += rarely(0.2, "--keep", draw.choice(["0.=16", "0.=4", "0.=8", "0.=3", "q_proj=4", "nothing=4", "down"]))
    words += rarely(0.7, "--format", draw.choice("compressed-tensors gptq dense gguf".split()))
    words += rarely(0.15, "--for", draw.choice("transformers vllm llama.cpp".split()))
    words += rarely(0.1, "--embeddings", "8")
    words += rarely(0.1, "--set", draw.choice(["end_loss=true", "damping=0.1", "x=1"]))
    return words + rarely(0.2, "--bos") + ["--samples", "3", "--seqlen", "24", "--eval-samples", "4", "--quiet"]


def whole(out: Path, words: list[str], held: torch.Tensor) -> str:
    "What is wrong with a folder that was written, or `done`."
    if not all((out / name).is_file() for name in ("results.json", "quantization.json", "README.md")):
        return "half written"
    told = json.loads((out / "results.json").read_text())["rows"][-1]["perplexity"]
    exported = json.loads((out / "quantization.json").read_text())["export"]
    if exported["format"] == "gptq":
        model = load_model(out)[0]
    else:
        file = {"gguf_file": "model.gguf"} if exported["format"] == "gguf" else {}
        dtype = torch.float32 if file else "auto"
        model = hf.AutoModelForCausalLM.from_pretrained(out, dtype=dtype, **file).eval()
    found = evaluate_model(model, held).perplexity
    if not abs(found / told - 1) < 0.01:
        return f"other perplexity: {found} not {told}"
    asked = int(words[words.index("--bits") + 1]) if "--bits" in words else 2
    kept = "--keep" in words or "--auto-bits" in words
    bits = {r.grid.bits for r in read_quantized(out).report.layers.values()}
    return "done" if kept or bits == {asked} else f"other bits: {bits}"


def situation(seed: int) -> dict:
    "One of them: what it was, how it ended, and with what words."
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        folder, errors = Path(place), io.StringIO()
        reference = text.load_reference()
        documents = reference.tokenizer.batch_decode(reference.calib[:24, :64], skip_special_tokens=True)
        sources = texts(folder, documents)
        about = make_model(draw, folder / "model", reference.tokenizer)
        words = options(draw, sources)
        heard, before = [], sorted(folder.iterdir())
        text.standard_input.cache_clear()
        stack.enter_context(mock.patch("sys.stdin", io.StringIO("\n".join(documents))))
        stack.enter_context(contextlib.redirect_stderr(errors))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        windows = text.evaluation_windows
        keep = lambda *a, **more: heard.append(windows(*a, **more)) or heard[-1]
        stack.enter_context(mock.patch("aespa_nb.data.text.evaluation_windows", keep))
        out = folder / "out"
        try:
            code = main(["quantize", str(folder / "model"), *words, "--out", str(out)])
            said = [line for line in errors.getvalue().splitlines() if line.startswith("aespa_nb: error")]
            if code == 2:
                end = "refused" if len(said) == 1 and len(said[0]) < 600 else "several lines"
                end = end if sorted(folder.iterdir()) == before else "left something"
            else:
                end = whole(out, words, heard[-1].tokens)
        except Exception:
            end, said = "traceback", traceback.format_exc().splitlines()[-6:]
        shown = " ".join(words).replace(place + "/", "")
        return dict(model=about, words=shown, end=end, said=" ".join(said).replace(place + "/", ""))


if __name__ == "__main__":
    rows = resume("situations", [dict(seed=seed) for seed in range(300)], lambda job: situation(**job), whole=True)
    print(Counter(row["end"].split(":")[0] for row in rows))
