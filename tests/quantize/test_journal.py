"""Runs that are stopped and go on: nothing lost, nothing wrong, the same bits."""

import json
import os
import shutil
import signal

import pytest
import torch
from aespa_nb import AespaConfig, quantize_model
from aespa_nb.quantize import journal as module
from aespa_nb.quantize.journal import FINISHED, UNFINISHED, check_free, complete_folder, unfinished_settings
from aespa_nb.quantize.journal import locked, open_journal, write_file, write_json
from models import TOKENS, refused, same, small

QUICK = dict(bits=3, iterations=3)


def run(journal=None, preset="best", kind="llama", dtype=torch.float32, tokens=TOKENS, **changes):
    "A rounded small model and its report."
    model = small(kind, dtype)
    if preset == "max":
        changes |= dict(tuning=2, end_to_end=2)
    return model, quantize_model(model, tokens, AespaConfig.preset(preset, **QUICK, **changes), journal=journal)


def identical(a, b):
    "Are two runs' models, grids and losses equal to the last bit?"
    found = []
    for model, report in (a, b):
        rows = [{k: v for k, v in r.items() if k != "seconds"} for r in report.rows()]
        grids = {name: (r.grid.scale, r.grid.zero, r.zeta) for name, r in report.layers.items()}
        found.append((model.state_dict(), rows, grids))
    return same(*found)


def only(folder, *kept):
    "Forgets all blocks but some, as if the run had been killed."
    for path in folder.glob("*.safetensors"):
        if path.stem[-1] not in kept:
            path.unlink()


@pytest.mark.parametrize("preset", ["gptq", "zfold", "max", "affinequant", "signround", "turboboa"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, preset):
    plain, first = run(preset=preset), run(tmp_path, preset)
    assert identical(plain, first)
    only(tmp_path, "0")
    assert identical(plain, run(tmp_path, preset))  # block 1 anew
    assert identical(plain, run(tmp_path, preset))  # all from the journal
    only(tmp_path, "1")
    assert identical(plain, run(tmp_path, preset))  # a block in the middle is missing


CASES = {kind: dict(kind=kind, preset="zfold" if kind == "opt" else "best") for kind in ("opt", "neox", "bloom")}
CASES["half precision"] = dict(dtype=torch.bfloat16)  # the journal hands over what the block computed
CASES["experts and kept layers"] = dict(kind="moe", keep={"q_proj": 16, "v_proj": 4})


@pytest.mark.parametrize("case", CASES)
def test_all_kinds_of_models(tmp_path, case):
    first = run(tmp_path, **CASES[case])
    if case == "half precision":
        assert identical(run(**CASES[case]), first)
    only(tmp_path, "0")
    assert identical(first, run(tmp_path, **CASES[case]))


def test_another_run_is_refused_with_the_difference_named(tmp_path, monkeypatch):
    first = run(tmp_path, "gptq")
    for changes, match in (
        (dict(seed=1), r"config\.seed is 0 there and 1 here"),
        (dict(preset="best"), r"config\.\w+ is .*and \d more"),
        (dict(tokens=TOKENS.flip(0)), r"calibration\.input_ids is"),
        (dict(kind="mha"), "holds another run: "),
    ):
        with refused(match):
            run(tmp_path, **{"preset": "gptq"} | changes)
    weight, epsilon = small(), small()
    weight.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    epsilon.config.rms_norm_eps = 1e-3
    for model, match in ((weight, r"weights\.model\.layers\.1 is"), (epsilon, r"model\.rms_norm_eps is")):
        with refused(match):
            quantize_model(model, TOKENS, AespaConfig.preset("gptq", **QUICK), journal=tmp_path)
    with monkeypatch.context() as later, refused(r"numerics is 1 there and 100 here"):
        later.setattr("aespa_nb.quantize.config.NUMERICS", 100)
        run(tmp_path, "gptq")
    assert identical(first, run(tmp_path, "gptq"))  # and it is as good as before


DAMAGES = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "flipped": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :],
    "header": lambda data: b"\xff" * 8 + data[8:],
    "text": lambda data: b"{}",
}


DAMAGED = [("model.layers.0.safetensors", how) for how in DAMAGES]
DAMAGED += [("model.layers.1.safetensors", how) for how in ("flipped", "truncated")]
DAMAGED += [("run.json", how) for how in ("text", "empty", "flipped")]


@pytest.fixture(scope="module")
def plain():
    "A run that keeps no journal."
    return run(preset="gptq")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "The journal of the same run."
    folder = tmp_path_factory.mktemp("finished")
    run(folder, "gptq")
    return folder


@pytest.mark.parametrize(("name", "how"), DAMAGED)
def test_a_damaged_file_is_noticed_and_made_again(tmp_path, plain, finished, name, how):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    path = tmp_path / name
    path.write_bytes(DAMAGES[how](path.read_bytes().rstrip()))
    again = run(tmp_path, "gptq")
    assert identical(plain, again)
    assert any(name in note and "damaged" in note for note in again[1].notes)
    assert run(tmp_path, "gptq")[1].notes == plain[1].notes  # it is whole again


def test_a_block_of_another_run_does_not_fit(tmp_path, plain, finished):
    shutil.copytree(finished, tmp_path / "a")
    run(tmp_path / "b", "rtn")
    (tmp_path / "b/model.layers.0.safetensors").replace(tmp_path / "a/model.layers.0.safetensors")
    assert identical(plain, run(tmp_path / "a", "gptq"))


def test_other_versions_are_told(tmp_path):
    run(tmp_path, "rtn")
    header = json.loads((tmp_path / "run.json").read_text())
    header["versions"]["torch"] = "1.0"
    write_json(tmp_path / "run.json", header)
    assert any("torch is 1.0" in n for n in run(tmp_path, "rtn")[1].notes)


def killed(does):
    "Forks a process that does something and is killed; its file descriptors end with it."
    pid = os.fork()
    if not pid:
        try:
            does()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_folder_has_one_writer_and_a_lock_ends_with_its_process(tmp_path):
    def enter():
        with locked(tmp_path / "folder"):
            (tmp_path / "entered").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def fail():
        with refused("another process works in"), locked(tmp_path / "folder"):
            pass
        (tmp_path / "refused").touch()

    with locked(tmp_path / "folder"):
        killed(fail)
    assert (tmp_path / "refused").exists()
    killed(enter)
    assert (tmp_path / "entered").exists()
    with locked(tmp_path / "folder"):
        pass


@pytest.mark.parametrize("at", range(3))
def test_a_full_disk_at_each_write_loses_nothing(tmp_path, monkeypatch, plain, at):
    writes = []

    def scarce(path, write):
        writes.append(path)
        if len(writes) > at:
            return write_file(path, lambda new: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        return write_file(path, write)

    monkeypatch.setattr(module, "write_file", scarce)
    with refused("No space left on device"):
        run(tmp_path, "gptq")
    monkeypatch.undo()
    finished = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix in (".json", ".safetensors")}
    assert len(finished) == at
    assert identical(plain, run(tmp_path, "gptq"))
    assert all((tmp_path / name).read_bytes() == data for name, data in finished.items())


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "closed").mkdir(mode=0o500)
    root = os.name != "posix" or os.geteuid() == 0  # may write anywhere
    for folder in ("file",) if root else ("file", "closed/inside"):
        with refused("can't be written to"):
            run(tmp_path / folder)
    assert (tmp_path / "file").read_text() == "mine"


def test_parts_come_back_as_they_were(tmp_path):
    tensors = dict(x=torch.randn(3, 4).T, y=torch.arange(5, dtype=torch.uint8), z=torch.ones(2).bfloat16())
    with open_journal(tmp_path, {"a": 1}) as journal:
        journal.put("part", tensors, {"loss": 0.1, "name": "ä"})
        back, facts = journal.get("part")
        assert journal.get("other") is None and journal.notes == []
    assert facts == {"loss": 0.1, "name": "ä"} and same(back, tensors)
    assert all(back[k].dtype == t.dtype for k, t in tensors.items())


def test_another_run_is_known_by_its_blocks_where_its_record_is_damaged(tmp_path, plain, finished):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "model.layers.0.safetensors").read_bytes()
    header = json.dumps({k: v for k, v in json.loads((tmp_path / "run.json").read_text()).items() if k != "key"})
    for damage in (*(lambda p, t=t: p.write_text(t) for t in ("?", "[" * 100_000, header)), lambda p: p.unlink()):
        damage(tmp_path / "run.json")
        with refused("holds blocks of another run"):
            run(tmp_path, "gptq", seed=1)
        assert (tmp_path / "model.layers.0.safetensors").read_bytes() == before
    assert identical(plain, run(tmp_path, "gptq"))


# --- the folder of a run ------------------------------------------------------------------------------------------


def finish(folder, resume=False, settings=None):
    with complete_folder(folder, resume, settings) as out:
        (out / "config.json").write_text("{}")
        (out / "part").mkdir()
        (out / "part/x").write_text("x")


@pytest.mark.parametrize("call", ["_move_out", "rmtree", "replace"])
def test_a_kill_at_the_end_leaves_a_finished_run_or_one_that_can_be_finished(tmp_path, monkeypatch, call):
    "The process dies before or in the middle of what its last steps are."
    folder, settings = tmp_path / "out", dict(bits=2)

    def die(*args, **more):
        os.kill(os.getpid(), signal.SIGKILL)

    def die_at_the_end():
        where = {"_move_out": module, "rmtree": module.shutil, "replace": module.os}[call]
        with complete_folder(folder, settings=settings) as out:
            (out / "config.json").write_text("{}")
            (out.parent / "journal").mkdir()
            setattr(where, call, die)

    killed(die_at_the_end)
    if call == "rmtree":  # all was in place already
        assert not (folder / UNFINISHED).exists() and (folder / "config.json").exists() and (folder / FINISHED).exists()
        return
    assert unfinished_settings(folder) == settings
    finish(folder, resume=True, settings=settings)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "part"]


def test_a_move_that_fails_is_undone(tmp_path, monkeypatch):
    replace = os.replace

    def full(a, b):
        if str(b).endswith("config.json"):
            raise OSError(28, "No space left on device")
        replace(a, b)

    monkeypatch.setattr(module.os, "replace", full)
    with refused("No space left on device"):
        finish(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_are_there_from_the_beginning_and_must_be_the_same(tmp_path):
    with pytest.raises(KeyboardInterrupt), complete_folder(tmp_path / "out", settings=dict(bits=2)) as out:
        assert unfinished_settings(tmp_path / "out") == dict(bits=2)
        with open_journal(out.parent / "journal", dict(a=1)) as journal:
            journal.put("block", dict(x=torch.ones(2)), {})
        raise KeyboardInterrupt
    with refused(r"bits is 2 there and 3 here"):
        finish(tmp_path / "out", resume=True, settings=dict(bits=3))
    finish(tmp_path / "out", resume=True, settings=dict(bits=2))


def test_who_comes_late_does_not_write_into_a_finished_folder(tmp_path, monkeypatch):
    "Between the look at the folder and the lock another process has finished its run."
    folder = tmp_path / "out"
    check = module.check_free
    monkeypatch.setattr(module, "check_free", lambda *args: (check(*args), monkeypatch.undo(), finish(folder))[0])
    with refused("is not empty"):
        finish(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "part"]


def test_a_temporary_name_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".x.new").symlink_to(tmp_path / "mine")
    write_file(tmp_path / "x", lambda new: new.write_text("ours"))
    assert (tmp_path / "mine").read_text() == "mine" and (tmp_path / "x").read_text() == "ours"


def test_what_a_stopped_export_left_is_not_to_be_resumed(tmp_path):
    (tmp_path / "out" / UNFINISHED / "result").mkdir(parents=True)
    with refused("holds an unfinished run: remove it first"):
        check_free(tmp_path / "out")
