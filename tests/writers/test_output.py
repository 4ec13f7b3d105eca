"""A result appears whole or not at all."""

import os
import subprocess
import sys

import pytest

from mlxq.errors import OutputError
from mlxq.writers.output import OutputDirectory


def names(path):
    return sorted(p.name for p in path.iterdir())


def fail_in(output):
    with output as out:
        out.write("config.json", b"new")
        raise ZeroDivisionError


def dead_pid():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_commit_moves_the_stage_and_leaves_nothing_else(tmp_path):
    with OutputDirectory(tmp_path / "a" / "m") as out:
        out.write("config.json", b"{}")
        assert not (tmp_path / "a" / "m").exists()
        out.commit()
    assert names(tmp_path / "a") == ["m"]
    assert (tmp_path / "a" / "m" / "config.json").read_bytes() == b"{}"


def test_failure_leaves_nothing_not_even_created_parents(tmp_path):
    with pytest.raises(ZeroDivisionError):
        fail_in(OutputDirectory(tmp_path / "a" / "b" / "m"))
    assert names(tmp_path) == []


def test_existing_output_is_refused_then_replaced_on_success_only(tmp_path):
    target = tmp_path / "m"
    target.mkdir()
    (target / "config.json").write_text("old")
    with pytest.raises(OutputError, match="--overwrite"):
        OutputDirectory(target)
    with pytest.raises(ZeroDivisionError):
        fail_in(OutputDirectory(target, overwrite=True))
    assert (target / "config.json").read_text() == "old"
    with OutputDirectory(target, overwrite=True) as out:
        out.write("config.json", b"new")
        out.commit()
    assert (target / "config.json").read_text() == "new"
    assert names(tmp_path) == ["m"]


def test_overwrite_never_replaces_what_is_no_model(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="does not look like a model"):
        OutputDirectory(tmp_path / "home", overwrite=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="not a directory"):
        OutputDirectory(tmp_path / "file", overwrite=True)


def test_unwritable_parent(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        OutputDirectory(tmp_path / "file" / "m")


def test_leftovers_of_killed_runs_are_cleared_and_those_of_running_ones_are_not(tmp_path):
    dead = tmp_path / f".m.partial-{dead_pid()}"
    running = tmp_path / f".m.partial-{os.getppid()}"
    other = tmp_path / f".other.partial-{dead_pid()}"
    for d in (dead, running, other):
        d.mkdir()
        (d / "model.safetensors").write_bytes(b"x")
    OutputDirectory(tmp_path / "m")
    assert not dead.exists()
    assert running.exists()
    assert other.exists()


def test_a_replacement_cut_between_its_renames_is_undone(tmp_path):
    old = tmp_path / f".m.replaced-{dead_pid()}"
    old.mkdir()
    (old / "config.json").write_text("old")
    with pytest.raises(OutputError, match="exists"):
        OutputDirectory(tmp_path / "m")
    assert (tmp_path / "m" / "config.json").read_text() == "old"


def test_space_is_checked_before_work(tmp_path):
    with pytest.raises(OutputError, match=r"free.*needs"):
        OutputDirectory(tmp_path / "m").check_space(1 << 60)
