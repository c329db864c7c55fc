"""`compare` and its records."""

import json
import shutil

import pytest
import torch
from aespa_nb.cli import main
from aespa_nb.experiments.comparison import claim_folder, comparison_table, plan_runs, read_records, spread
from aespa_nb.quantize.journal import fingerprint
from models import refused

WORDS = "--samples 2 --eval-samples 2 --quiet --keep mlp=16 --presets rtn gptq".split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, one_block):
    out = tmp_path_factory.mktemp("compare") / "out"
    words = ["compare", one_block, *WORDS, "--bits", "2", "--out", str(out)]
    assert main([*words, *"--group-sizes 64 --seeds 0 1".split()]) == 0
    stored = read_records(out)
    assert main([*words, *"--group-sizes 0 64 --seeds 0".split()]) == 0  # runs what is missing
    assert [r for r in read_records(out) if r["group_size"]] == stored
    return out, words


@pytest.fixture
def copied(finished, tmp_path):
    out, words = finished
    shutil.copytree(out, tmp_path / "out")
    return tmp_path / "out", [*words[:-1], str(tmp_path / "out")]


def test_every_run_leaves_a_record_and_the_page_shows_the_means(finished):
    out, _ = finished
    records = read_records(out)
    assert len(records) == len(list((out / "runs").iterdir())) == 2 * (1 + 2)
    assert {"report.html", "comparison.svg", "results.csv", "results.json", "setting.json", "runs"} == {
        f.name for f in out.iterdir()
    }
    rows = {(r["method"], r["bits"]): r for r in json.loads((out / "results.json").read_text())["rows"]}
    assert {name: r["seeds"] for (name, _), r in rows.items()} == {"rtn": 1, "gptq": 1, "rtn, g64": 2, "gptq, g64": 2}
    mine = [r for r in records if (r["preset"], r["bits"], r["group_size"]) == ("gptq", 2, 64)]
    assert rows["gptq, g64", 2]["kl"] == pytest.approx(sum(r["kl"] for r in mine) / 2)
    assert rows["gptq, g64", 2]["kl_spread"] == pytest.approx(abs(mine[0]["kl"] - mine[1]["kl"]) / 2)
    assert rows["gptq, g64", 2]["kl"] < rows["rtn, g64", 2]["kl"] < rows["rtn", 2]["kl"]


@pytest.mark.parametrize(
    "change, what", [("--samples 3", "another calibration"), ("--eval-samples 3", "another evaluation")]
)
def test_other_data_is_refused(copied, capsys, change, what):
    out, words = copied
    assert main([*words, *change.split()]) == 2
    assert what in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_a_method_that_does_not_know_the_model_is_passed_over(tmp_path, capsys):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from aespa_nb import load_reference

    torch.manual_seed(0)
    shape = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    config = GPTNeoXConfig(vocab_size=4096, max_position_embeddings=32, bos_token_id=0, eos_token_id=0, **shape)
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "model")
    load_reference().tokenizer.save_pretrained(tmp_path / "model")
    line = f"compare {tmp_path / 'model'} --presets zfold rtn --bits 3 --samples 2 --eval-samples 2 --quiet --out"
    capsys.readouterr()
    assert main([*line.split(), str(tmp_path / "out")]) == 0
    assert "Z-Fold is worked out for" in capsys.readouterr().out
    assert [("refused" in r, r["preset"]) for r in read_records(tmp_path / "out")] == [(False, "rtn"), (True, "zfold")]


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    with refused("other things"):
        claim_folder(tmp_path, {})
    assert [f.name for f in tmp_path.iterdir()] == ["precious.txt"]


def test_seeds_change_last():
    runs = plan_runs(["a", "b"], [2, 3], [None, 64], [0, 1])
    assert len(set(runs)) == 16 and [r.seed for r in runs] == [0] * 8 + [1] * 8
    assert [r.preset for r in runs[:2]] == ["a", "b"] and len({r.name for r in runs}) == 16


def test_fingerprints_see_every_number():
    x = torch.arange(6.0)
    y = x.clone()
    y[5] += 1e-6
    assert fingerprint([x]) == fingerprint([x.clone()]) != fingerprint([y])
    assert fingerprint([x]) != fingerprint([x.view(2, 3)]) != fingerprint([x.double().view(2, 3)])


def test_table_has_means_and_spreads():
    records = [dict(preset="a", bits=2, group_size=None, seed=s, kl=k) for s, k in ((0, 1.0), (1, 2.0))]
    assert "| a | 1.5000 ± 0.5000 |" in comparison_table(records)
    assert spread(records) == (1.5, 0.5, 2)
