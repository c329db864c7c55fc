"""`aespa_nb plan`: what it says against what happens, on small models; and what is said when memory runs out."""

import contextlib
import io
import json
import time
import warnings
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from aespa_nb import AespaConfig, AespaError, cli, quantize_model
from aespa_nb.quantize.config import PRESETS
from aespa_nb.attention.forward import Rotations
from aespa_nb.experiments.cost import random_tokens
from aespa_nb.model.capture import capturing
from aespa_nb.model.stream import BlockStream
from aespa_nb.cli import main
from aespa_nb.export.checkpoint import export_model, write_checkpoint
from aespa_nb.attention.gauss_newton import GaussNewtonStatistics, out_of_memory
from aespa_nb.model.checkpoint import load_checkpoint as load_model
from aespa_nb.model.memory import block_need, explaining_memory
from aespa_nb.errors import UnsupportedModelError
from aespa_nb.experiments.plan import (
    Plan,
    Row,
    Stage,
    cut_down,
    grown,
    kinds_of,
    plan_run,
    plan_text,
    read_trial,
    run_trial,
    staged,
    time_text,
    try_out,
    verdict,
    whole_phases,
)
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

SIZES = dict(vocab_size=64, hidden_size=64, num_attention_heads=4, max_position_embeddings=64)
MODELS = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=96, num_hidden_layers=6)
    ),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=64, num_hidden_layers=4)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Two small models as checkpoints in float16, which stay in their files."
    torch.manual_seed(0)
    found = {}
    for name, make in MODELS.items():
        found[name] = tmp_path_factory.mktemp(name)
        make().half().save_pretrained(found[name])
    return found


def options(model, preset):
    calib, heldout = random_tokens(model, 12, 48), random_tokens(model, 10, 48, seed=1)
    return calib[:, :48], heldout, AespaConfig.preset(preset, 4, iterations=40)


def tried(folder, preset):
    fresh = lambda: load_model(str(folder))[0]
    model = fresh()
    calib, heldout, config = options(model, preset)
    save = lambda m, report, out, scores: write_checkpoint(out, m, report, "gptq", dtype=torch.float16)
    return run_trial(model, fresh, calib, heldout, config, save, torch.float16), calib, config


@pytest.mark.parametrize("name, preset", [("llama", "best"), ("opt", "gptq"), ("llama", "rtn")])
def test_plan_is_what_happens(folders, tmp_path, name, preset):
    trial, calib, config = tried(folders[name], preset)
    plan = plan_run(read_trial(json.dumps(asdict(trial))))
    model = load_model(str(folders[name]))[0]
    start = time.process_time()
    report = quantize_model(model, calib, config, journal=tmp_path / "journal")
    cpu = time.process_time() - start
    (tmp_path / "out").mkdir()
    export_model(model, report, tmp_path / "out", "gptq", dtype=torch.float16)
    rows = {row.name: row for row in plan.rows}
    assert 1 / 3 < (rows["statistics"].cpu + rows["rounding"].cpu) / cpu < 3
    assert rows["save"].disk == pytest.approx(sum(f.stat().st_size for f in (tmp_path / "out").iterdir()), rel=0.03)
    journal = sum(f.stat().st_size for f in (tmp_path / "journal").glob("*.safetensors"))
    assert plan.out_bytes - rows["save"].disk == pytest.approx(journal, rel=0.01)


@pytest.mark.parametrize("preset, streams", [("gptq", 1), ("best", 2)])
def test_hidden_states_and_weights_are_counted_exactly(folders, preset, streams):
    model = load_model(str(folders["llama"]))[0]
    calib, _, config = options(model, preset)
    with capturing(model), contextlib.closing(BlockStream(model, calib, dtype=config.dtype)) as stream:
        hidden = stream.hidden.nbytes
    trial, *_ = tried(folders["llama"], preset)
    assert trial.stream_bytes * len(calib) == streams * hidden
    blocks = sum(p.nbytes for p in model.model.layers.parameters())
    assert plan_run(trial).temporary_bytes == streams * hidden + blocks
    assert trial.whole == (sum(p.nbytes for p in model.parameters()), 0)


def test_kinds_are_told_by_shape():
    model = MODELS["llama"]()
    model.model.layers[4].mlp.up_proj = torch.nn.Linear(64, 96)  # with a bias
    kinds = kinds_of(model)
    assert [(k.index, k.count) for k in kinds] == [(0, 5), (4, 1)]
    assert sum(k.count * k.numel for k in kinds) == sum(p.numel() for p in model.model.layers.parameters())
    assert all(k.mapped == 0 and k.private == 4 * k.numel for k in kinds)
    odd = model.model.layers[4]
    assert cut_down(model, kinds).model.layers[1] is odd and len(model.model.layers) == 2


def test_straight_line():
    assert grown((2, 3.0), (4, 5.0), 10) == pytest.approx(11)
    assert grown((2, 5.0), (4, 5.0), 10) == 5  # nothing depends on the tokens
    assert grown((2, 1.0), (4, 5.0), 8) == 10  # below zero at the start: proportional
    assert grown((0, 0.0), (4, 5.0), 8) == 10


def test_phases_grow_each_in_its_way(folders):
    trial, *_ = tried(folders["llama"], "max")
    assert trial.all_seqs == trial.seqs == 12  # short sequences: the trial takes them all
    trial.phases = [dict(check=1.0, embed=1.0), dict(forward=2.0, tuning=1.0, grid=3.0)]
    trial.shorter, trial.seqs, trial.few, trial.factors = [{}, dict(forward=1.0)], 4, 2, dict(tuning=10.0)
    found = whole_phases(trial)
    assert found["forward"] == pytest.approx(6 * (2 + 0.5 * 8)) and found["tuning"] == 60 and found["grid"] == 18
    assert 1 < found["check"] < 6


def test_memory_of_a_stage_is_its_peak():
    stages = {}
    with staged(stages, "hold"):
        held = torch.ones(2**24)
        time.sleep(0.03)
        del held
    with staged(stages, "idle"):
        pass
    assert stages["hold"].peak - stages["idle"].peak > 2**25


@pytest.fixture
def plan():
    rows = [Row("load", 1, 2, 2**30), Row("rounding", 100, 300, 3 * 2**30, 2**20)]
    return Plan(rows, 2**30, 0, 2**31, 2**20, 5.0)


def test_verdict_names_what_is_short(plan, tmp_path, monkeypatch):
    assert verdict(plan, tmp_path / "new", free=2**31).startswith("It fits")
    said = verdict(plan, tmp_path, free=2**30)
    assert "2048 MiB of memory" in said and "fewer samples don't help" in said
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**20))
    assert "--out" in verdict(plan, tmp_path, free=2**31)
    on_gpu = Plan(plan.rows, 0, 2**33, 0, 0, 1.0)
    assert "--device cpu" in verdict(on_gpu, tmp_path, free=2**33, on_device=2**32)


def test_text(plan):
    text = plan_text(plan)
    for word in ("rounding", "3072 MiB", "5.0 min", "tried on one block"):
        assert word in text
    assert [time_text(s) for s in (1, 59, 200, 9000)] == ["1.0 s", "59 s", "3.3 min", "2.5 h"]


def in_this_process(words):
    "As `try_out`, without the seconds that a new process takes."
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(words[2:]) == 0
    return read_trial(out.getvalue().splitlines()[-1])


WORDS = "reference --samples 4 --seqlen 32 --eval-samples 4 --preset rtn --quiet".split()


def test_command(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("aespa_nb.experiments.plan.try_out", in_this_process)
    assert main(["plan", *WORDS]) == 0
    said = capsys.readouterr().out
    for word in ("evaluate, KL", "in all", "temporary files", "tried on one block"):
        assert word in said
    assert main(["plan", *WORDS, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert main(["quantize", *WORDS, "--out", str(tmp_path / "out")]) == 0
    written = sum(f.stat().st_size for f in (tmp_path / "out").iterdir())
    assert facts["rows"][-1]["disk"] == pytest.approx(written, rel=0.05)
    assert facts["peak"] == max(row["peak"] for row in facts["rows"]) and facts["cpu"] > 0


def test_help(capsys):
    assert main(["plan", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--preset" in said and "--trial" not in said


@pytest.mark.parametrize("words, message", [(["--bits", "9"], "bits"), (["--preset", "magic"], "choose one of")])
def test_bad_input_is_refused_before_the_trial(words, message, capsys, monkeypatch):
    monkeypatch.setattr("aespa_nb.experiments.plan.try_out", lambda words: pytest.fail("tried"))
    assert main(["plan", "reference", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_trial_that_fails_says_why():
    with pytest.raises(AespaError, match="^no model folder$"):
        try_out(["-c", "raise SystemExit('a warning\\naespa_nb: error: no model folder')"])


ERRORS = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
]


@pytest.mark.parametrize("error", ERRORS, ids=["python", "cuda", "linux", "windows"])
def test_out_of_memory_says_what_to_change(error):
    model = MODELS["llama"]()
    for device, way in (("cpu", "more memory"), ("cuda:0", "--device cpu")):
        with pytest.raises(AespaError, match=f"out of memory on {device}.*GiB.*{way}.*fewer samples do not help"):
            with explaining_memory(model, 48, device, batch_size=2):
                raise error
    with pytest.raises(AespaError, match="batch_size=1"), explaining_memory(model, 48, "cpu", batch_size=2):
        try:  # as `survey` passes it on
            raise error
        except (RuntimeError, MemoryError) as e:
            raise UnsupportedModelError("the block fails by itself") from e


def test_other_errors_stay_what_they_are():
    for error in (RuntimeError("shapes"), UnsupportedModelError("no blocks")):
        with pytest.raises(type(error), match=str(error)), explaining_memory(MODELS["opt"](), 48, "cpu"):
            raise error
    assert not out_of_memory(None)


def test_need_is_about_what_a_run_takes():
    model = MODELS["llama"]()
    need = {objective: block_need(model, 48, objective) for objective in ("layer", "attention", "gauss-newton")}
    report = quantize_model(model, random_tokens(model, 2, 48), AespaConfig.preset("best", 4))
    assert need["layer"].statistics < need["attention"].statistics < need["gauss-newton"].statistics
    assert need["gauss-newton"].weights == 3 * report.block_bytes
    assert 0.5 < need["gauss-newton"].statistics / report.statistics_bytes < 3
    assert block_need(model, 48, batch_size=3).temporaries == 3 * need["layer"].temporaries


@pytest.mark.parametrize("rotated", [True, False])
def test_statistics_survive_with_smaller_tiles(monkeypatch, rotated):
    torch.manual_seed(0)
    angles = torch.outer(torch.arange(24.0), torch.rand(4)).T.repeat(2, 1)
    R = Rotations(angles.cos(), angles.sin()) if rotated else None
    X, Q, K, V = torch.randn(2, 16, 24), torch.randn(2, 4, 8, 24), torch.randn(2, 2, 8, 24), torch.randn(2, 2, 8, 24)
    A = torch.rand(2, 4, 24, 24).tril().softmax(-1)
    make = lambda: GaussNewtonStatistics(4, 2, 8, 16, R, stride=2, coarse=1, dtype=torch.float64)
    whole, parts, real = make(), make(), torch.Tensor.addmm_
    whole.add(X, Q, K, V, A)

    def stingy(total, a, b, **options):
        if a.shape[1] > 100 and total.shape == (8, 8):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(total, a, b, **options)

    monkeypatch.setattr(torch.Tensor, "addmm_", stingy)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        parts.add(X, Q, K, V, A)
    assert any("out of memory in a tile of 12 queries: on with 6" in str(w.message) for w in said)
    for role, loss in whole.losses().items():
        assert torch.allclose(loss.H, parts.losses()[role].H) and (
            loss.G is None or torch.allclose(loss.G, parts.losses()[role].G)
        )


def test_every_preset_can_be_tried(folders):
    for preset in sorted({"awq", "signround", "turboboa"} & set(PRESETS)):
        trial, *_ = tried(folders["llama"], preset)
        assert plan_run(trial).cpu > 0 and isinstance(trial.stages["save"], Stage)
