"""What to calibrate a model with that chats: a book, what the model writes itself, or both; to nbs/runs/chat.json.

SmolLM2 at three bits per row by `best`, measured on held-out chapters of the book and on the full model's own answers.
A quarter of an hour a run on one core. `aespa_nb fetch smollm2` and `aespa_nb fetch handbook` first (make smollm2).
"""

import torch
from aespa_nb import AespaConfig, calibration_windows
from common import answer, answers, resume, rounded, windows_of
from smollm2 import TEXT

SOURCES = "handbook", "self", "handbook,self"
QUESTIONS = (
    "What is the capital of France?", "What is a file system?", "Give me a rhyme about rain.",
    "Who wrote Romeo and Juliet?", "How many days are in a week?", "Explain photosynthesis in one sentence.",
    "Write a short story about a dog.", "What is 7 plus 5?", "Name three fruits.", "How do I boil an egg?",
    "What is the largest planet?", "Translate 'good morning' into French.", "What is machine learning?",
    "Give me advice for a job interview.", "Why is the sky blue?", "List the primary colors.",
)  # fmt: skip


@torch.no_grad()
def chat_kl(model, full):
    "KL to the full model in nats, the mean over the tokens of the full model's answers."
    found = []
    for question in QUESTIONS:
        ids, start = answer(full.model, full.tokenizer, question, 80)
        q, p = (m(ids[None]).logits[0, start - 1 : -1].float().log_softmax(-1) for m in (model, full.model))
        found.append((p.exp() * (p - q)).sum(-1))
    return float(torch.cat(found).mean()), sum(map(len, found))


def measure(job):
    full = windows_of("smollm2", "handbook", 1, TEXT[2], TEXT[3])
    calib = calibration_windows(job["calibration"], full.tokenizer, *TEXT[1:3], model=full.model).tokens
    model, report, row = rounded(full._replace(calib=calib), AespaConfig.preset("best", 3))
    kl, tokens = chat_kl(model, full)
    said = dict(answers=answers(model, full.tokenizer, QUESTIONS), notes=report.notes)
    return row | dict(chat_kl=kl, chat_tokens=tokens) | said


if __name__ == "__main__":
    resume("chat", [dict(preset="best", calibration=source) for source in SOURCES], measure, whole=True)
