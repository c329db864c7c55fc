"""Long measurements behind chapters 10 and 32: `make campaign`, hours on one core. Runs on record are not repeated.

Each run quantizes the bundled model on 64 calibration sequences, one CPU thread, and is measured on the first 128
held-out windows. One JSON record per run goes to nbs/runs/campaign.json; the chapters draw their tables from there.
`layers` compares the two solvers on the loss of every layer instead, in nbs/runs/layers.json; `precompute` times the
same learning with the data in the loop and without, in nbs/runs/precompute.json.
"""

import argparse
import contextlib
import copy
import json
import os
import platform
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from aespa_nb import AespaConfig, evaluate_model, load_reference, quantize_model
from aespa_nb.rounding.adaround import adaround
from aespa_nb.quantize.model import block_losses
from aespa_nb.attention.forward import causal_mask, rope_cos_sin
from aespa_nb.model.capture import capturing
from aespa_nb.model.stream import BlockStream
from aespa_nb.quantize.journal import write_json
from aespa_nb.rounding.descent import descend
from aespa_nb.rounding.gptq import gptq
from aespa_nb.rounding.grid_search import fit_grid
from aespa_nb.attention.kronecker_losses import AttentionStatistics
from aespa_nb.attention.block_error import AttentionBlock, refined_v_loss

RESULTS, LAYERS, PRECOMPUTE = (Path(f"nbs/runs/{name}.json") for name in ("campaign", "layers", "precompute"))
SAMPLES, WINDOWS = 64, 128

# (name, preset, changes): what the ablation chapter compares. The first six change objective and solver alone.
ABLATIONS = [
    *(
        (f"{objective}, {solver}", "gptq", dict(objective=objective, solver=solver))
        for objective in ("layer", "attention", "gauss-newton")
        for solver in ("gptq", "descent")
    ),
    ("damping 0.05", "gptq", dict(objective="gauss-newton", solver="descent", damping=0.05)),
    ("full-precision target", "gptq", dict(objective="gauss-newton", solver="descent", damping=0.05, correction=0.8)),
    ("best", "best", {}),
    ("best, layer-wise objective", "best", dict(objective="layer")),
    ("best, the paper's objective", "best", dict(objective="attention")),
    ("best, damping 0.01", "best", dict(damping=0.01)),
    ("best, damping 0.1", "best", dict(damping=0.1)),
    ("best, no target", "best", dict(correction=0.0)),
    ("best, whole drift undone", "best", dict(correction=1.0)),
    ("best, one start", "best", dict(starts=1)),
    ("best, six starts", "best", dict(starts=6)),
    ("best, Z-Fold", "best", dict(zfold=True)),
    ("max", "max", {}),
]


def plan():
    "Runs in the order of their weight: (group, name, bits, group_size, seed, preset, changes)."
    for seed in (0, 1):
        yield from (("ablations", n, 2, None, seed, p, c) for n, p, c in ABLATIONS)


def load() -> list[dict]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def save(record: dict) -> None:
    "Adds a record: the file is written beside the old one, then takes its place."
    write_json(RESULTS, [*load(), record])


def run(reference, group, name, bits, group_size, seed, preset, changes) -> dict:
    config = AespaConfig.preset(preset, bits, group_size=group_size, seed=seed, samples=SAMPLES, **changes)
    model = copy.deepcopy(reference.model)
    start = time.process_time()
    report = quantize_model(model, reference.calib, config)
    seconds = time.process_time() - start
    scores = evaluate_model(model, reference.heldout[:WINDOWS], reference.model)
    measured = dict(**scores._asdict(), cpu_seconds=seconds, peak_MiB=report.peak_bytes / 2**20)
    versions = dict(torch=torch.__version__, python=platform.python_version(), threads=torch.get_num_threads())
    what = dict(group=group, name=name, bits=bits, group_size=group_size, seed=seed, preset=preset)
    return dict(**what, changes=changes, **measured, **versions)


def layer_losses(reference, seed: int = 0):
    "The pre-computed losses of every layer of the full-precision model: (name, weight, loss)."
    model = reference.model
    config = AespaConfig.preset("aespa")
    tokens = reference.calib[torch.randperm(len(reference.calib), generator=torch.Generator().manual_seed(seed))][:32]
    with torch.no_grad(), capturing(model), contextlib.closing(BlockStream(model, tokens, 1)) as stream:
        for i, block in enumerate(model.model.layers):
            losses = block_losses(model, block, stream, config.objective).losses
            for name, loss in losses.items():
                yield f"{i}.{name}", block.get_submodule(name).weight, loss.damped(config.damping)
            stream.run(block, keep=True)


def timed(f):
    start = time.process_time()
    return f(), time.process_time() - start


@torch.no_grad()
def compare(W, loss, bits: int) -> dict:
    "What GPTQ, then AdaRound (2000 scales) and descent from there reach on one layer; `same_grid`: scales not refitted."
    U, recipe = loss.split(W), AespaConfig.preset("aespa", bits)
    grid = fit_grid(U, loss.H, bits)
    start = gptq(U, loss.H, grid)
    value = lambda codes: float(loss(grid.values(codes) - U))
    learn = lambda: adaround(U, grid, loss, start.W_comp, recipe.iterations, 0.015, loss_scale=recipe.loss_scale)
    learned, learning = timed(learn)
    free, descending = timed(lambda: descend(U, grid, loss.H, loss.G, start.codes))
    fixed = descend(U, grid, loss.H, loss.G, start.codes, refit=False)
    found = dict(gptq=value(start.codes), adaround=value(learned), same_grid=fixed.loss, descent=free.loss)
    return found | dict(adaround_seconds=learning, descent_seconds=descending)


def compare_solvers(reference, bits: int) -> None:
    "Compares on every layer of the model; to nbs/runs/layers.json."
    rows = []
    for name, W, loss in layer_losses(reference):
        rows.append(dict(layer=name, bits=bits, **compare(W, loss, bits)))
        print(*(f"{v:.5g}" if isinstance(v, float) else v for v in rows[-1].values()), flush=True)
    kept = [r for r in json.loads(LAYERS.read_text()) if r["bits"] != bits] if LAYERS.exists() else []
    write_json(LAYERS, kept + rows)


def learning_steps(reference, counts=(1, 2, 4, 8, 16, 32, 64), steps: int = 20) -> None:
    "Seconds of one learning step of W_V in the first block: with the data, and with its matrix; to PRECOMPUTE."
    block, config = reference.model.model.layers[0], reference.model.config
    attention, rows = block.self_attn, []
    weights = [getattr(attention, f"{x}_proj").weight.detach() for x in "qkvo"]
    rope = tuple(t.float() for t in rope_cos_sin(256, config.head_dim))
    counted = config.num_attention_heads, config.num_key_value_heads
    heads = AttentionBlock(*weights, *counted, rope, causal_mask(256).float())
    for n in counts:
        with torch.no_grad():
            X = block.input_layernorm(reference.model.model.embed_tokens(reference.calib[:n])).mT.contiguous()
        rows.append(dict(sequences=n, tokens=n * 256, **step_seconds(heads, X, weights[2], steps)))
        print(*(f"{k} {v:.4g}" for k, v in rows[-1].items()), flush=True)
    write_json(PRECOMPUTE, rows)


def step_seconds(heads, X, W, steps: int) -> dict:
    "The same AdaRound scales on both forms of the V loss; CPU seconds of one scale, and of the statistics."
    seen, n_kv = heads(X), heads.n_kv_heads
    A = seen.A
    form = lambda dW: refined_v_loss(dW, X, A, n_kv)
    statistics = AttentionStatistics(heads.n_heads, n_kv, len(W) // n_kv, W.shape[1], None)
    batches = zip(*(t.split(1) for t in (X, seen.Q, seen.K, A)))
    _, once = timed(lambda: [statistics.add(*batch) for batch in batches])
    loss = statistics.losses()["v"]
    grid = fit_grid(W, loss.H.mean(0), 2)
    from_data, data = timed(lambda: adaround(W, grid, form, iterations=steps))
    split = loss.split(W)
    by_head = replace(grid, scale=grid.scale.view(n_kv, -1, 1), zero=grid.zero.view(n_kv, -1, 1))
    from_matrix, matrix = timed(lambda: adaround(split, by_head, loss, iterations=steps))
    assert (from_data == from_matrix.view_as(from_data)).float().mean() > 0.99  # the same learning
    return dict(data=data / steps, precomputed=matrix / steps, statistics=once)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("ablations", "layers", "precompute"))
    parser.add_argument("--bits", type=int, nargs="+", help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these")
    parser.add_argument("--names", nargs="+", help="only these")
    args = parser.parse_args()
    torch.set_num_threads(1)
    reference = load_reference()
    if args.which == "layers":
        for bits in args.bits or (2, 3):
            compare_solvers(reference, bits)
        return
    if args.which == "precompute":
        return learning_steps(reference)
    keys = ("group", "name", "bits", "group_size", "seed")
    for item in plan():
        chosen = zip((item[2], item[4], item[1]), (args.bits, args.seeds, args.names))
        if any(wanted and value not in wanted for value, wanted in chosen):
            continue
        if item[:5] in {tuple(r[k] for k in keys) for r in load()}:
            continue
        record = run(reference, *item)
        save(record)
        print(*item[:5], f"KL {record['kl']:.4f}  {record['cpu_seconds']:.0f} CPU s", flush=True)


if __name__ == "__main__":
    main()
