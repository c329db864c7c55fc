"""HQQ: half-quadratic fit of the zero-points, layer by layer, without data.

Steps and zero-points are kept in float32; zero-points need not be whole numbers, HQQ's own default at 2 and 3 bits.
Nothing had to be patched. A row without groups is given as one group as long as the row, because unpacking 3-bit codes
asks for a group size.
"""

import torch
from common import linears, main
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear


def quantize(model, tokenizer, tokens, job):
    return {name: rounded(linear, job) for name, linear in linears(model)}


def rounded(linear, job):
    "The layer in HQQ's form, on the CPU."
    config = BaseQuantizeConfig(nbits=job.bits, group_size=job.group_size or linear.in_features, axis=1)
    return HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu", del_orig=False)


def dense(layers, job):
    return {f"{name}.weight": layer.dequantize() for name, layer in layers.items()}


if __name__ == "__main__":
    main(quantize, dense)
