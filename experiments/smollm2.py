"""SmolLM2 rounded as a whole: scores, CPU seconds and what the model answers, to nbs/runs/smollm2.json.

Two to twenty minutes a run on one core.
`aespa_nb fetch smollm2` and `aespa_nb fetch handbook` first (make smollm2).
"""

from aespa_nb import AespaConfig, evaluate_model
from common import answers, resume, rounded, windows_of

FORMATS = dict(g64=(2, 64), row=(3, None))  # bits, inputs that share a scale
PRESETS = dict(g64="gptq best", row="rtn gptq adaround aespa best")
PROMPTS = "What is the capital of France?", "What is a file system?", "Give me a rhyme about rain."
TEXT = "handbook", 32, 512, 12  # calibration windows, their tokens, windows that measure


def measure(job):
    "One row: the full model, or one rounded by a preset."
    full = windows_of("smollm2", *TEXT, job.get("seed", 0))
    text = dict(zip(("source", "samples", "seqlen", "windows"), TEXT))
    if job["preset"] == "full":
        scores = dict(kl=0.0, perplexity=evaluate_model(full.model, full.heldout).perplexity, top1=1.0, cpu_seconds=0.0)
        return dict(text=text, **scores, answers=answers(full.model, full.tokenizer, PROMPTS))
    bits, size = FORMATS[job["format"]]
    config = AespaConfig.preset(job["preset"], bits, group_size=size, seed=job["seed"])
    model, report, row = rounded(full, config)
    cost = dict(seconds=report.seconds, peak_MiB=report.peak_bytes / 2**20, bits_per_weight=report.bits_per_weight)
    said = dict(answers=answers(model, full.tokenizer, PROMPTS), notes=report.notes)
    return dict(text=text) | row | cost | said


if __name__ == "__main__":
    runs = [dict(preset=preset, format=form, seed=0) for form, presets in PRESETS.items() for preset in presets.split()]
    resume("smollm2", [dict(preset="full"), *runs], measure, whole=True)
