"""SmolLM2 rounded as a whole: scores, CPU seconds and what the model answers, to nbs/runs/smollm2.json.

Minutes to an hour a run on one core; learned presets take fewer steps than they do by default, and their rows say so.
`aespa_nb fetch smollm2` and `aespa_nb fetch handbook` first (make smollm2).
"""

import argparse
import copy
import itertools
import time

import torch
from aespa_nb import AespaConfig, calibration_windows, evaluate_model, evaluation_windows, load_model, quantize_model
from aespa_nb.experiments.records import stamp
from common import resume

FORMATS = dict(g64=(2, 64), row=(3, None))  # bits, inputs that share a scale
FEWER = dict(adaround=dict(iterations=200), aespa=dict(iterations=200), signround=dict(iterations=50))
PROMPTS = "What is the capital of France?", "What is a file system?", "Give me a rhyme about rain."
TEXT = "handbook", 32, 512, 12  # calibration windows, their tokens, windows that measure


def answers(model, tokenizer):
    "The first words of the answer to each prompt, without sampling."
    said = {}
    for prompt in PROMPTS:
        chat = [dict(role="user", content=prompt)]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**ids, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        said[prompt] = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


def measure(job):
    "One row: the full model, or one rounded by a preset."
    model, tokenizer = load_model("smollm2", torch.float32)
    source, samples, seqlen, windows = TEXT
    heldout = evaluation_windows(source, tokenizer, seqlen, windows).tokens
    row = dict(text=dict(zip(("source", "samples", "seqlen", "windows"), TEXT)))
    if job["preset"] == "full":
        scores = dict(kl=0.0, perplexity=evaluate_model(model, heldout).perplexity, top1=1.0, cpu_seconds=0.0)
        return row | scores | dict(answers=answers(model, tokenizer))
    bits, size = FORMATS[job["format"]]
    changes = FEWER.get(job["preset"], {})
    config = AespaConfig.preset(job["preset"], bits, group_size=size, seed=job["seed"], **changes)
    calib = calibration_windows(source, tokenizer, samples, seqlen, job["seed"]).tokens
    rounded, start = copy.deepcopy(model), time.process_time()
    report = quantize_model(rounded, calib, config)
    row |= dict(cpu_seconds=time.process_time() - start, seconds=report.seconds, peak_MiB=report.peak_bytes / 2**20)
    row |= evaluate_model(rounded, heldout, model)._asdict() | dict(bits_per_weight=report.bits_per_weight)
    return row | dict(answers=answers(rounded, tokenizer), notes=report.notes, changes=changes, made=stamp(config))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default="rtn gptq adaround aespa best".split())
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    resume("smollm2", [dict(preset="full")], measure)
    for seed, form, preset in itertools.product(args.seeds, args.formats, args.presets):
        resume("smollm2", [dict(preset=preset, format=form, seed=seed)], measure)
