"""A small model of each family, exported in each format and read in a new process, to nbs/runs/formats.json: minutes.

Rounded to nearest at 4 bits, once with a scale for each row and once in groups of 32. Folders are read by stock
transformers, which must find every tensor and expect no other. For gptq and awq it needs the packages gptqmodel and
optimum, whose kernels compute in 16 bits: what they have read is unpacked to 16 bits, as is the model's, and computed
with in 32. Where they aren't installed, our own reader is used.
"""

import copy
import json
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers as hf
from aespa_nb import AespaConfig, AespaError, export_model, quantize_model
from common import fresh, resume
from families import AUTO, FAMILIES, MORE, build, inputs
from safetensors.torch import load_file, save_file

CHANGES = {
    "DeepSeek-V3": dict(kv_lora_rank=32),  # groups divide it
    "Qwen3": dict(head_dim=128),  # what transformers takes for granted in GGUF
    "Mistral": dict(sliding_window=64),  # a GGUF file ends at the window
}
FORMATS, GROUPS = ("compressed-tensors", "gptq", "awq", "dense", "gguf"), (None, 32)
BY_KERNELS = {"gptq": ("GPTQConfig", "gptq_torch"), "awq": ("AwqConfig", "torch_awq")}  # how transformers is asked


def output(model, data: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**data)[0]


def unpack(model) -> None:
    "Puts what a kernel has read, as an ordinary linear, in the place of each packed one."
    for name, packed in list(model.named_modules()):
        if hasattr(packed, "qweight"):
            if hasattr(packed, "dequantize_weight"):
                W = packed.dequantize_weight()
            else:
                from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

                W = dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, packed.bits, packed.group_size)
            W = W.T.half().float()
            linear = torch.nn.Linear(W.shape[1], W.shape[0], bias=packed.bias is not None)
            linear.weight.data = W
            if packed.bias is not None:
                linear.bias.data = packed.bias.float()
            model.set_submodule(name, linear)


def read(place: Path, family: str) -> list[dict]:
    "In a new process, for each folder: the largest difference of the output, and tensors not as expected."
    data, found = load_file(place / "inputs.safetensors"), []
    for job in json.loads((place / "jobs.json").read_text()):
        folder, expected = place / job["folder"], load_file(place / f"{job['folder']}.safetensors")["output"]
        if ours := job["format"] in BY_KERNELS and not find_spec("gptqmodel"):
            from aespa_nb import read_quantized

            model, odd = read_quantized(folder).model.float(), []
        else:
            kind, more = AUTO.get(family, hf.AutoModelForCausalLM), {}
            if job["format"] == "gguf":
                more = {"gguf_file": "model.gguf"}
            elif job["format"] in BY_KERNELS:
                name, backend = BY_KERNELS[job["format"]]
                more = {"quantization_config": getattr(hf, name)(bits=4, backend=backend)}
            model, told = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **more)
            odd = [str(x) for k in ("missing_keys", "unexpected_keys", "mismatched_keys") for x in told[k]]
            unpack(model)
        apart = float((output(model.eval(), data) - expected).abs().max() / expected.abs().max())
        found.append(dict(job, apart=apart, odd=odd, reader="aespa_nb" if ours else "transformers"))
    return found


def row(job: dict) -> dict:
    "A family in all formats: what a new process found in each, or the line in which the export was refused."
    family, found, jobs = job["family"], [], []
    data = inputs(family, 2)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        save_file(data, place / "inputs.safetensors")
        for size in GROUPS:
            rounded = build(family, **CHANGES.get(family, {}))
            report = quantize_model(rounded, inputs(family), AespaConfig.preset("rtn", 4, group_size=size))
            for form in FORMATS:
                model, name, told = copy.deepcopy(rounded), f"{form}-{size}", dict(format=form, group_size=size)
                try:
                    short = torch.float16 if form in BY_KERNELS else None  # what their kernels make of all scales
                    done = export_model(model, copy.deepcopy(report), place / name, form, dtype=short)
                except AespaError as e:
                    found.append(dict(told, refused=str(e)))
                    continue
                for layer in report.layers if form in BY_KERNELS else ():
                    if layer not in done.dense:
                        p = model.get_parameter(f"{layer}.weight")
                        p.data = p.half().float()
                save_file({"output": output(model, data).contiguous()}, place / f"{name}.safetensors")
                jobs.append(dict(told, folder=name, kept=len(done.dense) if form != "dense" else 0))
        (place / "jobs.json").write_text(json.dumps(jobs))
        return dict(formats=found + fresh(__file__, "--read", place, family))


if __name__ == "__main__":
    if "--read" in sys.argv:
        print(json.dumps(read(Path(sys.argv[2]), sys.argv[3])))
    else:
        resume("formats", [dict(family=name) for name in (*FAMILIES, *MORE)], row, whole=True)
