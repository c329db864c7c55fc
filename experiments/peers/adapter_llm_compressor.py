"""llm-compressor: GPTQ, and AWQ followed by rounding, through `oneshot`.

The `weights` of a recipe go into the package's `QuantizationArgs` (the observer chooses how ranges are clipped) and
`modifier` into GPTQ or AWQ. AWQ folds its scales into the norms and into the layers before, so norms are among the
weights that it changes. One thing had to be patched: AWQ pins its stored activations to page-locked memory, which
fails where there is no accelerator, so there `pin_memory` does nothing.
"""

import torch
from common import linears, main
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache

if not torch.accelerator.is_available():
    IntermediatesCache.pin_memory = lambda *args, **kwargs: None


def quantize(model, tokenizer, tokens, job):
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}),
        recipe=recipe(job),
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
        shuffle_calibration_samples=False,
    )
    return model


def recipe(job):
    "The modifiers, in order."
    method, options = job.settings["method"], job.settings.get("modifier", {})
    where = {"config_groups": {"all": scheme(job)}, "ignore": ["lm_head"]}
    if method == "gptq":
        return [GPTQModifier(**where, **options)]
    return [AWQModifier(**options), QuantizationModifier(**where)]


def scheme(job):
    "Weights only, asymmetric, one scale per row or group."
    size = {"strategy": "group", "group_size": job.group_size} if job.group_size else {"strategy": "channel"}
    weights = QuantizationArgs(num_bits=job.bits, symmetric=False, **size, **job.settings.get("weights", {}))
    return QuantizationScheme(targets=["Linear"], weights=weights)


def dense(model, job):
    "Rounded linears, and the norms, which AWQ has changed."
    norms = {name: p for name, p in model.named_parameters() if "norm" in name}
    return norms | {f"{name}.weight": on_grid(linear) for name, linear in linears(model)}


@torch.no_grad()
def on_grid(linear):
    args = linear.quantization_scheme.weights
    return fake_quantize(linear.weight, linear.weight_scale, linear.weight_zero_point, args)


if __name__ == "__main__":
    main(quantize, dense)
