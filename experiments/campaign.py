"""Hours on one core, for the chapters on ablations and on Kronecker losses: `make records`.

python experiments/campaign.py ablations      parts of the recipe on and off; nbs/runs/campaign.json
python experiments/campaign.py layers         the two solvers on the loss of every layer; nbs/runs/layers.json
python experiments/campaign.py precompute     a learning step with the data and without; nbs/runs/precompute.json
"""

import argparse
import contextlib
import time
from dataclasses import replace

import torch
from aespa_nb import AespaConfig, load_reference
from aespa_nb.attention.block_error import AttentionBlock, refined_v_loss
from aespa_nb.attention.forward import causal_mask, rope_cos_sin
from aespa_nb.attention.kronecker_losses import AttentionStatistics
from aespa_nb.experiments.comparison import drawing
from aespa_nb.model.capture import capturing
from aespa_nb.model.statistics import block_losses
from aespa_nb.model.stream import BlockStream
from aespa_nb.quantize.config import SOLVERS
from aespa_nb.rounding.adaround import adaround
from aespa_nb.rounding.descent import descend
from aespa_nb.rounding.gptq import gptq
from aespa_nb.rounding.grid_search import fit_grid
from common import SAMPLES, resume, rounded, stamp

ABLATIONS = {  # name -> (preset, changes); the first six change objective and solver alone
    **{f"{o}, {s}": ("gptq", dict(objective=o, solver=s)) for o in ("layer", "attention", "gauss-newton")
       for s in ("gptq", "descent")},
    "best, no target": ("best", dict(correction=0.0)),  # the last of these with more damping
    "best": ("best", {}),  # the same with the full-precision target
    "best, end loss": ("best", dict(end_loss=True)),
    "best, scales end to end": ("best", dict(end_to_end=100)),
    "max": ("max", {}),  # best with both
    "best, scales of each block": ("best", dict(tuning=40)),
    **{f"{preset}, searched grid": (preset, dict(grid="hessian")) for preset in ("best", "adaround", "aespa")},
    "best, layer-wise objective, searched grid": ("best", dict(objective="layer", grid="hessian")),
    **{preset: (preset, {}) for preset in ("adaround", "aespa")},
    "aespa, 2000 steps": ("aespa", dict(iterations=2000)),
    "best, layer-wise objective": ("best", dict(objective="layer")),
    "best, the paper's objective": ("best", dict(objective="attention")),
    "best, damping 0.01": ("best", dict(damping=0.01, pseudo_tokens=0.0)),
    "best, damping 0.07": ("best", dict(damping=0.07, pseudo_tokens=0.0)),
    "best, 5 pseudo-tokens": ("best", dict(pseudo_tokens=5.0)),
    "best, full correction": ("best", dict(correction=1.0)),
    "best, three starts": ("best", dict(solver="several starts")),
    "best, Z-Fold": ("best", dict(zfold=True)),
    **{f"best, {n} windows{name}": ("best", dict(samples=n, **changes)) for n in (8, 16, 32, 256) for name, changes in (
       ("", {}), (", damping 0.07", dict(damping=0.07, pseudo_tokens=0.0)))},
}  # fmt: skip


def several_starts(U, grid, loss, config):
    "Descents from three grids; each row, or each head that has a G, keeps the lowest."
    grids = [replace(grid, scale=factor * grid.scale) for factor in (1, 0.87, 1.15)]
    ends = [descend(U, g, loss.H, loss.G, gptq(U, loss.H, g).codes) for g in grids]
    best = torch.stack([end.losses[-1] for end in ends]).argmin(0)
    best = best.view(*best.shape, *[1] * (U.ndim - best.ndim))
    pick = lambda parts: sum(torch.where(best == i, part, 0) for i, part in enumerate(parts))
    return pick(end.codes for end in ends), replace(grid, scale=pick(end.grid.scale for end in ends))


SOLVERS["several starts"] = several_starts


def ablations(reference):
    "Each recipe, a preset with changes, at 2 bits."
    jobs = [dict(name=name, bits=2, seed=0, preset=preset, changes=new) for name, (preset, new) in ABLATIONS.items()]

    def run(job):
        fields = dict(samples=SAMPLES) | job["changes"]
        return rounded(reference, AespaConfig.preset(job["preset"], job["bits"], seed=job["seed"], **fields))[2]

    resume("campaign", jobs, run, whole=True)


def layer_losses(reference, recipe):
    "The losses of every layer of the full-precision model: (name, weight, loss)."
    model, stream = reference.model, BlockStream(reference.model, drawing(reference.calib, 32)(0), 1)
    with torch.no_grad(), capturing(model), contextlib.closing(stream):
        for i, block in enumerate(model.model.layers):
            for name, loss in block_losses(model, block, stream, recipe.objective).losses.items():
                yield f"{i}.{name}", block.get_submodule(name).weight, loss.damped(recipe.damping)
            stream.run(block, keep=True)


def timed(f):
    start = time.process_time()
    return f(), time.process_time() - start


@torch.no_grad()
def solvers(W, loss, recipe) -> dict:
    "What GPTQ, then AdaRound and descent from there reach on one layer; `same_grid`: scales not refitted."
    U = loss.split(W)
    grid = fit_grid(U, loss.H, recipe.bits)
    start = gptq(U, loss.H, grid)
    value = lambda codes: float(loss(grid.values(codes) - U))
    learn = lambda: adaround(U, grid, loss, start.W_comp, recipe.iterations, 0.015, loss_scale=recipe.loss_scale)
    learned, learning = timed(learn)
    free, descending = timed(lambda: descend(U, grid, loss.H, loss.G, start.codes))
    fixed = descend(U, grid, loss.H, loss.G, start.codes, refit=False)
    found = dict(gptq=value(start.codes), adaround=value(learned), same_grid=fixed.loss, descent=free.loss)
    return found | dict(adaround_seconds=learning, descent_seconds=descending, made=stamp(recipe))


def layers(reference):
    recipe = AespaConfig.preset("aespa", 2, iterations=2000)
    for name, *problem in layer_losses(reference, recipe):
        resume("layers", [dict(layer=name, bits=2)], lambda job, problem=problem: solvers(*problem, recipe))


def precompute(reference, steps: int = 20):
    "CPU seconds of an AdaRound step on W_V of the first block, on both forms of its loss, and of the statistics."
    block, config = reference.model.model.layers[0], reference.model.config
    weights = [getattr(block.self_attn, f"{x}_proj").weight.detach() for x in "qkvo"]
    rope, W = tuple(t.float() for t in rope_cos_sin(256, config.head_dim)), weights[2]
    n_heads, n_kv = config.num_attention_heads, config.num_key_value_heads
    heads = AttentionBlock(*weights, n_heads, n_kv, rope, causal_mask(256).float())

    def run(job):
        with torch.no_grad():
            tokens = reference.calib[: job["sequences"]]
            X = block.input_layernorm(reference.model.model.embed_tokens(tokens)).mT.contiguous()
        seen = heads(X)
        statistics = AttentionStatistics((n_heads, n_kv, len(W) // n_kv, W.shape[1]))
        batches = zip(*(t.split(1) for t in (X, seen.Q, seen.K, seen.A)))
        _, once = timed(lambda: [statistics.add(*batch) for batch in batches])
        loss = statistics.losses()["v"]
        grid = fit_grid(W, loss.H.mean(0), 2)
        form = lambda dW: refined_v_loss(dW, X, seen.A, n_kv)
        from_data, data = timed(lambda: adaround(W, grid, form, iterations=steps))
        by_head = replace(grid, scale=grid.scale.view(n_kv, -1, 1), zero=grid.zero.view(n_kv, -1, 1))
        from_matrix, matrix = timed(lambda: adaround(loss.split(W), by_head, loss, iterations=steps))
        assert (from_data == from_matrix.view_as(from_data)).float().mean() > 0.99  # the same learning
        return dict(tokens=tokens.numel(), data=data / steps, precomputed=matrix / steps, statistics=once)

    resume("precompute", [dict(sequences=2**i) for i in range(7)], run)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("ablations", "layers", "precompute"))
    globals()[parser.parse_args().which](load_reference())
