"""torchao: weight-only rounding of 1 to 8 bits, without data.

`default` is round-to-nearest on the full range of each row or group; nothing had to be patched. `hqq` is the package's
half-quadratic fit of the steps alone, which is symmetric by construction. Its GPTQ prototype knows 4 and 8 bits only,
in formats that need a GPU.
"""

import torch
from common import linear_weights, main
from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerAxis, PerGroup, quantize_
from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm


def quantize(model, tokenizer, tokens, job):
    fit = IntxChooseQParamsAlgorithm(job.settings.get("algorithm", "affine"))
    symmetric = fit is IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{job.bits}"),
        granularity=PerGroup(job.group_size) if job.group_size else PerAxis(0),
        mapping_type=MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC,
        intx_choose_qparams_algorithm=fit,
    )
    in_blocks = lambda module, name: isinstance(module, torch.nn.Linear) and name != "lm_head"
    quantize_(model, config, filter_fn=in_blocks)
    return model


def dense(model, job):
    return {name: W.dequantize() for name, W in linear_weights(model, job).items()}


if __name__ == "__main__":
    main(quantize, dense)
