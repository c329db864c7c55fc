"""GPTQModel: GPTQ with its own refinements, and GPTAQ, which aims at the full-precision inputs.

Nothing had to be patched in the code. GPTQModel 7.7 asks for torch 2.14.1; here it is installed without its
dependencies and runs on the torch of the other peers (requirements/gptqmodel-alone.txt). On a machine with two cores
it does not start unless GPTQMODEL_CPU_WORKERS is at least 2, so run.py sets it. The format is `gptq_v2`: the layers of
the older `gptq`, unpacked here at 2 bits, had their zero-points one step off (KL 6.3 instead of 0.26).
Settings of a recipe go into `QuantizeConfig`; `mse` searches the ranges, and `gptaq` is the weight of the second term.
Reordering the columns within groups (`act_group_aware`) is the package's default and needs groups.
"""

import torch
from common import load, main
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import GPTAQConfig


def load_for_gptq(job):
    "GPTQModel loads the model by itself."
    _, tokenizer, tokens = load(job)
    model = GPTQModel.load(job.model, config(job), dtype=torch.float32)
    return model, tokenizer, tokens


def config(job):
    options = dict(job.settings)
    if "gptaq" in options:
        options["gptaq"] = GPTAQConfig(alpha=options["gptaq"], device="cpu")
    options |= {"sym": False, "offload_to_disk": False, "device": "cpu", "format": "gptq_v2"}
    options.setdefault("act_group_aware", bool(job.group_size and not options.get("desc_act")))  # needs groups
    return QuantizeConfig(bits=job.bits, group_size=job.group_size or -1, **options)


def quantize(model, tokenizer, tokens, job):
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    model.quantize(rows, batch_size=1, backend=BACKEND.TORCH)
    return model.model


def dense(model, job):
    "The packed layers, unpacked."
    packed = ((name, m) for name, m in model.named_modules() if hasattr(m, "dequantize_weight"))
    return {f"{name}.weight": m.dequantize_weight().T for name, m in packed}


if __name__ == "__main__":
    main(quantize, dense, load_for_gptq)
