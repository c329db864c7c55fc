"""Damaged models: each must end in a finite model no worse than round-to-nearest, or in one clear line.

    python tools/torture.py                       everything; writes nbs/runs/torture.json
    python tools/torture.py --only dead --presets gptq best --models llama      a part, printed

What "no worse" means: the squared error of every block's output on the calibration tokens, relative to the output,
summed over blocks, against that of the preset rtn; up to `TOLERANCE`. Everything is measured in float64.
"""

import argparse
import copy
import json
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
import transformers as hf
from aespa_nb import AespaConfig, AespaError, quantize_model
from aespa_nb.quantize.config import PRESETS
from aespa_nb.model.blocks import stacks_of
from aespa_nb.model.blocks import linears_of, weight_of

STORED = Path("nbs/runs/torture.json")
TOLERANCE = 0.02
SIZE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32)
MODELS = {
    "llama": lambda v: hf.LlamaForCausalLM(
        hf.LlamaConfig(**SIZE, vocab_size=v, num_key_value_heads=2, intermediate_size=48)
    ),
    "opt": lambda v: hf.OPTForCausalLM(
        hf.OPTConfig(**SIZE, vocab_size=v, ffn_dim=48, word_embed_proj_dim=32, pad_token_id=0)
    ),
    "moe": lambda v: hf.MixtralForCausalLM(
        hf.MixtralConfig(
            **SIZE,
            vocab_size=v,
            num_key_value_heads=2,
            intermediate_size=24,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
    ),
}


def build(kind: str, vocabulary: int = 64):
    "A small model whose blocks speak up (random ones add little to the stream), and its tokens."
    torch.manual_seed(0)
    model = MODELS[kind](vocabulary).eval().requires_grad_(False)
    for p in blocks(model).parameters():
        p.copy_(8 * p if p.ndim >= 2 else p + 0.1 * torch.randn(p.shape))
    return model, torch.randint(0, vocabulary, (12, 24), generator=torch.Generator().manual_seed(0))


def blocks(model):
    return model.get_submodule(stacks_of(model)[0])


def weights(model, *parts):
    "The weights of the linears whose names contain one of `parts` (none given: all)."
    found = [(n, weight_of(b, n)) for b in blocks(model) for n in linears_of(b)]
    return [w for n, w in found if not parts or any(p in n for p in parts)]


def norms(model):
    return [p for n, p in blocks(model).named_parameters() if p.ndim == 1 and "norm" in n and n.endswith("weight")]


def each(tensors, change):
    for t in tensors:
        change(t)


# --- damages: each changes the model in place, or gives other tokens --------------------------------------------------

EMBEDDING = lambda m: m.get_input_embeddings().weight
CASES = {}


def on_model(name, change):
    "A case that changes the model."
    CASES[name] = lambda m, t: (change(m), t)[1]


def on_tokens(name, change):
    "A case that changes the tokens."
    CASES[name] = lambda m, t: change(t)


def on_norms(name, change):
    on_model(name, lambda m: each(norms(m), change))


def on_weights(name, change, *parts, dtype=None):
    on_model(name, lambda m: (each(weights(m, *parts), change), m.to(dtype)))


def put(at, value):
    "Writes `value` at `at`."
    return lambda t: t.__setitem__(at, value)


def duplicate(model):
    EMBEDDING(model)[:, 1::2] = EMBEDDING(model)[:, ::2]
    each(norms(model), lambda t: t[1::2].copy_(t[::2]))


def route(factor):
    "The routers' weights times `factor`."
    return lambda m: each([p for n, p in m.named_parameters() if n.endswith("gate.weight")], lambda p: p.mul_(factor))


def unused(model, tokens):
    EMBEDDING(model)[63].fill_(float("nan"))
    return tokens.clamp(max=62)


on_tokens("healthy", lambda t: t)
on_norms("dead channels: a quarter of the norm weights 0", put(slice(None, None, 4), 0))
on_norms("dead channels: all but one", put(slice(1, None), 0))
on_norms("dead channels: all norm weights 0", put(slice(None), 0))
for size in (1e4, 1e8, 1e12, 1e18):
    on_norms(f"exploding channel: norm weight times {size:.0e}", lambda t, s=size: t[3].mul_(s))
for size in (1e4, 1e12):
    on_model(f"exploding channel of the embedding, times {size:.0e}", lambda m, s=size: EMBEDDING(m)[:, 5].mul_(s))
on_tokens("constant token stream", lambda t: torch.full_like(t, 7))
on_tokens("one sequence of three tokens", lambda t: t[:1, :3])
on_tokens("two tokens in all", lambda t: t[:1, :2])
on_tokens("two sequences, repeated", lambda t: t[[0, 1] * 6])
on_model("duplicate channels", duplicate)
on_weights("weights: every third row 0", put(slice(None, None, 3), 0))
on_weights("weights: every third column 0", lambda w: w[:, ::3].zero_())
on_weights("weights: all 0", lambda w: w.zero_())
on_weights("weights: queries and keys 0", lambda w: w.zero_(), "q_proj", "k_proj")
on_weights("weights: values 0", lambda w: w.zero_(), "v_proj")
on_weights("weights: all equal", lambda w: w.fill_(0.1))
on_weights("weights: equal within rows", lambda w: w.copy_(w[:, :1].expand_as(w)))
for size in (1e3, 1e9, 1e18, 1e30, 3e38):
    on_weights(f"one outlier of {size:.0e} in each weight", put((0, 0), size))
for size in (1e-42, 1e-38, 1e-30, 1e10, 1e30):
    on_weights(f"weights times {size:.0e}", lambda w, s=size: w.mul_(s))
on_weights("rows from 1e-20 to 1e10", lambda w: w.mul_(torch.logspace(-20, 10, len(w))[:, None]))
for size in (1e2, 1e6, 1e18):
    on_weights(f"queries and keys times {size:.0e}", lambda w, s=size: w.mul_(s), "q_proj", "k_proj")
on_weights("identical heads", lambda w: w.copy_(w[:8].repeat(len(w) // 8, 1)), "q_proj", "k_proj", "v_proj")
for value in (float("nan"), float("inf"), -float("inf")):
    on_weights(f"{value} in one weight", put((1, 1), value), "v_proj")
    on_norms(f"{value} in a norm", put(2, value))
    on_model(f"{value} in the embeddings", lambda m, v=value: EMBEDDING(m)[:9].fill_(v))
    on_model(f"{value} in the head", lambda m, v=value: m.get_output_embeddings().weight[1].fill_(v))
CASES["nan in an embedding that no token uses"] = unused
on_model("float16", lambda m: m.half())
on_model("bfloat16", lambda m: m.bfloat16())
on_weights("float16 that overflows in a block", lambda w: w.mul_(1e3), "down_proj", "fc2", "w2", dtype=torch.half)
on_model("float16 that overflows in the norms", lambda m: (EMBEDDING(m).mul_(2e4), m.half()))
on_weights("float16, outliers at its largest number", put(([0, 1], [0, 1]), 65504), dtype=torch.half)
on_weights("float16, both ends at its largest number", put((0, [0, 1]), torch.tensor([6e4, -6e4])), dtype=torch.half)
on_weights("float16, weights below its smallest number", lambda w: w.mul_(1e-7), dtype=torch.half)
on_model("bfloat16 with exploding channels", lambda m: (each(norms(m), lambda p: p[3].mul_(1e12)), m.bfloat16()))
on_model("experts: the router is blind", route(0))
on_model("experts: the router overflows", route(1e38))
on_tokens("tokens beyond the vocabulary", lambda t: t + 60)
on_tokens("negative tokens", lambda t: t - 1)
on_tokens("tokens that are no whole numbers", lambda t: t.float())
on_tokens("sequences of one token", lambda t: t[:, :1])
on_tokens("no sequence", lambda t: t[:0])
on_tokens("tokens without an axis of sequences", lambda t: t[0])
on_tokens("sequences longer than the model takes", lambda t: t.repeat(1, 4))
VOCABULARY = "a vocabulary of one token"
on_tokens(VOCABULARY, lambda t: t)


def damaged(kind: str, name: str):
    "The model and the tokens of a case."
    model, tokens = build(kind, 1 if name == VOCABULARY else 64)
    return model, CASES[name](model, tokens)


# --- the verdict ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def outputs(model, tokens):
    "What each block puts out, in float64."
    exact, found = copy.deepcopy(model).double(), []
    first = lambda out: out[0] if isinstance(out, tuple) else out
    if getattr(exact.config, "_experts_implementation", None):
        exact.set_experts_implementation("eager")  # the others know no float64
    for b in blocks(exact):
        b.register_forward_hook(lambda module, args, out: found.append(first(out)))
    exact(tokens, use_cache=False)
    return found


def error(full: list, model, tokens) -> float:
    "Relative squared errors of the blocks' outputs, summed; NaN if an output is not finite."
    sizes = [y.pow(2).sum() + torch.finfo(y.dtype).tiny for y in full]
    return float(sum((a - b).pow(2).sum() / s for a, b, s in zip(full, outputs(model, tokens), sizes)))


def one(kind: str, name: str, preset: str) -> dict:
    "Rounds one damaged model: what came of it."
    model, tokens = damaged(kind, name)
    full = copy.deepcopy(model)
    steps = dict(iterations=10) | (dict(tuning=4) if preset == "max" else {})
    start = time.perf_counter()
    try:
        report = quantize_model(model, tokens, AespaConfig.preset(preset, 2, **steps))
    except AespaError as e:
        return dict(end="refused", why=str(e), one_line="\n" not in str(e), seconds=time.perf_counter() - start)
    except Exception as e:
        return dict(end="traceback", why=f"{type(e).__name__}: {e}"[:200], where=traceback.format_exc()[-600:])
    finite = all(p.isfinite().all() for p in model.parameters())
    found = error(outputs(full, tokens), model, tokens)
    end = "rounded" if finite else "not finite"
    return dict(end=end, error=found, notes=report.notes, seconds=time.perf_counter() - start)


def judge(row: dict, rtn: dict) -> str:
    "What the row is worth beside that of round-to-nearest."
    if row["end"] != "rounded" or rtn["end"] != "rounded":
        return row["end"] if row.get("one_line", True) else "several lines"
    if row["error"] != row["error"]:
        return "rounded" if rtn["error"] != rtn["error"] else "not finite"  # the full model overflows by itself
    return "rounded" if row["error"] <= rtn["error"] * (1 + TOLERANCE) + 1e-12 else "worse"


def run(kinds, names, presets, show=True) -> list[dict]:
    "All cases; the row of round-to-nearest comes first."
    rows = []
    for kind in kinds:
        for name in names:
            rtn = one(kind, name, "rtn")
            for preset in presets:
                row = rtn if preset == "rtn" else one(kind, name, preset)
                row = dict(model=kind, case=name, preset=preset, **row, verdict=judge(row, rtn))
                row["ratio"] = row["error"] / rtn["error"] if row.get("error") and rtn.get("error") else None
                rows.append(row)
                if show:
                    print(f"{row['verdict']:11s} {kind:6s} {preset:9s} {name}: {said(row)}", flush=True)
    return rows


def said(row) -> str:
    "The rest of a line."
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f} of RTN's error; "
    return row.get("why") or ratio + "; ".join(row.get("notes", []))[:160]


def store(rows, kinds) -> None:
    "Writes the record; rows of other models stay in it."
    old = json.loads(STORED.read_text(encoding="utf-8"))["rows"] if STORED.exists() else []
    rows = [r for r in old if r["model"] not in kinds] + rows
    counts = {v: sum(r["verdict"] == v for r in rows) for v in sorted({r["verdict"] for r in rows})}
    about = dict(tolerance=TOLERANCE, cases=len(CASES), runs=len(rows), verdicts=counts)
    lines = ",\n".join(json.dumps({k: v for k, v in r.items() if k != "seconds"}) for r in rows)
    STORED.write_text(json.dumps(about)[:-1] + f', "rows": [\n{lines}\n]}}\n', encoding="utf-8")


BAD = ("worse", "not finite", "traceback", "several lines")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    args = parser.parse_args(argv)
    names = [n for n in CASES if args.only in n]
    warnings.simplefilter("error", RuntimeWarning)
    hf.utils.logging.set_verbosity_error()
    rows = run(args.models, names, args.presets)
    counts = {v: sum(r["verdict"] == v for r in rows) for v in sorted({r["verdict"] for r in rows})}
    print(f"{len(rows)} runs of {len(names)} cases: " + ", ".join(f"{n} {v}" for v, n in counts.items()))
    if not args.only and args.presets == list(PRESETS):
        store(rows, args.models)
    return int(any(r["verdict"] in BAD for r in rows))


if __name__ == "__main__":
    sys.exit(main())
