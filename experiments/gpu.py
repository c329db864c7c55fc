"""On a GPU: the descent beside the CPU's, SmolLM2 as a whole, blocks of LLaMA-7B's shape; to nbs/runs/gpu.json.

    python experiments/gpu.py                        everything: ten minutes of an H200
    python experiments/gpu.py kernels blocks         some of it
    python experiments/gpu.py --device cpu --small   the same code without a GPU, in small; printed, not stored

For the model, `aespa_nb fetch smollm2` and `aespa_nb fetch handbook` first (make smollm2).
"""

import argparse
import json
from functools import partial

import torch
from aespa_nb import AespaConfig, evaluate_model, quantize_model
from aespa_nb.experiments.cost import SHAPES, TOKEN_PHASES, device_clock, flop_counter, random_model
from aespa_nb.model.phases import timed
from aespa_nb.rounding.descent import descend
from aespa_nb.rounding.grid import minmax_grid
from common import resume, windows_of

TEXT = "handbook", 32, 512, 12  # calibration windows, their tokens, windows that measure
PROBLEMS = (1, 576, 576), (9, 64, 576), (1, 1536, 576), (1, 576, 1536), (32, 128, 4096)  # heads, rows, inputs
MODELS = [  # preset, bits, inputs that share a scale, precision of float32 products
    *((preset, *form, "highest") for form in ((3, None), (2, 64)) for preset in ("best", "aespa", "adaround", "gptq")),
    ("best", 3, None, "high"),
]
BLOCKS = [("gptq", "high"), ("aespa", "high"), ("best", "high"), ("best", "highest")]


def problem(heads, rows, inp):
    "Weights, correlated inputs, and for several heads a coupling of their rows."
    draw = torch.Generator().manual_seed(0)
    shape = (heads,) if heads > 1 else ()
    W, X = (torch.randn(*shape, *size, generator=draw) for size in ((rows, inp), (inp, 2 * inp)))
    X = X * torch.linspace(0.2, 2, inp)[:, None] + X.mean(-2, keepdim=True) * 3
    Y = torch.randn(*shape, rows, 4 * rows, generator=draw)
    return W, X @ X.mT / X.shape[-1], Y @ Y.mT / Y.shape[-1] if heads > 1 else None


def kernels(job, device, small):
    "A descent on the device and on one thread of the CPU: seconds, codes that differ, loss over the CPU's."
    parts, found, out = problem(*(max(1, n // 8) for n in job["problem"]) if small else job["problem"]), {}, {}
    for place in dict.fromkeys((device, "cpu")):
        W, H, G = (None if t is None else t.to(place) for t in parts)
        run = partial(descend, W, minmax_grid(W, 2), H, G, worth=0)
        run(sweeps=(1, 1))  # compiles
        clock = device_clock(torch.device(place))
        start = clock()
        singles = run(sweeps=(3, 0))
        middle = clock()
        found[place] = run(start=singles.codes, sweeps=(0, 3))
        out[place] = dict(singles=middle - start, chains=clock() - middle)
    here, there = found[device], found["cpu"]
    other = (here.codes.cpu() != there.codes).double().mean().item()
    return dict(places=out, other_codes=other, loss=here.loss / there.loss)


def model(job, device, small):
    "SmolLM2 rounded as a whole: scores, seconds of each phase, memory."
    name, *text = ("reference", "reference", 4, 64, 2) if small else ("smollm2", *TEXT)
    full, rounded = windows_of(name, *text), windows_of(name, *text).model.to(device)
    changes = dict(iterations=20) if small else {}
    config = AespaConfig.preset(job["preset"], job["bits"], group_size=job["group_size"], batch_size=8, **changes)
    torch.set_float32_matmul_precision(job["products"])
    with timed(device_clock(torch.device(device))) as seconds:
        report = quantize_model(rounded, full.calib, config)
    torch.set_float32_matmul_precision("highest")
    scores = evaluate_model(rounded, full.heldout, full.model.to(device))._asdict()
    return dict(scores, seconds=sum(seconds.values()), phases=seconds, peak_GiB=report.peak_bytes / 2**30, text=text)


def blocks(job, device, small):
    "A block with random weights: seconds and operations of each phase, memory; seconds of as many as the model has."
    shape, seqs, length = ("tiny", 4, 32) if small else ("llama-7b", job["seqs"], 2048)
    tokens = torch.randint(0, 256, (seqs, length), generator=torch.Generator().manual_seed(0))
    recipe = partial(AespaConfig.preset, job["preset"], 2, batch_size=1)
    random = partial(random_model, shape, seqlen=length)
    torch.set_float32_matmul_precision(job["products"])
    with timed(device_clock(torch.device(device))) as seconds:
        report = quantize_model(random(blocks=1).to(device), tokens, recipe(iterations=20 if small else 500))
    with flop_counter() as counter, timed(counter.get_total_flops) as flops:
        quantize_model(random(blocks=1).to(device), tokens[:2], recipe(iterations=20))
    torch.set_float32_matmul_precision("highest")
    flops = {name: n * (seqs / 2 if name in TOKEN_PHASES else 1) for name, n in flops.items()}
    whole = SHAPES[shape]["num_hidden_layers"] * sum(seconds.values())
    return dict(whole=whole, phases=seconds, flops=flops, peak_GiB=report.peak_bytes / 2**30)


PARTS = {
    kernels: [dict(problem=list(p)) for p in PROBLEMS],
    model: [dict(zip(("preset", "bits", "group_size", "products"), m)) for m in MODELS],
    blocks: [dict(preset=preset, products=products, seqs=128) for preset, products in BLOCKS],
}


def measure(part, device, small, job):
    card = torch.cuda.get_device_name() if device == "cuda" else "none"
    return dict(card=card, torch=torch.__version__, **part(job, device, small))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[part.__name__ for part in PARTS])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    for part in (part for part in PARTS if part.__name__ in args.parts):
        jobs = [dict(part=part.__name__, **job) for job in PARTS[part]]
        run = partial(measure, part, args.device, args.small)
        if args.small:
            print(*(json.dumps(job | run(job)) for job in jobs[:2]), sep="\n")
        else:
            resume("gpu", jobs, run)
