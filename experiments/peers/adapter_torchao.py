"""torchao: weight-only rounding of 1 to 8 bits, without data.

This is round-to-nearest on the full range of each row or group; nothing had to be patched. The package's half-quadratic
fit of the steps is for symmetric grids only, and its GPTQ prototype knows no grid of 2 or 3 bits.
"""

import torch
from common import linear_weights, main
from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerAxis, PerGroup, quantize_


def quantize(model, tokenizer, tokens, job):
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{job.bits}"),
        granularity=PerGroup(job.group_size) if job.group_size else PerAxis(0),
        mapping_type=MappingType.ASYMMETRIC,
    )
    in_blocks = lambda module, name: isinstance(module, torch.nn.Linear) and name != "lm_head"
    quantize_(model, config, filter_fn=in_blocks)
    return model


def dense(model, job):
    return {name: W.dequantize() for name, W in linear_weights(model, job).items()}


if __name__ == "__main__":
    main(quantize, dense)
