"""Re-create the small language model bundled in aespa_nb/reference, from text that Python packages carry.

Run from the repository root, in an environment that holds the pinned packages; every step writes into --out:

    python experiments/train_reference.py fetch                # further packages: read as text, never imported
    python experiments/train_reference.py corpus               # docstrings and comments -> documents.jsonl
    python experiments/train_reference.py tokens               # tokenizer and token streams
    python experiments/train_reference.py train --minutes 44   # stage 1: docstrings alone, from scratch
    python experiments/train_reference.py train --minutes 66 --init build/reference/first   # stage 2: with added text
    python experiments/train_reference.py finish               # the folder to ship, and its perplexity

A second model, of the OPT kind, is trained on the same tokens and not bundled: `train --kind opt --minutes 25
--text build/reference --out build/opt`, then `finish` with the same words and `--model build/opt/first`.

`train` uses a GPU if there is one; on a CPU, `OMP_NUM_THREADS=1 torchrun --nproc-per-node 2` is fastest. The learning
rate follows the clock, so a run ends on time on any machine (and no two runs are equal).
"""

import argparse
import ast
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import random
import re
import subprocess
import sys
import sysconfig
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

# Packages whose docstrings are the core of the corpus and the only source of held-out text, in this order.
PACKAGES = """torch transformers numpy pandas matplotlib datasets huggingface_hub accelerate tokenizers safetensors
pyarrow sympy mpmath networkx IPython ipykernel traitlets tornado nbformat nbconvert jupyter_client jupyter_core
jupyter_server prompt_toolkit fsspec PIL dateutil fontTools pyparsing requests httpx httpcore anyio rich click typer
jinja2 pygments bs4 soupsieve setuptools pip packaging dill multiprocess psutil pydantic fastcore nbdev execnb ghapi
babel jedi parso mistune bleach yaml tqdm zmq attr regex contourpy kiwisolver urllib3 certifi idna charset_normalizer
filelock lark platformdirs watchdog arrow referencing jsonschema jupyterlab debugpy""".split()
OUTSIDE = {"networkx"}  # never trained on, and not in the held-out split either
# Further packages, all under permissive licences: text for the second stage.
EXTRA = """scipy==1.17.1 scikit-learn==1.9.1 statsmodels==0.15.0 scikit-image==0.26.0 xarray==2026.9.0
diffusers==0.42.1 keras==3.15.1 jax==0.10.2 flax==0.12.8 peft==0.21.2 trl==1.16.0 astropy==8.0.2 seaborn==0.13.2
nltk==3.10.4 torchmetrics==1.9.0 pytorch-lightning==2.6.6 dask==2026.8.0 polars==2.1.0 optuna==5.0.0 pymc==5.28.5
torch-geometric==2.8.1 tensorflow-probability==0.25.0 kornia==0.9.0 sentence-transformers==6.2.0 django==5.2.19
pennylane==0.45.1""".split()
SKIP = set("tests test testing _vendor __pycache__ idlelib lib2to3 site-packages pydoc_data".split())
HELDOUT_PERCENT, WINDOW, VOCABULARY = 4, 256, 4096


def fetch(args):
    "Unpacks the wheels of EXTRA, without their dependencies, into --extra; one that fails is skipped."
    for pin in EXTRA:
        target = args.extra / pin.split("==")[0]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--only-binary=:all:"]
        if not target.exists() and subprocess.run([*pip, "--target", target, pin]).returncode:
            print("skipped:", pin)


# ---- corpus: from source files to documents --------------------------------------------------------------------------
WORD = re.compile(r"[A-Za-z][a-z']*")
STOP_WORDS = set("the a an of to in is are and or for with be this that it if as by on from which not can when will at "
                 "has have was were then than may must should used using only other each into".split())  # fmt: skip
ITEM = re.compile(r"([-*•+]|\d+[.)]|#{1,4})\s|\.\. |:param|:return|:type|@")
DEFINITION = re.compile(r"[\w.*]+(, [\w.*]+)*\s*(\([^)]*\))?\s*:(\s|$)")
NOT_TEXT = (">>>", "...", "In [", "Out[", "$ ", "| ", "+-", "|-")
MARKUP = {  # fenced code goes; links, roles and emphasis keep their text
    re.compile(r"^(```|~~~).*?^(```|~~~)\s*$", re.S | re.M): "",
    re.compile(r"<(Tip|/Tip|Added|Deprecated|Changed)[^>]*>"): "",
    re.compile(r":(?:[a-z]+:)?[a-z]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`"): r"`\1`",
    re.compile(r"\[([^\]]*)\]\([^)]*\)"): r"\1",
    re.compile(r"\*\*([^*\n]+)\*\*"): r"\1",
    re.compile("``"): "`",
}


def digest(text):
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def docstrings(tree):
    "Docstrings, and the long string constants that documentation hides in (add_docstr calls, templates)."
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node, clean=True):
                yield text
        elif isinstance(node, ast.Call | ast.Assign):
            for value in [node.value] if isinstance(node, ast.Assign) else node.args:
                while isinstance(value, ast.BinOp | ast.Call):  # "..." + x, "...".format(x)
                    value = value.left if isinstance(value, ast.BinOp) else getattr(value.func, "value", None)
                text = value.value if isinstance(value, ast.Constant) else None
                if isinstance(text, str) and len(text) > 200 and "\n" in text:
                    yield inspect.cleandoc(text)


def comments(source):
    "Consecutive lines that hold nothing but a comment, joined; licence headers are left out."
    for block in re.findall(r"(?:^[ \t]*#.*\n)+", source, re.M):
        if not re.search(r"copyright|licen[sc]e", block, re.I):
            yield re.sub(r"^[ \t]*#+[:!|]? ?", "", block, flags=re.M)


def paragraphs(text):
    "Splits a docstring or comment into paragraphs and list items, one line each; examples and rulers go."
    text = text.replace("\r", "")
    for pattern, replacement in MARKUP.items():
        text = pattern.sub(replacement, text)
    groups, before = [[]], 0
    for line in text.split("\n"):
        words, indent = line.strip(), len(line) - len(line.lstrip())
        if not words or words.startswith(NOT_TEXT) or set(words) <= set("-=~^*#+_. "):
            groups.append([])
            continue
        if ITEM.match(words) or indent < before or (DEFINITION.match(words) and indent <= before):
            groups.append([])
        groups[-1].append(words)
        before = indent
    return [re.sub(r"[ \t]+", " ", " ".join(g)).strip() for g in groups if g]


def read_file(path):
    "(paragraphs of each docstring, paragraphs of each comment block) of one source file."
    warnings.filterwarnings("ignore")
    try:
        source = Path(path).read_text(encoding="utf-8")
        return [paragraphs(d) for d in docstrings(ast.parse(source))], [paragraphs(b) for b in comments(source)]
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
        return [], []


def source_files(package, root, base):
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(s for s in subfolders if s not in SKIP and not s.startswith("."))
        for path in (os.path.join(folder, f) for f in sorted(files) if f.endswith(".py") and not f.startswith("test_")):
            yield package, os.path.relpath(path, base), path


def letters(paragraph):
    return sum(c.isalpha() or c == " " for c in paragraph) / len(paragraph)


def is_prose(paragraph):
    words = WORD.findall(paragraph)
    if len(paragraph) < 40 or len(words) < 8 or ">>>" in paragraph or "\0" in paragraph or letters(paragraph) < 0.80:
        return False
    return sum(w.lower() in STOP_WORDS for w in words) / len(words) >= 0.15


def exact_key(paragraph):
    return digest(re.sub(r"\W+", " ", paragraph.lower()).strip())


def template_keys(paragraph):
    "One key, equal for paragraphs that differ in names and numbers alone; none where too little is left."
    text = re.sub(r"`[^`]*`|\b\w*[a-z][A-Z]\w*\b|\b\w*[\d_]\w*\b", " ", paragraph)
    text = " ".join(re.findall(r"[a-z]{3,}", text.lower()))
    return {("template", digest(text))} if len(text) > 20 else set()


def shingles(paragraph, width=13):
    words = re.findall(r"\w+", paragraph.lower())
    return {hash(tuple(words[i : i + width])) for i in range(len(words) - width + 1)}


def drop_near_duplicates(documents):
    "Removes training paragraphs that share half of their 13-word runs with held-out ones, or half of one of theirs."
    heldout = [p for d in documents if d["split"] == "heldout" for p in d["text"]]
    runs_of, owner, dropped = list(map(shingles, heldout)), defaultdict(list), Counter()
    for i, runs in enumerate(runs_of):
        for run in runs:
            owner[run].append(i)
    training = [d for d in documents if d["split"] == "train"]
    for d in training:
        for p in list(d["text"]):
            runs = shingles(p)
            hits = Counter(i for run in runs for i in owner.get(run, ()))
            shared = sum(run in owner for run in runs)
            if shared and (2 * shared >= len(runs) or any(2 * n >= len(runs_of[i]) for i, n in hits.items())):
                d["text"].remove(p)
                dropped[d["kind"]] += 1
    leaked = set(map(exact_key, heldout)) & {exact_key(p) for d in training for p in d["text"]}
    assert not leaked, "held-out paragraphs in the training text"
    return dropped


def corpus(args):
    "Writes documents.jsonl: one document a line, with its kind, split, package, source and text."
    from pydoc_data.topics import topics

    stdlib, site = (Path(sysconfig.get_paths()[k]) for k in ("stdlib", "purelib"))
    core = [*source_files("stdlib", stdlib, stdlib), *(f for p in PACKAGES for f in source_files(p, site / p, site))]
    extra = [f for p in sorted(args.extra.glob("*")) for f in source_files(p.name, p, p)]
    with multiprocessing.Pool() as pool:
        read = pool.map(read_file, [path for *_, path in core + extra], chunksize=64)
    core, extra = list(zip(core, read)), list(zip(extra, read[len(core) :]))

    def split_of(package, name):  # by whole files
        return "outside" if package in OUTSIDE else "heldout" if digest(name) % 100 < HELDOUT_PERCENT else "train"

    # The first copy of a repeated paragraph survives. The core docstrings come first, so nothing added later can
    # repeat a held-out paragraph. Comments are taken from training files alone.
    found = [("docstring", "pydoc", f"pydoc_topics/{k}", [paragraphs(topics[k])]) for k in sorted(topics)]
    found += [("docstring", p, name, texts) for (p, name, _), (texts, _) in core]
    found = [(kind, split_of(p, name), p, name, texts) for kind, p, name, texts in found]
    found += [("comment", "train", p, n, texts) for (p, n, _), (_, texts) in core if split_of(p, n) == "train"]
    for i, kind in enumerate(("added docstring", "added comment")):
        found += [(kind, "train", p, f"{p}:{name}", both[i]) for (p, name, _), both in extra]
    seen, documents = set(), []
    for kind, split, package, name, texts in found:
        for text in texts:
            kept, prose = [], 0
            for p in text:
                keys = {exact_key(p)} | template_keys(p)
                new = not keys & seen
                if exact_key(p) not in seen:
                    seen |= keys
                if new and (is_prose(p) or (letters(p) >= 0.72 and len(p) >= 25 and len(WORD.findall(p)) >= 4)):
                    kept.append(p)
                    prose += len(p) * is_prose(p)
            total = len("\n".join(kept))
            if total >= 60 and prose >= (0.5 if kind == "docstring" else 0.6) * total:
                documents.append(dict(kind=kind, split=split, package=package, source=name, text=kept))
    report = {"near_duplicates_of_heldout_dropped": drop_near_duplicates(documents), "bytes": Counter()}
    with open(args.out / "documents.jsonl", "w", encoding="utf-8") as file:
        for d in documents:
            if text := "\n".join(d["text"]):
                file.write(json.dumps(d | {"text": text}) + "\n")
                report["bytes"][f"{d['split']}: {d['kind']}"] += len(text.encode())
    write(args.out / "corpus.json", report)


def write(path, report):
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def tokens(args):
    "Trains the tokenizer and writes tokens.safetensors, one stream per split."
    streams = defaultdict(lambda: defaultdict(list))
    for line in open(args.out / "documents.jsonl", encoding="utf-8"):
        d = json.loads(line)
        streams[d["split"] if d["kind"] == "docstring" else "added"][d["source"]].append(d["text"])
    texts = {k: ["\n\n".join(f[s]) for s in sorted(f, key=lambda s: (digest(s), s))] for k, f in streams.items()}
    bpe, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
    # words keep their leading space; at most three digits to a piece
    pieces = pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence([pieces, byte_level]), decoders.ByteLevel()
    options = dict(special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False, min_frequency=10)
    bpe.train_from_iterator(texts["train"], trainers.BpeTrainer(vocab_size=VOCABULARY, **options))
    start = dict(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)])
    bpe.post_processor = processors.TemplateProcessing(**start)
    special = dict(bos_token="<s>", eos_token="<s>", pad_token="<s>", clean_up_tokenization_spaces=False)
    FastTokenizer(tokenizer_object=bpe, model_max_length=WINDOW, **special).save_pretrained(args.out / "tokenizer")
    encoded = {k: torch.tensor([i for e in bpe.encode_batch(parts) for i in e.ids]) for k, parts in texts.items()}
    save_file({k: ids.short() for k, ids in encoded.items()}, args.out / "tokens.safetensors")
    size = lambda parts: dict(files=len(parts), bytes=sum(len(p.encode()) for p in parts))
    write(args.out / "tokens.json", {k: size(parts) | dict(tokens=len(encoded[k])) for k, parts in texts.items()})


# ---- training --------------------------------------------------------------------------------------------------------
def blank_model(kind):
    "The bundled kind; or a smaller OPT: biases, learned positions, LayerNorm, ReLU, as many key as query heads."
    same = dict(vocab_size=VOCABULARY, num_attention_heads=4, max_position_embeddings=WINDOW, tie_word_embeddings=True)
    same |= dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    if kind == "opt":
        size = dict(hidden_size=192, word_embed_proj_dim=192, ffn_dim=768, num_hidden_layers=4, dropout=0.0)
        return OPTForCausalLM(OPTConfig(**same, **size))
    size = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_key_value_heads=2, head_dim=64)
    return LlamaForCausalLM(LlamaConfig(**same, **size, rope_theta=10000.0, rms_norm_eps=1e-5))


def windows(stream, rank, world, seed):
    "Endless windows [WINDOW + 1]; every epoch has its own shift and order, shared out between the ranks."
    for epoch in range(1000):
        draw = torch.Generator().manual_seed(seed + epoch)
        shift = int(torch.randint(0, WINDOW, (1,), generator=draw))
        order = torch.randperm((len(stream) - 1 - shift) // WINDOW, generator=draw)[rank::world]
        for at in (order * WINDOW + shift).tolist():
            yield stream[at : at + WINDOW + 1].long()


def train(args):
    "Forward and backward in bfloat16, weights in float32; Muon for the matrices, AdamW for the rest; averaged."
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    if world > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    torch.manual_seed(args.seed)
    model = blank_model(args.kind).to(device)
    model.set_attn_implementation("sdpa" if torch.cuda.is_available() else "eager")  # half the time of the fused kernel
    if args.init:
        model.load_state_dict(load_file(args.init / "model.safetensors"), strict=False)
    named, deep = dict(model.named_parameters()), math.sqrt(2 * model.config.num_hidden_layers)
    for n, p in named.items():  # output projections start small, so that their sum over the layers does not grow
        if not args.init and n.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
            p.data.div_(deep)
    master = {n: p.detach().float().clone().requires_grad_() for n, p in named.items()}
    average = {n: p.detach().clone() for n, p in master.items()}
    model.bfloat16()
    matrices = [p for n, p in master.items() if ".layers." in n and p.ndim == 2]
    tables = [p for n, p in master.items() if ".layers." not in n and p.ndim == 2]
    vectors = [p for p in master.values() if p.ndim != 2]
    groups = [dict(params=tables, weight_decay=0.05), dict(params=vectors, weight_decay=0.0)]
    optimisers = {torch.optim.Muon(matrices, weight_decay=0.1): 0.02}
    optimisers[torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)] = 3e-3

    streams = load_file(args.text / "tokens.safetensors")
    docs, added = (windows(streams[s], rank, world, args.seed + 1000) for s in ("train", "added"))
    dice, step, start = random.Random(args.seed + rank), 0, time.time()
    done = torch.zeros(1, dtype=torch.float64, device=device)
    while True:
        done[0] = (time.time() - start) / 60 / args.minutes
        if world > 1:
            dist.broadcast(done, 0)  # every rank must see the same time, and so the same learning rate
        if (now := done.item()) >= 1:
            break
        share = args.added[0] + (args.added[1] - args.added[0]) * now
        rows = torch.stack([next(added if dice.random() < share else docs) for _ in range(args.batch)]).to(device)
        hidden = model.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
        logits = hidden.flatten(0, 1) @ model.lm_head.weight.t()
        loss = F.cross_entropy(logits.float(), rows[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        for n, p in master.items():
            p.grad = named[n].grad.float()
            if world > 1:
                dist.all_reduce(p.grad)
                p.grad /= world
        clip = min(1.0, 1.0 / (torch.nn.utils.get_total_norm([p.grad for p in master.values()]).item() + 1e-6))
        for p in tables + vectors:  # the length of Muon's updates does not depend on that of the gradient
            p.grad *= clip
        rate = args.peak * min(1.0, (step + 1) / 60, (1 - now) / (1 - args.hold))
        for optimiser, lr in optimisers.items():
            for group in optimiser.param_groups:
                group["lr"] = rate * lr
                if "momentum" in group:
                    group["momentum"] = 0.85 + 0.1 * min(1, step / 200)
            optimiser.step()
        with torch.no_grad():
            for n, p in master.items():
                average[n].lerp_(p, 1 - min(0.98, step / (step + 10)))
                named[n].copy_(p)
        step += 1
        if step % 100 == 0 and rank == 0:
            print(f"{now:6.1%}  step {step}  rate {rate:.3f}  loss {loss.item():.4f}", flush=True)
    if rank == 0:
        folder = args.out / ("second" if args.init else "first")
        folder.mkdir(parents=True, exist_ok=True)
        save_file(average, folder / "model.safetensors", {"format": "pt"})
        spent = step * world * args.batch * WINDOW
        write(folder / "progress.json", dict(minutes=args.minutes, tokens=spent, step=step, processes=world))
    if world > 1:
        dist.destroy_process_group()


# ---- the folder to ship ----------------------------------------------------------------------------------------------
def finish(args):
    "Writes --out/final: fp16 model, tokenizer, calibration and held-out tokens, training.json with the perplexity."
    from aespa_nb import perplexity

    final, model = args.out / "final", blank_model(args.kind)
    model.load_state_dict(load_file((args.model or args.out / "second") / "model.safetensors"), strict=False)
    model.half().save_pretrained(final)
    FastTokenizer.from_pretrained(args.text / "tokenizer").save_pretrained(final)
    streams = load_file(args.text / "tokens.safetensors")
    blocks = {k: s[: len(s) // WINDOW * WINDOW].view(-1, WINDOW) for k, s in streams.items()}
    chosen = torch.randperm(len(blocks["train"]), generator=torch.Generator().manual_seed(args.seed))[:1024]
    save_file({"tokens": blocks["train"][chosen].contiguous()}, final / "calibration.safetensors")
    save_file({"tokens": blocks["heldout"].contiguous()}, final / "heldout.safetensors")
    model = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32).eval()  # what a reader will load
    found, sizes = perplexity(model, blocks["heldout"].long()), json.loads((args.text / "tokens.json").read_text())
    per_byte = math.log2(found) * sizes["heldout"]["tokens"] / sizes["heldout"]["bytes"]
    heldout = dict(perplexity=found, bits_per_byte=per_byte, windows=len(blocks["heldout"]), window=WINDOW)
    outside, read = perplexity(model, blocks["outside"].long()), lambda path: json.loads(path.read_text())
    stages = {p.parent.name: read(p) for p in sorted(args.out.glob("*/progress.json"))}
    report = dict(heldout=heldout, outside_perplexity=outside, stages=stages, streams=sizes)
    versions = dict(python=sys.version.split()[0], torch=torch.__version__)
    write(final / "training.json", report | dict(corpus=read(args.text / "corpus.json"), **versions))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("step", choices=["fetch", "corpus", "tokens", "train", "finish"])
    add("--out", type=Path, default=Path("build/reference"), help="work folder (default: %(default)s)")
    add("--extra", type=Path, default=Path("build/reference/extra"), help="folder of the unpacked further packages")
    add("--seed", type=int, default=0, help="of initial weights, order of the text and calibration windows")
    add("--kind", choices=["llama", "opt"], default="llama", help="architecture (default: %(default)s)")
    add("--text", type=Path, help="train, finish: folder of corpus, tokenizer and tokens (default: OUT)")
    add("--minutes", type=float, default=44, help="train: length of the run (default: %(default)s)")
    add("--init", type=Path, help="train: start from the model.safetensors of this folder (stage 2)")
    add("--batch", type=int, default=12, help="train: windows per process and step (default: %(default)s)")
    add("--model", type=Path, help="finish: folder of the trained weights (default: OUT/second)")
    args = parser.parse_args()
    # learning rate; share of the time before its decay to zero; share of added text, at the beginning and at the end
    args.peak, args.hold, args.added = (0.8, 0.2, (0.65, 0.35)) if args.init else (1, 0.35, (0, 0))
    args.text = args.text or args.out
    args.out.mkdir(parents=True, exist_ok=True)
    globals()[args.step](args)
