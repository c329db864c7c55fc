"""The peers' side: it runs in a peer's environment, which has torch and transformers but not aespa_nb.

An adapter takes (model, tokenizer, tokens, job), quantizes, which is timed, and gives a function that names the weights
it has changed, dequantized, which is not. AutoRound needs no patch, nor do HQQ and torchao; what others needed is said.
"""

import json
import os
import random
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def linears(model):
    "The linears of the blocks, with their names."
    return [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]


def weights_of(model, weight):
    return {f"{name}.weight": weight(linear) for name, linear in linears(model)}


def auto_round(model, tokenizer, tokens, job):
    """AutoRound: signed gradient descent through whole blocks on rounding offsets and clipping ranges.

    It casts the model to bfloat16 where the processor supports it and leaves the dequantized weights in that type; we
    put them back on the exact grid of the scales it stores, which is what a packed checkpoint would hold.
    """
    from auto_round import AutoRound

    size = dict(bits=job.bits, group_size=job.group_size or -1, nsamples=len(tokens), seqlen=tokens.shape[1])
    options = {"sym": False, "seed": job.seed, "device_map": "cpu", **size, **job.settings}
    result = AutoRound(model, tokenizer=tokenizer, dataset=list(tokens.split(1)), **options).quantize()[0]

    def on_grid(linear):
        W = linear.weight.detach().float()
        scale = linear.scale.to(W).repeat_interleave(W.shape[1] // linear.scale.shape[1], 1)
        return scale * torch.round(W / scale)

    return lambda: weights_of(result, on_grid)


def gptqmodel(model, tokenizer, tokens, job):
    """GPTQModel: GPTQ with its own refinements, and GPTAQ, which aims at the full-precision inputs.

    It asks for torch 2.14.1, and runs here without its dependencies on the torch of the other peers. The format is
    `gptq_v2`: layers of the older `gptq`, unpacked at 2 bits, had their zero-points one off (KL 6.3, not 0.26).
    `act_group_aware` (columns reordered within groups) is the package's default and needs groups.
    """
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import GPTAQConfig

    options = dict({"act_group_aware": bool(job.group_size and not job.settings.get("desc_act"))}, **job.settings)
    if "gptaq" in options:
        options["gptaq"] = GPTAQConfig(alpha=options["gptaq"], device="cpu")
    options |= dict(bits=job.bits, group_size=job.group_size or -1, sym=False, offload_to_disk=False, device="cpu")
    model = GPTQModel.load(job.model, QuantizeConfig(format="gptq_v2", **options), dtype=torch.float32)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    job.began = clock()  # it loads the model by itself, which is not part of the cost
    model.quantize(rows, batch_size=1, backend=BACKEND.TORCH)
    packed = [(n, m) for n, m in model.model.named_modules() if hasattr(m, "dequantize_weight")]
    return lambda: {f"{n}.weight": m.dequantize_weight().T for n, m in packed}


def hqq(model, tokenizer, tokens, job):
    """HQQ: half-quadratic fit of the zero-points, layer by layer, without data.

    Zero-points need not be whole numbers, HQQ's own default at 2 and 3 bits. A row without groups is given as one
    group as long as the row, because unpacking 3-bit codes asks for a group size.
    """
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = lambda linear: BaseQuantizeConfig(nbits=job.bits, group_size=job.group_size or linear.in_features, axis=1)
    options = dict(compute_dtype=torch.float32, device="cpu", del_orig=False)
    layers = {f"{n}.weight": HQQLinear(linear, config(linear), **options) for n, linear in linears(model)}
    return lambda: {name: layer.dequantize() for name, layer in layers.items()}


def llm_compressor(model, tokenizer, tokens, job):
    """llm-compressor: GPTQ, and AWQ followed by rounding, through `oneshot`.

    AWQ folds its scales into the norms and into the layers before, so norms are among the weights that it changes. It
    pins its stored activations to page-locked memory, which fails where there is no accelerator: patched.
    """
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
    size = {"strategy": "group", "group_size": job.group_size} if job.group_size else {"strategy": "channel"}
    grid = QuantizationArgs(num_bits=job.bits, symmetric=False, **size, **job.settings.get("weights", {}))
    where = {"config_groups": {"all": QuantizationScheme(targets=["Linear"], weights=grid)}, "ignore": ["lm_head"]}
    options, is_gptq = job.settings.get("modifier", {}), job.settings["method"] == "gptq"
    recipe = [GPTQModifier(**where, **options)] if is_gptq else [AWQModifier(**options), QuantizationModifier(**where)]
    data = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    size = dict(max_seq_length=tokens.shape[1], num_calibration_samples=len(tokens), shuffle_calibration_samples=False)
    oneshot(model=model, tokenizer=tokenizer, dataset=Dataset.from_dict(data), recipe=recipe, **size)
    on_grid = lambda m: fake_quantize(m.weight, m.weight_scale, m.weight_zero_point, m.quantization_scheme.weights)
    norms = {name: p for name, p in model.named_parameters() if "norm" in name}
    return lambda: norms | weights_of(model, on_grid)


def torchao(model, tokenizer, tokens, job):
    "torchao: round-to-nearest on the full range of each row or group, without data."
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerAxis, PerGroup, quantize_

    granularity = PerGroup(job.group_size) if job.group_size else PerAxis(0)
    kind = dict(weight_dtype=getattr(torch, f"int{job.bits}"), mapping_type=MappingType.ASYMMETRIC)
    in_blocks = lambda module, name: isinstance(module, torch.nn.Linear) and name != "lm_head"
    quantize_(model, IntxWeightOnlyConfig(granularity=granularity, **kind), filter_fn=in_blocks)
    return lambda: weights_of(model, lambda linear: linear.weight.dequantize())


def clock():
    "CPU seconds (user and system, with child processes) and wall seconds."
    return sum(os.times()[:4]), time.perf_counter()


if __name__ == "__main__":
    place = Path(sys.argv[1])  # what is in this folder: see `quantize` in run.py
    job = SimpleNamespace(**json.loads((place / "job").read_text()))
    random.seed(job.seed)
    torch.manual_seed(job.seed)
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(job.model, local_files_only=True)
    job.began = clock()
    dense = globals()[job.peer.replace("-", "_")](model, tokenizer, load_file(place / "tokens")["tokens"].long(), job)
    cpu, wall = (now - then for now, then in zip(clock(), job.began))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with torch.no_grad():
        save_file({n: W.detach().float().cpu().contiguous() for n, W in dense().items()}, place / "safetensors")
    result = dict(cpu_seconds=cpu, wall_seconds=wall, peak_MiB=peak, versions={p: version(p) for p in job.packages})
    (place / "result").write_text(json.dumps(result))
