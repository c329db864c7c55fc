"""A slice of experiments/faults.py: a few kills, a few full disks, two processes."""

import os
import subprocess

import faults
import pytest


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", "")
        patch.setattr("tempfile.tempdir", None)
        patch.setattr(faults, "SETTINGS", ["--preset gptq --bits 3 --group-size 32"])  # the same calm run for all
        yield faults.Sandbox(tmp_path_factory.mktemp("sandbox"))


@pytest.mark.skipif(os.name != "posix", reason="forks")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(("ranks", "count"), [(1, 2), (2, 1)])
def test_killed_runs_end_identical(sandbox, ranks, count):
    row = faults.kills(sandbox, count, ranks, seed=3)
    assert row["kills"] == count and row["identical"] == row["runs"] > 0
    assert row["lost"] == row["outside"] == row["tracebacks"] == row["hung"] == 0


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_full_disks_are_told_and_nothing_is_lost(sandbox):
    try:
        row = faults.disk(sandbox, 2)
    except (OSError, subprocess.CalledProcessError) as e:
        pytest.skip(f"no tmpfs here: {e}")
    assert row["told"] == row["identical"] == row["disks"] > 0 and row["lost"] == row["tracebacks"] == 0
