"""The command line: what it writes, what it refuses, and that it never leaves half a result."""

import json
import re
import subprocess
import sys

import pytest
import torch
from aespa_nb.cli import load_model, main
from aespa_nb.quantize.journal import check_free, complete_folder
from aespa_nb.errors import AespaError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SHORT = ["--samples", "4", "--eval-samples", "4", "--iterations", "5", "--quiet"]


@pytest.fixture(scope="module")
def local_model(tmp_path_factory):
    "A LLaMA folder with the bundled tokenizer, and a text."
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = dict(vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64)).save_pretrained(folder)
    load_model("reference")[1].save_pretrained(folder)
    (folder / "text.txt").write_text("A tensor is an array that knows its shape, its dtype and its device. " * 80)
    return folder


def test_quantize_writes_a_checkpoint_that_stock_transformers_loads(local_model, tmp_path, capsys):
    out = tmp_path / "out"
    text = str(local_model / "text.txt")
    words = ["--bits", "3", "--calibration", text, "--format", "dense", *SHORT]
    assert main(["quantize", str(local_model), *words, "--out", str(out)]) == 0
    assert "perplexity" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(out)
    stored = load_file(out / "quantization.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    codes, scale, zero, zeta = (stored[f"{name}.{k}"].float() for k in ("codes", "scale", "zero", "zeta"))
    assert torch.allclose(scale * (codes - zero) * zeta, model.get_submodule(name).weight, atol=1e-6)
    assert {"report.html", "layers.svg", "results.json", "results.csv", "tokenizer.json"} <= {
        f.name for f in out.iterdir()
    }
    page = (out / "report.html").read_text()
    assert "<svg" in page and not re.search(r'(src|href)="http', page)


def test_demo_compares_and_saves(tmp_path, capsys):
    out = tmp_path / "demo"
    words = "demo --bits 3 --presets rtn aespa --samples 2 --eval-samples 4 --iterations 2 --quiet --out".split()
    assert main([*words, str(out)]) == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [(r["method"], r["bits"]) for r in rows] == [("full", 16), ("rtn", 3), ("aespa", 3)]
    assert (out / "checkpoint/model.safetensors").exists() and "checkpoint" in capsys.readouterr().out


def test_eval_of_a_model_against_itself(local_model, capsys):
    text = str(local_model / "text.txt")
    assert main(["eval", str(local_model), "--reference", str(local_model), "--data", text]) == 0
    assert "KL" in (printed := capsys.readouterr().out) and "0.0000 nats" in printed and "100.0%" in printed


USAGE = {
    "bits": (["quantize", "reference", "--bits", "1"], "2 to 8"),
    "preset": (["quantize", "reference", "--preset", "magic"], "choose one of"),
    "group": (["quantize", "reference", "--group-size", "7"], "does not divide"),
    "seqlen": (["quantize", "reference", "--seqlen", "100000"], "exceeds"),
    "model": (["quantize", "./not/there"], "no model folder"),
    "name": (["quantize", "my_modle"], "is no folder here"),
    "text": (["quantize", "reference", "--calibration", "not-there.txt"], "no text at"),
    "samples": (["quantize", "reference", "--samples", "0"], "samples"),
    "compare": (["compare", "reference", "--bits", "2", "12", "--presets", "rtn"], "2 to 8"),
}


@pytest.mark.parametrize("case", USAGE)
def test_bad_input_is_one_line_and_exit_code_2(case, tmp_path, capsys):
    words, message = USAGE[case]
    assert main([*words, "--quiet", "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1 and printed.startswith("aespa_nb: error: ")
    assert not list(tmp_path.iterdir())


def test_an_option_of_another_command_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["eval", "reference", "--reference", "reference", "--samples", "8"])
    assert "eval knows no --samples 8: see aespa_nb eval --help" in capsys.readouterr().err


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


def test_a_finished_run_is_not_another_one(local_model, tmp_path, capsys):
    "`--resume` on a result asks whether it is the result of this run; nothing is loaded for that."
    text, out = str(local_model / "text.txt"), tmp_path / "out"
    words = ["quantize", str(local_model), "--calibration", text, *SHORT, "--preset", "rtn", "--out", str(out)]
    assert main(words) == 0
    (out / ".finished").mkdir()  # what a kill in the last moment leaves
    assert main([*words, "--resume", "--quiet"]) == 0
    assert "complete: nothing to do" in capsys.readouterr().out and not (out / ".finished").exists()
    assert main([*words, "--resume", "--bits", "8"]) == 2
    assert "holds another run: --bits is 2 there and 8 here" in capsys.readouterr().err
    (out / "results.json").write_text("[")
    assert main([*words, "--resume"]) == 2
    assert "results.json is damaged" in capsys.readouterr().err


def test_shares_are_known_to_who_goes_on_even_before_the_first_block(local_model, tmp_path, monkeypatch, capsys):
    text, out = str(local_model / "text.txt"), tmp_path / "out"
    words = ["quantize", str(local_model), "--calibration", text, *SHORT, "--preset", "rtn", "--out", str(out)]
    monkeypatch.setattr("aespa_nb.quantize.journal._tidy", lambda *args: None)  # as if it were killed

    def stopped(*args, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr("aespa_nb.cli.evaluate_model", stopped)
        assert main([*words, "--shares", "2"]) == 130
    assert main([*words, "--resume"]) == 0
    assert json.loads((out / "quantization.json").read_text())["config"]["shares"] == 2
    capsys.readouterr()


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:77"])
def test_a_device_that_is_not_there(device, tmp_path, capsys):
    assert main(["quantize", "reference", *SHORT, "--device", device, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"--device {device} can't be used here" in said and said.count("\n") == 1


def test_out_of_memory_is_one_line(monkeypatch, capsys):
    def too_much(*args, **more):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr("aespa_nb.cli.evaluate_model", too_much)
    assert main(["eval", "reference", "--eval-samples", "1"]) == 2
    said = capsys.readouterr().err
    assert "can't allocate memory" in said and "--seqlen" in said and said.count("\n") == 1


def test_damaged_and_pickled_checkpoints_are_refused(local_model, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    for f in local_model.iterdir():
        (broken / f.name).write_bytes(f.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    words = [
        "quantize",
        str(broken),
        "--calibration",
        str(local_model / "text.txt"),
        *SHORT,
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(words) == 2
    assert "NaN" in capsys.readouterr().err
    (broken / "model.safetensors").unlink()
    torch.save(weights, broken / "pytorch_model.bin")
    assert main(words) == 2
    assert "could not be loaded" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["quantize", "eval", "compare", "demo"])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and len(capsys.readouterr().out.splitlines()) > 8


@pytest.mark.parametrize("form", ["dense", "compressed-tensors"])
def test_a_rounded_model_is_not_rounded_again(form, local_model, tmp_path, capsys):
    "Unpacked while loading it looks like any other; what it lost would count as nothing."
    text, out = ["--calibration", str(local_model / "text.txt")], tmp_path / "out"
    words = [str(local_model), *text, *SHORT, "--preset", "rtn", "--format", form, "--out", str(out)]
    assert main(["quantize", *words]) == 0
    for command in ("quantize", "plan", "compare"):
        capsys.readouterr()
        assert main([command, str(out), *text, "--quiet", "--out", str(tmp_path / "again")]) == 2
        assert "holds a rounded model" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
    assert main(["eval", str(out), "--data", text[1], "--eval-samples", "2", "--quiet"]) == 0


def test_python_dash_m_and_usage_exit_code():
    done = subprocess.run([sys.executable, "-m", "aespa_nb", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2 and "quantize" in done.stderr
