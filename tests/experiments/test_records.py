"""Which records of nbs/runs are stale, by name; and each has a command that makes it."""

import fnmatch

import common
import pytest
import records

from aespa_nb import AespaConfig

# Made before there were stamps: what is measured again leaves this list, nothing comes onto it.
# (What is not on it is told by how its name begins.)
STAMPED = (
    *"compare llama scale loading pays attention smollm2 families formats".split(),
    *"situations hostile demo texts layers campaign torture chat".split(),
)
UNSTAMPED = [f"{name}.json" for name in records.OWNERS if not name.startswith(STAMPED)] + ["compare-*/runs/*.json"]
# Made with descents of ten sweeps of single moves and two of chains, then of three of each; their pages say so.
OLDER = {
    "made with numerics 1; now they are 4": ["pays.json"],
}


def test_no_record_is_stale_and_the_list_shrinks():
    "Run `make records`, or `python experiments/records.py NAME`, for what is named here."
    lists, stale = {"unstamped": UNSTAMPED} | OLDER, records.reasons()
    known = lambda path, why: any(fnmatch.fnmatch(path, name) for name in lists.get(why, ()))
    assert {path: why for path, why in stale.items() if not known(path, why)} == {}
    assert [n for names in lists.values() for n in names if not fnmatch.filter(stale, n)] == [], "off the list"


def test_every_record_has_an_owner():
    assert {records.owner(p.relative_to(common.RUNS).as_posix()) for p in common.RUNS.iterdir()} == set(records.OWNERS)
    scripts = [w[0] for commands in records.OWNERS.values() for w in commands if w[0].endswith(".py")]
    assert all((common.ROOT / script).exists() for script in scripts)


def test_only_what_is_stale_is_measured_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "RUNS", tmp_path)
    measured = []
    jobs = [dict(preset=p) for p in ("rtn", "gptq")]
    run = lambda job: measured.append(job["preset"]) or dict(kl=len(measured))
    assert [r["kl"] for r in common.resume("x", jobs, run)] == [1, 2] and measured == ["rtn", "gptq"]
    common.resume("x", jobs, run)
    assert len(measured) == 2
    monkeypatch.setattr("aespa_nb.quantize.config.NUMERICS", 10**6)
    assert "now they are 1000000" in common.stale(tmp_path / "x.json")
    assert sorted(r["kl"] for r in common.resume("x", [*jobs, dict(preset="best")], run)) == [3, 4, 5]
    assert common.stale(tmp_path / "x.json") is None


def test_what_a_preset_was_and_what_its_solver_was_are_told():
    row = lambda preset, **changes: dict(preset=preset, made=common.stamp(AespaConfig.preset(preset, **changes)))
    then, aespa = row("best", grid="hessian"), row("aespa")
    assert common.stale([row("best"), aespa, then | dict(changes=dict(grid="hessian"))]) is None
    assert "best had grid='hessian'" in common.stale(then)
    older = row("best")
    del older["made"]["config"]["pseudo_tokens"]  # a field that did not exist then had its default
    assert "best had pseudo_tokens=0.0" in common.stale(older)
    del aespa["made"]["config"]["pseudo_tokens"]
    assert common.stale(aespa) is None
    aespa["made"]["numerics"] -= 1  # from before its penalty was counted in curvature
    assert "numerics" in common.stale(aespa)


def test_a_record_needs_a_stamp(tmp_path):
    with pytest.raises(ValueError, match="needs"):
        common.write_record(tmp_path / "x.json", [dict(kl=1)])
    assert not list(tmp_path.iterdir())
