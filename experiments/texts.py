"""How the bundled model goes on after rounding, to nbs/runs/texts.json: five minutes on one core.

The runs of `make demo` at 2 bits once more (same calibration, steps and measure), and for each the greedy continuation
of the first tokens of the first held-out windows.
"""

import copy

import torch
from aespa_nb import AespaConfig, evaluate_model, load_reference, quantize_model
from aespa_nb.data.text import calibration_windows
from aespa_nb.export.folding import snap_model
from common import RUNS, WINDOWS, stale, stamp, write_record

PRESETS = ("rtn", "gptq", "adaround", "aespa", "best")
BITS, SAMPLES, ITERATIONS = 2, 64, 500  # as the demo
PROMPTS, PROMPT_TOKENS = 12, 48
GREEDY = dict(max_new_tokens=40, do_sample=False, eos_token_id=None)


if __name__ == "__main__" and stale(path := RUNS / "texts.json"):
    model, tokenizer, _, heldout = load_reference()
    calib = calibration_windows("reference", tokenizer, SAMPLES, heldout.shape[1], 0).tokens
    prompts = heldout[:PROMPTS, :PROMPT_TOKENS]
    settings, runs = dict(bits=BITS, samples=SAMPLES, windows=WINDOWS, iterations=ITERATIONS), []
    for preset in ("full", *PRESETS):
        rounded = copy.deepcopy(model)
        if preset != "full":
            report = quantize_model(rounded, calib, AespaConfig.preset(preset, BITS, iterations=ITERATIONS))
            snap_model(rounded, report, torch.float16)
        scores = evaluate_model(rounded, heldout[:WINDOWS], model)
        row = dict(method=preset, perplexity=scores.perplexity, kl=scores.kl)
        words = rounded.generate(prompts, attention_mask=torch.ones_like(prompts), **GREEDY)
        runs.append(row | dict(tokens=words[:, PROMPT_TOKENS:].tolist()))
        print(preset, f"KL {scores.kl:.4f}", repr(tokenizer.decode(runs[-1]["tokens"][0])), flush=True)
    content = dict(settings=settings, prompts=prompts.tolist(), runs=runs)
    write_record(path, content | dict(made=stamp(settings | dict(presets=list(PRESETS)))))
