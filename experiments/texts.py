"""How the bundled model goes on after rounding, to nbs/runs/texts.json: five minutes on one core.

The runs of `make demo` at 2 bits once more (same calibration, steps and measure), and for each the greedy continuation
of the first tokens of the first held-out windows.
"""

import torch
from aespa_nb import AespaConfig, load_reference
from aespa_nb.data.text import calibration_windows
from aespa_nb.experiments.results import compare_presets
from common import RUNS, WINDOWS, stale, stamp, write_record

PRESETS = ("rtn", "gptq", "adaround", "aespa", "best")
BITS, SAMPLES, ITERATIONS = 2, 128, 500  # as the demo
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 12, 48, 40


@torch.no_grad()
def continuations(model, prompts) -> list[list[int]]:
    "The most probable next tokens, again and again."
    ids = prompts
    for _ in range(NEW_TOKENS):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[:, prompts.shape[1] :].tolist()


if __name__ == "__main__" and stale(path := RUNS / "texts.json"):
    model, tokenizer, _, heldout = load_reference()
    calib = calibration_windows("reference", tokenizer, SAMPLES, heldout.shape[1], 0).tokens
    prompts = heldout[:PROMPTS, :PROMPT_TOKENS]
    configs = [AespaConfig.preset(p, BITS, seed=0, iterations=ITERATIONS) for p in PRESETS]
    settings, runs = dict(bits=BITS, samples=SAMPLES, windows=WINDOWS, iterations=ITERATIONS), []
    for row, rounded, _ in compare_presets(model, calib, heldout[:WINDOWS], configs, PRESETS, dtype=torch.float16):
        runs.append({k: row[k] for k in ("method", "perplexity", "kl")} | dict(tokens=continuations(rounded, prompts)))
        print(row["method"], f"KL {row['kl']:.4f}", repr(tokenizer.decode(runs[-1]["tokens"][0])), flush=True)
    content = dict(settings=settings, prompts=prompts.tolist(), runs=runs)
    write_record(path, content | dict(made=stamp(settings | dict(presets=list(PRESETS)))))
