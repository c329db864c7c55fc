"""The command line: what it writes, what it refuses, and that it never loses work or leaves half a result."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from aespa_nb import load_model, load_reference, read_quantized
from aespa_nb.cli import main
from aespa_nb.errors import AespaError
from aespa_nb.export.formats import FORMATS
from aespa_nb.options import PRESETS_TEXT, PRICES, Form, Recipe, Source, Text
from aespa_nb.quantize.config import PRESETS
from aespa_nb.quantize.journal import check_free, complete_folder
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SHORT = "--samples 4 --eval-samples 4 --iterations 5 --quiet".split()


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    "A LLaMA folder with the bundled tokenizer, and the words that calibrate it with a text."
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = dict(vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64)).save_pretrained(folder)
    load_reference().tokenizer.save_pretrained(folder)
    (folder / "text.txt").write_text("A tensor is an array that knows its shape, its dtype and its device. " * 80)
    return str(folder), ["--calibration", str(folder / "text.txt"), *SHORT]


@pytest.fixture
def rtn(local):
    "The words that round this model to nearest, into a folder that is still to be named."
    return ["quantize", local[0], *local[1], "--preset", "rtn", "--out"]


def test_quantize_writes_a_checkpoint_that_stock_transformers_loads(local, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["quantize", local[0], "--bits", "3", *local[1], "--format", "dense", "--out", str(out)]) == 0
    assert "perplexity" in capsys.readouterr().out
    model, layers = AutoModelForCausalLM.from_pretrained(out), read_quantized(out).report.layers
    for name, layer in layers.items():
        assert torch.allclose(layer.weight(), model.get_submodule(name).weight, atol=1e-6), name
    assert {"layers.svg", "comparison.svg", "results.csv", "tokenizer.json"} <= {f.name for f in out.iterdir()}
    page, rows = (out / "report.html").read_text(), json.loads((out / "results.json").read_text())["rows"]
    assert page.count("<svg") == 2 and not re.search(r'(src|href)="http', page)
    card, stored = (out / "README.md").read_text(), json.loads((out / "quantization.json").read_text())
    facts = stored["export"]["facts"]
    assert f"| perplexity | {rows[1]['perplexity']:.4g} |" in card and facts["perplexity"] == rows[1]["perplexity"]


def test_a_layer_kept_in_one_block_only(rtn, tmp_path):
    out = tmp_path / "out"
    assert main([*rtn, str(out), "--keep", "layers.0.mlp.down_proj=16"]) == 0
    assert "layers.0.mlp.down_proj" not in json.loads((out / "quantization.json").read_text())["export"]["bits"]
    assert (out / "layers.svg").exists() and (out / "report.html").exists()


@pytest.mark.parametrize("part, without", [("plot_layers", "layers.svg"), ("evaluate_model", "comparison.svg")])
def test_what_fails_after_the_work_is_a_note(part, without, rtn, tmp_path, monkeypatch, capsys):
    def fails(*args, **more):
        raise KeyError(part)

    monkeypatch.setattr(f"aespa_nb.experiments.results.{part}", fails)
    assert main([*rtn, str(tmp_path / "out")]) == 0
    assert f"KeyError: '{part}'" in capsys.readouterr().err and not (tmp_path / "out" / without).exists()
    load_model(str(tmp_path / "out"))
    assert main([*rtn, str(tmp_path / "out"), "--resume"]) == 0


def test_demo_compares_and_saves(local, tmp_path, monkeypatch, capsys):
    load = Source.load
    monkeypatch.setattr(Source, "load", lambda self: load(Source(local[0])))
    words = "demo --bits 3 --presets rtn aespa --samples 2 --eval-samples 4 --iterations 2 --quiet --out".split()
    assert main([*words, str(tmp_path / "demo")]) == 0
    rows = json.loads((tmp_path / "demo/results.json").read_text())["rows"]
    assert [(r["method"], r["bits"]) for r in rows] == [("full", 16), ("rtn", 3), ("aespa", 3)]
    assert (tmp_path / "demo/checkpoint/model.safetensors").exists() and "checkpoint" in capsys.readouterr().out


def test_eval_of_a_model_against_itself(local, capsys):
    assert main(["eval", local[0], "--reference", local[0], "--data", local[1][1]]) == 0
    assert "KL" in (printed := capsys.readouterr().out) and "0.0000 nats" in printed and "100.0%" in printed
    assert main(["eval", local[0], "--reference", local[0], "--data", local[1][1], "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kl"] == pytest.approx(0, abs=1e-6) and f"perplexity {found['perplexity']:.3f}" in printed
    assert main(["eval", local[0], "--tasks", "piqa", "--json"]) == 2
    assert "--json is for perplexity" in capsys.readouterr().err


WRONG = {
    "quantize reference --bits 1": "bits must be",
    "quantize reference --bits three": "--bits",
    "quantize reference --samples 0": "--samples",
    "quantize reference --samples 99999999999": "out of range",
    "quantize reference --preset magic": "choose one of",
    "quantize reference --format zip": "compressed-tensors",
    "quantize reference --for vllm --format gguf": "--for vllm takes --format compressed-tensors, not gguf",
    "quantize reference --bits 3 --format awq": "awq has no 3-bit codes, only 4",
    "quantize reference --auto-bits 3 --format awq": "awq has one number of bits",
    "quantize reference --bits 4 --keep up=8 --format awq": "awq has no 8-bit codes, only 4",
    "quantize reference --head 12": "keep and head take 2 to 8 bits",
    "quantize reference --head 8": "no output head of its own",
    "quantize reference --embeddings 8": "gguf has 16 or 8 bits for them, other formats have 16",
    "quantize nothing.gguf": "start from the full-precision one",
    "quantize reference --keep mlp": "PART=BITS",
    "quantize reference --group-size 7": "does not divide",
    "quantize reference --seqlen 100000": "exceeds",
    "quantize ./not/there": "no model folder",
    "quantize my_modle": "is no folder here",
    "quantize reference --calibration not-there.txt": "no text at",
    "quantize reference --device nonsense": "--device nonsense can't be used here",
    "quantize reference --device meta": "--device meta can't be used here",
    "quantize reference --device cuda:77": "--device cuda:77 can't be used here",
    "compare reference --bits 2 12 --presets rtn": "not 12",
    "compare reference --bits 2 --presets rtn --samples 2000": "only 1024",
    "compare reference --sampels 8": "No such option: --sampels",
    "eval reference --samples 8": "see aespa_nb eval --help",
    "nonsense": "No such command 'nonsense'",
}


@pytest.mark.parametrize("words", WRONG)
def test_bad_input_is_one_line_and_exit_code_2(words, tmp_path, capsys):
    assert main([*words.split(), "--quiet", "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert WRONG[words] in printed and printed.count("\n") == 1 and printed.startswith("aespa_nb: error: ")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_not_touched(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["quantize", "reference", *SHORT, "--out", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err and [f.name for f in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(AespaError):
        check_free(tmp_path / "mine.txt")


def test_an_interrupted_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), complete_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_stopped_run_goes_on_and_a_finished_one_is_not_another(rtn, tmp_path, monkeypatch, capsys):
    "`--resume` on a result asks whether it is the result of this run; nothing is loaded for that."
    out, words = tmp_path / "out", [*rtn, str(tmp_path / "out")]

    def stopped(*args, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr("aespa_nb.experiments.results.evaluate_model", stopped)
        assert main(words) == 130
    assert "stopped; finished blocks are kept" in capsys.readouterr().err and not (out / "config.json").exists()
    assert main([*words, "--resume"]) == 0
    (out / ".finished").mkdir()  # what a kill in the last moment leaves
    assert main([*words, "--resume", "--quiet"]) == 0
    assert "complete: nothing to do" in capsys.readouterr().out and not (out / ".finished").exists()
    assert main([*words, "--resume", "--bits", "8"]) == 2
    assert "holds another run: --bits is 2 there and 8 here" in capsys.readouterr().err
    (out / "results.json").write_text("[")
    assert main([*words, "--resume"]) == 2
    assert "results.json is damaged" in capsys.readouterr().err


def test_out_of_memory_is_one_line_and_a_mistake_of_ours_is_not(monkeypatch, capsys):
    errors = iter([RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."), KeyError("x")])

    def fails(*args, **more):
        raise next(errors)

    monkeypatch.setattr("aespa_nb.data.scores.evaluate_model", fails)
    assert main(["eval", "reference", "--eval-samples", "1"]) == 2
    said = capsys.readouterr().err
    assert "can't allocate memory" in said and "--seqlen" in said and said.count("\n") == 1
    with pytest.raises(KeyError):
        main(["eval", "reference", "--eval-samples", "1"])


def test_damaged_and_pickled_checkpoints_are_refused(local, tmp_path, capsys):
    model = LlamaForCausalLM.from_pretrained(local[0])
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    load_reference().tokenizer.save_pretrained(tmp_path / "broken")
    words = ["quantize", str(tmp_path / "broken"), *local[1], "--out", str(tmp_path / "out")]
    assert main(words) == 2 and "layers.0.mlp.up_proj.weight has NaN" in capsys.readouterr().err
    (tmp_path / "broken/model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "broken/pytorch_model.bin")
    assert main(words) == 2
    assert "could not be loaded" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["dense", "compressed-tensors"])
def test_a_rounded_model_is_not_rounded_again(form, local, rtn, tmp_path, capsys):
    "Unpacked while loading it looks like any other; what it lost would count as nothing."
    out = str(tmp_path / "out")
    assert main([*rtn, out, "--format", form]) == 0
    for command in ("quantize", "plan", "compare"):
        capsys.readouterr()
        assert main([command, out, *local[1][:2], "--quiet", "--out", str(tmp_path / "again")]) == 2
        assert "holds a rounded model" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
    assert main(["eval", out, "--data", local[1][1], "--eval-samples", "2", "--quiet"]) == 0


def test_files_of_8_bit_codes_are_wide_enough():
    dtype = lambda **options: Source("x").file_dtype(torch.ones(1).bfloat16(), Recipe(**options).config())
    assert (dtype(bits=4), dtype(bits=8)) == (torch.bfloat16, torch.float32)
    assert dtype(bits=4, keep=["q_proj=8", "k_proj=16"]) == torch.float32


def test_plan(local, tmp_path, capsys):
    assert main(["plan", local[0], *local[1], "--preset", "rtn", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["out_bytes"] > 0 and facts["memory_bytes"] > 0 and "forward" in facts["seconds"]
    words = ["plan", local[0], *local[1], "--preset", "rtn", "--head", "8"]
    assert main(words) == 0 and "in all" in capsys.readouterr().out


COMMANDS = ("quantize", "export", "eval", "compare", "plan", "demo")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command, capsys):
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert "Examples" in said and f"aespa_nb {command}" in said and "Result" in said


def test_help_and_imports_are_light():
    "Nothing heavy is imported before a command runs; what the help names is what there is."
    code = "import sys, aespa_nb.cli as c"
    code += "\ncodes = [c.main(words) for words in (['--help'], ['quantize', '--help'], ['eval', '-x'])]"
    code += "\nprint(codes, sorted({'torch', 'transformers', 'matplotlib', 'pandas', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[0, 0, 2] []" and all(name in done.stdout for name in COMMANDS)
    assert set(re.findall(r"[a-z0-9-]+", PRESETS_TEXT)) >= PRESETS.keys() and get_args(Form) == tuple(FORMATS)
    runs = Path(__file__).parents[1] / "nbs/runs/compare-reference/runs"
    for name, *price in re.findall(r"(\w+) (\d+) s and (\d+) MiB", PRICES):
        run = json.loads((runs / f"{name}-2b-row-s0.json").read_text())
        assert [round(run["cpu_seconds"]), round(run["peak_MiB"])] == list(map(int, price))


def test_as_a_program():
    "A shell completes what is begun; a mistake is one line."
    program, said = [sys.executable, "-m", "aespa_nb"], []
    for words in ("aespa_nb quan", "aespa_nb quantize --for v", "aespa_nb quantize --no-b"):
        env = dict(_AESPA_NB_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(len(words.split()) - 1))
        said.append(subprocess.run(program, env=os.environ | env, capture_output=True, text=True).stdout.split())
    assert said == [["quantize"], ["vllm"], ["--no-bos"]]
    for words in (program, [Path(sys.executable).with_name("aespa_nb")]):  # by its module, and as it is installed
        done = subprocess.run([*words, "nonsense"], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr == "aespa_nb: error: No such command 'nonsense': see aespa_nb --help\n"


def test_commands_are_functions(local, tmp_path):
    from aespa_nb.cli import quantize

    text = Text(calibration=local[1][1], samples=2, eval_samples=2)
    quantize(Source(local[0]), Recipe(preset="rtn", bits=4), text, str(tmp_path / "out"), quiet=True)
    assert (tmp_path / "out/config.json").exists()
