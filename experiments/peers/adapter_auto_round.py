"""AutoRound: signed gradient descent through whole blocks on rounding offsets and clipping ranges.

Nothing had to be patched. AutoRound casts the model to bfloat16 where the processor supports it and leaves the
dequantized weights in that type; we divide them by the steps it stores and put them back on the exact grid, which is
what a packed checkpoint would hold. It compiles its rounding functions with torch.compile unless told not to.
Layers whose sizes are not multiples of 32 stay in full precision; the reference model has none.
"""

import torch
from auto_round import AutoRound
from common import linears, main, per_input


def quantize(model, tokenizer, tokens, job):
    tuner = AutoRound(
        model,
        tokenizer=tokenizer,
        bits=job.bits,
        group_size=job.group_size or -1,
        dataset=list(tokens.split(1)),
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        seed=job.seed,
        device_map="cpu",
        **{"sym": False, **job.settings},
    )
    return tuner.quantize()[0]


def dense(model, job):
    "The weights on the grid that AutoRound chose."
    return {f"{name}.weight": on_grid(linear) for name, linear in linears(model)}


def on_grid(linear):
    W = linear.weight.detach().float()
    scale = per_input(linear.scale, W)
    return scale * torch.round(W / scale)


if __name__ == "__main__":
    main(quantize, dense)
