"""Numbers in the chapters' prose that nothing on the page shows: `python tools/check_numbers.py` lists them, and fails.

A number of the prose (a decimal, a share in per cent, an integer from 100 on) has a source if the code of its chapter
holds it, an output prints it, or a record that the chapter reads has it, to the digits that are given. For the rest,
`EXPLAINED` says where it is from: sums of what is said there, names, examples, sources. Formulas, code, headings and
addresses are not looked at.
"""

import json
import re
import sys
from pathlib import Path

import nbformat

NBS = Path(__file__).parents[1] / "nbs"
EXPLAINED = """
attention/21_block_error | 42 | sum of 1 / i^2 over the sum of 1 / i, i = 1 to 24
attention/24_any_position | 511 | 512 tokens less the first
attention/25_feed_forward | 485 11,008 | LLaMA-7B's width, and 4 bytes for each of its square
baselines/52_omniquant | 2.05 2.5 0.85 0.98 | Max 1960, cited there; 2.5 of nearly 3; 1 / (1 + exp(-4))
baselines/53_affinequant | 90112 | a DOI
baselines/54_brecq | 2.4 | logit(1.1 / 1.2), by the formula before it
baselines/55_turboboa | 260,000 | 64 x 4,096
data/29_fetch | 5.8 540 | sizes of models: parameters, 135 million x 4 bytes
data/30_text | 1,100 20,000 32,896 262,144 | the protocol; 256 x 257 / 2; the bundled tokens
data/31_scores | 255 100,000 | 256 less 1; an example
data/32_tasks | 0.07 0.0205 | sqrt(.7 x .3 / 48); the exercise's formula
experiments/80_comparison | 135 256 | the model's name; the bundled windows
experiments/81_cost | 154 | 17 + 137, in the sentence before
rounding/16_descent | 0.6 | nbs/runs/campaign.json: `best` with three starts over `best`
experiments/82_ablations | 39.1 192 | experiments/train_reference.py --kind opt: what it printed, and its width
experiments/85_questions | 5.8 135 | sizes of models
export/72_formats | 0.20 | a version
export/73_checkpoint | 3.3 11.5 0.29 | the front page's table
export/73_checkpoint | 256 4096 2.3 7.7 0.02 | widths; 2 + 18 / 64; a version; by hand, as it says
export/75_gguf_blocks | 0.11 127 1.9 | the range of the scales drawn; bytes; 4.5 less 2.625
export/76_gguf_file | 4.5 3.1 | Q4_0; a name
guides/92_own_data | 688 128 20,000 | the bundled model's width; defaults of the command line
guides/93_gpu | 512 | a title
guides/94_serve | 256 128,256 4,096 1.05 512 | 8 bits; LLaMA 3's head and its bytes; the windows
index | 3.10 | a version
model/41_memory | 13.6 4096 128 | 14 less 0.4; an example
model/43_stream | 205 | 41 x 5
model/48_block_tuning | 85 1.0001 960 1000 | product of the shares; an example; 24 x 40; cited there
model/49_end_to_end | 1,600 | 16 x 100
quantize/60_config | 0.06 1.5 | 30 / 500; the paper's
quantize/65_model | 500 | the preset's steps
reference/97_families | 2.3 128 | a version; the sequences of experiments/families.py
reference/98_faults | 400 | experiments/torture.py
rounding/11_hessian | 160 1024 | the example's weights; 2 to the tenth
rounding/14_adaround | 160 0.75 .285 .715 500 | 2.4 / 0.015; 50 x 0.015; logits there; the preset's steps
rounding/15_moves | 576 | the example's width
rounding/18_target | 128 4,096 | an example
rounding/19_packing | 101 24,576 | five in binary; 64 x 384
start/00_tour | 5.8 1.75 | the size of the model; 7 x 2 / 8
start/01_notation | 255 | the largest code of 8 bits
start/08_puzzles | .30 .35 | the shares to try
"""  # chapter, numbers, where they are from
SKIPPED = r"```.*?```|~~~.*?~~~|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)|<[^>]*>|https?://\S+|^#.*?$"
NUMBER = re.compile(r"(?<![\w.\-/])(\d{1,3}(?:,\d{3})+|\d*\.\d+|\d+)(\s?%|\sper ?cent)?")


def _numbers(value) -> set[float]:
    "All numbers in what JSON can hold."
    if isinstance(value, dict | list):
        return set().union(*map(_numbers, value.values() if isinstance(value, dict) else value))
    return {float(value)} if isinstance(value, int | float) and not isinstance(value, bool) else set()


def shown(book) -> list[float]:
    "What a chapter's code, its outputs (figures apart) and the records that it names hold."
    code = [c for c in book.cells if c.cell_type == "code"]
    data = [o.get("data", {}) | {"text": o.get("text", "")} for c in code for o in c.outputs]
    texts = [t for d in data for k, t in d.items() if k.startswith("text") and "<svg" not in t]
    texts += [c.source for c in code]
    found = re.findall(r"\d[\d,]*\.?\d*(?:e[+-]?\d+)?|\.\d+", text := "\n".join(texts))
    known = {float(n.replace(",", "")) for n in found}
    for path in {NBS / "runs" / name for name in re.findall(r"runs/([\w-]+\.json)", text)}:
        known |= _numbers(json.loads(path.read_text())) if path.exists() else set()
    for name in set(re.findall(r"compare-\w+", text)):
        known |= set().union(*(_numbers(json.loads(p.read_text())) for p in (NBS / "runs" / name).rglob("*.json")))
    return sorted(known)


def unsourced(path: Path) -> list[tuple[str, str]]:
    "Numbers of a chapter's prose without a source, each with the words around it."
    book, found = nbformat.read(path, 4), []
    known = shown(book)
    for prose in (re.sub(SKIPPED, "§", c.source, flags=re.S | re.M) for c in book.cells if c.cell_type == "markdown"):
        for match in NUMBER.finditer(prose):
            number, share = match.groups()
            value, half = float(number.replace(",", "")), 0.51 * 10.0 ** -len(number.partition(".")[2])
            if "." not in number and not share and (value < 100 or 1900 < value < 2100):  # counts, and years
                continue
            meant = [(value, half)]
            meant += [(v, half / 100) for v in (value / 100, 1 - value / 100, 1 + value / 100) if share]
            if not any(abs(k - v) <= near for v, near in meant for k in known):
                words = prose[max(0, match.start() - 60) : match.end() + 40]
                found.append((number, " ".join(words.split())))
    return found


def explained(name: str) -> set[str]:
    "The numbers of a chapter that `EXPLAINED` has."
    lines = [line.split(" | ") for line in EXPLAINED.strip().splitlines()]
    return {number for chapter, numbers, _ in lines if chapter == name for number in numbers.split()}


if __name__ == "__main__":
    failed = False
    for path in sorted(NBS.rglob("*.ipynb")):
        name = str(path.relative_to(NBS).with_suffix(""))
        found = dict(unsourced(path))
        for number in explained(name) ^ found.keys():
            failed = True
            said = f"(… {found[number]} …)" if number in found else "is explained, and has a source"
            print(f"{name}: {number}", said)
    sys.exit(failed)
