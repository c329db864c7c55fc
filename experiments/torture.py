"""Damaged models: each must end in a finite model no worse than round-to-nearest, or in one clear line.

To nbs/runs/torture.json; `one(model, case, preset)` is one of them. What "no worse" means: the squared error of every
block's output on the calibration tokens, relative to the output, summed over blocks, against that of the preset rtn;
up to `TOLERANCE`. Everything is measured in float64.
"""

import copy
import math
import sys
import traceback
import warnings

import torch
import transformers as hf
from aespa_nb import PRESETS, AespaConfig, AespaError, quantize_model
from aespa_nb.model.blocks import linears_of, stacks_of, weight_of
from common import resume

SMALL = 1e-4  # a relative squared error that nobody sees: there the order of two presets says nothing
TOLERANCE = 0.02
BAD = ("worse", "not finite", "traceback", "several lines")
SIZE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32)
MODELS = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, dict(num_key_value_heads=2, intermediate_size=48)),
    "opt": (hf.OPTForCausalLM, hf.OPTConfig, dict(ffn_dim=48, word_embed_proj_dim=32, pad_token_id=0)),
    "moe": (hf.MixtralForCausalLM, hf.MixtralConfig, dict(
        num_key_value_heads=2, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2)),
}  # fmt: skip


def blocks(model):
    return model.get_submodule(stacks_of(model)[0])


def build(kind: str, vocabulary: int = 64):
    "A small model whose blocks speak up (random ones add little to the stream), and its tokens."
    torch.manual_seed(0)
    model, config, more = MODELS[kind]
    model = model(config(**SIZE, **more, vocab_size=vocabulary)).eval().requires_grad_(False)
    for p in blocks(model).parameters():
        p.copy_(8 * p if p.ndim >= 2 else p + 0.1 * torch.randn(p.shape))
    return model, torch.randint(0, vocabulary, (12, 24), generator=torch.Generator().manual_seed(0))


# --- damages: each changes the model in place, or gives other tokens --------------------------------------------------


def embedding(model):
    return model.get_input_embeddings().weight


def norms(model):
    return [p for n, p in blocks(model).named_parameters() if p.ndim == 1 and "norm" in n and n.endswith("weight")]


each = lambda tensors, change: [change(t) for t in tensors]
on_model = lambda change: lambda m, t: (change(m), t)[1]
on_tokens = lambda change: lambda m, t: change(t)
on_norms = lambda change: on_model(lambda m: each(norms(m), change))
on_routers = lambda change: on_model(lambda m: each((p for n, p in m.named_parameters() if "gate.weight" in n), change))
put = lambda at, value: lambda t: t.__setitem__(at, value)
times = lambda size: lambda t: t.mul_(size)


def on_weights(change, *parts, dtype=None):
    "Changes the weights of the linears whose names contain one of `parts` (none given: all), then the model's type."
    named = lambda n: not parts or any(part in n for part in parts)
    found = lambda m: [weight_of(b, n) for b in blocks(m) for n in linears_of(b) if named(n)]
    return on_model(lambda m: (each(found(m), change), m.to(dtype)))


def duplicate(model):
    embedding(model)[:, 1::2] = embedding(model)[:, ::2]
    each(norms(model), lambda t: t[1::2].copy_(t[::2]))


VOCABULARY = "a vocabulary of one token"
CASES = {
    "healthy": on_tokens(lambda t: t),
    "dead channels: a quarter of the norm weights 0": on_norms(put(slice(None, None, 4), 0)),
    "dead channels: all norm weights 0": on_norms(put(slice(None), 0)),
    **{f"exploding channel: norm weight times {s:.0e}": on_norms(lambda t, s=s: t[3].mul_(s))
       for s in (1e4, 1e8, 1e12, 1e18)},
    "constant token stream": on_tokens(lambda t: torch.full_like(t, 7)),
    "one sequence of three tokens": on_tokens(lambda t: t[:1, :3]),
    "duplicate channels": on_model(duplicate),
    "weights: every third column 0": on_weights(put((slice(None), slice(None, None, 3)), 0)),
    "weights: all 0": on_weights(times(0)),
    "weights: all equal": on_weights(put(slice(None), 0.1)),
    "weights: equal within rows": on_weights(lambda w: w.copy_(w[:, :1].expand_as(w))),
    **{f"one outlier of {s:.0e} in each weight": on_weights(put((0, 0), s)) for s in (1e3, 1e9, 1e18, 1e30, 3e38)},
    **{f"weights times {s:.0e}": on_weights(times(s)) for s in (1e-42, 1e-38, 1e-30, 1e10, 1e30)},
    **{f"queries and keys times {s:.0e}": on_weights(times(s), "q_proj", "k_proj") for s in (1e2, 1e6, 1e18)},
    "identical heads": on_weights(lambda w: w.copy_(w[:8].repeat(len(w) // 8, 1)), "q_proj", "k_proj", "v_proj"),
    **{f"{v} in {where}": f(v) for v in (math.nan, math.inf, -math.inf) for where, f in {
        "one weight": lambda v: on_weights(put((1, 1), v), "v_proj"),
        "a norm": lambda v: on_norms(put(2, v)),
        "the embeddings": lambda v: on_model(lambda m: embedding(m)[:9].fill_(v)),
        "the head": lambda v: on_model(lambda m: m.get_output_embeddings().weight[1].fill_(v))}.items()},
    "nan in an embedding that no token uses": lambda m, t: (embedding(m)[63].fill_(math.nan), t.clamp(max=62))[1],
    "float16": on_model(lambda m: m.half()),
    "bfloat16": on_model(lambda m: m.bfloat16()),
    "float16 that overflows in a block": on_weights(times(1e3), "down_proj", "fc2", "w2", dtype=torch.half),
    "float16 that overflows in the norms": on_model(lambda m: (embedding(m).mul_(2e4), m.half())),
    "float16, both ends at its largest number": on_weights(
        put((0, [0, 1]), torch.tensor([6e4, -6e4])), dtype=torch.half),
    "float16, weights below its smallest number": on_weights(times(1e-7), dtype=torch.half),
    "bfloat16 with exploding channels": on_model(lambda m: (each(norms(m), lambda p: p[3].mul_(1e12)), m.bfloat16())),
    "experts: the router is blind": on_routers(times(0)),
    "experts: the router overflows": on_routers(times(1e38)),
    "tokens beyond the vocabulary": on_tokens(lambda t: t + 60),
    "negative tokens": on_tokens(lambda t: t - 1),
    "tokens that are no whole numbers": on_tokens(lambda t: t.float()),
    "sequences of one token": on_tokens(lambda t: t[:, :1]),
    "no sequence": on_tokens(lambda t: t[:0]),
    "sequences longer than the model takes": on_tokens(lambda t: t.repeat(1, 4)),
    VOCABULARY: on_tokens(lambda t: t),
}  # fmt: skip


# --- the verdict ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def outputs(model, tokens):
    "What each block puts out, in float64."
    exact, found = copy.deepcopy(model).double(), []
    if getattr(exact.config, "_experts_implementation", None):
        exact.set_experts_implementation("eager")  # the others know no float64
    for b in blocks(exact):
        b.register_forward_hook(lambda module, args, out: found.append(out[0] if isinstance(out, tuple) else out))
    exact(tokens, use_cache=False)
    return found


def one(kind: str, name: str, preset: str) -> dict:
    "Rounds one damaged model: what came of it. `error`: relative, summed over blocks, NaN if an output is not finite."
    model, tokens = build(kind, 1 if name == VOCABULARY else 64)
    tokens = CASES[name](model, tokens)
    full, steps = copy.deepcopy(model), dict(iterations=10) | (dict(end_to_end=4) if preset == "max" else {})
    try:
        report = quantize_model(model, tokens, AespaConfig.preset(preset, 2, **steps))
    except AespaError as e:
        return dict(end="several lines" if "\n" in str(e) else "refused", why=str(e))
    except Exception:
        return dict(end="traceback", why=traceback.format_exc()[-600:])
    finite = all(p.isfinite().all() for p in model.parameters())
    pairs = zip(outputs(full, tokens), outputs(model, tokens))
    error = sum((y - z).pow(2).sum() / (y.pow(2).sum() + torch.finfo(y.dtype).tiny) for y, z in pairs)
    return dict(end="rounded" if finite else "not finite", error=float(error), notes=report.notes)


def judge(row: dict, rtn: dict) -> str:
    "What the row is worth beside that of round-to-nearest."
    if row["end"] != "rounded" or rtn["end"] != "rounded":
        return row["end"]
    if math.isnan(row["error"]):
        return "rounded" if math.isnan(rtn["error"]) else "not finite"  # the full model overflows by itself
    return "rounded" if row["error"] <= rtn["error"] * (1 + TOLERANCE) + SMALL else "worse"


def all_presets(job: dict) -> dict:
    """One damaged model with each preset: who came to which end, what was said, and the errors relative to
    round-to-nearest's, where one of the two is large enough to be seen."""
    rows = {preset: one(job["model"], job["case"], preset) for preset in PRESETS}
    rtn, ends, said = rows["rtn"], {}, [row.get("why") or "; ".join(row["notes"])[:160] for row in rows.values()]
    for preset, row in rows.items():
        verdict = judge(row, rtn)
        ends[verdict] = f"{ends.get(verdict, '')} {preset}".strip()
    errors = {preset: row["error"] for preset, row in rows.items() if row.get("error") and rtn.get("error")}
    seen = {preset: error for preset, error in errors.items() if max(error, rtn["error"]) > SMALL}
    ratios = {preset: float(f"{error / rtn['error']:.4g}") for preset, error in seen.items()}
    return dict(ends=ends, ratios=ratios, said=list(dict.fromkeys(filter(None, said))))


if __name__ == "__main__":
    warnings.simplefilter("error", RuntimeWarning)
    hf.utils.logging.set_verbosity_error()
    jobs = [dict(model=k, case=name) for k in MODELS for name in CASES if k == "moe" or "experts" not in name]
    found = resume("torture", jobs, all_presets, whole=True)
    bad = [r for r in found if set(BAD) & set(r["ends"])]
    print(*bad, f"{len(found)} damaged models, {len(bad)} bad ends", sep="\n")
    sys.exit(bool(bad))
