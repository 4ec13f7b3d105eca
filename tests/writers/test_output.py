"""A result appears whole or not at all."""

import contextlib
import errno
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mlxq.errors import CheckpointError, OutputError
from mlxq.writers.output import OutputDirectory


def names(path):
    return sorted(p.name for p in path.iterdir())


def fail_in(output):
    with output as out:
        out.write("config.json", b"new")
        raise ZeroDivisionError


def old_model(path):
    path.mkdir()
    (path / "config.json").write_text("old")
    (path / "model.safetensors").write_bytes(b"old")
    return path


def make(path, overwrite=False, name="config.json"):
    with OutputDirectory(path, overwrite=overwrite) as out:
        out.write(name, b"new")
        out.commit()


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
    target = old_model(tmp_path / "m")
    with pytest.raises(OutputError, match="--overwrite"):
        OutputDirectory(target)
    with pytest.raises(ZeroDivisionError):
        fail_in(OutputDirectory(target, overwrite=True))
    assert (target / "config.json").read_text() == "old"
    make(target, overwrite=True)
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


@pytest.mark.parametrize(
    ("files", "directories", "replaced"),
    [
        ((), (), True),
        (("mlxq.json",), (), True),
        (("config.json", "model-00001-of-00002.safetensors", "README.md"), ("additional_chat_templates",), True),
        (("config.json", "model.gguf"), (), True),
        (("config.json", "thesis.tex"), (), False),
        (("model.safetensors",), (), False),
        (("config.json", "model.safetensors"), (".git",), False),
        (("mlxq.json",), ("notes",), False),
    ],
)
def test_overwrite_replaces_empty_directories_and_models_alone(tmp_path, files, directories, replaced):
    target = tmp_path / "m"
    target.mkdir()
    for name in files:
        (target / name).write_text("old")
    for name in directories:
        (target / name).mkdir()
    with contextlib.nullcontext() if replaced else pytest.raises(OutputError, match="not replaced"):
        make(target, overwrite=True)
    assert names(target) == (["config.json"] if replaced else sorted(files + directories))
    assert names(tmp_path) == ["m"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("output", [".", "..", ""])
def test_the_current_directory_is_never_an_output(tmp_path, monkeypatch, output, overwrite):
    (tmp_path / "mlxq.json").write_text("{}")
    (tmp_path / "additional_chat_templates").mkdir()
    monkeypatch.chdir(tmp_path if output != ".." else tmp_path / "additional_chat_templates")
    with pytest.raises(OutputError, match="holds the current directory"):
        OutputDirectory(Path(output), overwrite=overwrite)


def appear_as_directory(path):
    path.mkdir()
    (path / "thesis.txt").write_text("mine")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("appear", [appear_as_directory, Path.touch])
def test_what_appears_meanwhile_is_not_replaced(tmp_path, appear, overwrite):
    target = tmp_path / "m"
    with OutputDirectory(target, overwrite=overwrite) as out:
        out.write("config.json", b"new")
        appear(target)
        with pytest.raises(OutputError, match="not" if overwrite else "exists"):
            out.commit()
    assert names(tmp_path) == ["m"]
    assert target.is_file() or (target / "thesis.txt").read_text() == "mine"


def test_a_run_does_not_clear_another_of_the_same_process(tmp_path):
    with OutputDirectory(tmp_path / "m") as first:
        first.write("config.json", b"first")
        OutputDirectory(tmp_path / "m")
        assert names(first.stage) == ["config.json"]
    assert names(tmp_path) == []


def test_the_first_of_two_runs_wins_and_overwrite_takes_the_last(tmp_path):
    with OutputDirectory(tmp_path / "m") as first, OutputDirectory(tmp_path / "m") as second:
        for content, out in ((b"first", first), (b"second", second)):
            out.write("config.json", content)
            out.write("mlxq.json", b"{}")
        first.commit()
        with pytest.raises(OutputError, match="exists"):
            second.commit()
        assert (tmp_path / "m" / "config.json").read_bytes() == b"first"
        make(tmp_path / "m", overwrite=True)
    assert names(tmp_path) == ["m"]
    assert (tmp_path / "m" / "config.json").read_bytes() == b"new"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("rename", [1, 2])
def test_an_interrupt_after_any_rename_leaves_the_old_model_and_nothing_else(tmp_path, monkeypatch, rename, overwrite):
    target = old_model(tmp_path / "m") if overwrite else tmp_path / "m"
    before = names(tmp_path)
    original, left = Path.rename, [rename if overwrite else 1]

    def interrupted(self, other):
        result = original(self, other)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return result

    with OutputDirectory(target, overwrite=overwrite) as out:
        out.write("config.json", b"new")
        monkeypatch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            out.commit()
    assert names(tmp_path) == before
    if overwrite:
        assert (target / "config.json").read_text() == "old"


def test_a_disk_that_fails_after_the_last_rename_is_no_success(tmp_path, monkeypatch):
    target = old_model(tmp_path / "m")
    original = os.fsync

    def fsync(fd):
        if os.path.samestat(os.fstat(fd), tmp_path.stat()):
            raise OSError(errno.EIO, "Input/output error")
        original(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OutputError, match="Input/output error"):
        make(target, overwrite=True)
    assert (target / "config.json").read_text() == "old"
    assert names(tmp_path) == ["m"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_directories_need_not_be_synced_but_files_must(tmp_path, monkeypatch, code):
    refused = [stat.S_ISDIR]

    def fsync(fd):
        if any(kind(os.fstat(fd).st_mode) for kind in refused):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("a", "b"):
        with OutputDirectory(tmp_path / name) as out:
            out.write("config.json", b"{}")
            if name == "a":
                out.commit()
                refused.append(stat.S_ISREG)
            else:
                with pytest.raises(OutputError):
                    out.commit()
    assert names(tmp_path) == ["a"]


@contextlib.contextmanager
def unprivileged():
    """A directory in which this process has no more rights than a person; root may remove anything."""
    directory, nobody = Path(tempfile.mkdtemp()), 65534
    is_root = os.geteuid() == 0
    if is_root:
        os.chown(directory, nobody, nobody)
        os.seteuid(nobody)
    try:
        yield directory
    finally:
        if is_root:
            os.seteuid(0)
        shutil.rmtree(directory)


def test_read_only_directories_are_replaced_whole():
    with unprivileged() as parent:
        target = old_model(parent / "m")
        (target / "additional_chat_templates").mkdir()
        (target / "additional_chat_templates" / "a.jinja").write_text("old")
        (target / "additional_chat_templates").chmod(0o555)
        target.chmod(0o555)
        make(target, overwrite=True)
        assert names(parent) == ["m"]
        assert names(target) == ["config.json"]


def test_what_cannot_be_removed_is_said_and_removed_by_the_next_run(tmp_path, monkeypatch):
    target = old_model(tmp_path / "m")
    with monkeypatch.context() as m:
        m.setattr(shutil, "rmtree", lambda *a, **k: None)
        with pytest.warns(UserWarning, match="could not be removed"):
            make(target, overwrite=True, name="mlxq.json")
    assert names(target) == ["mlxq.json"]
    assert len(names(tmp_path)) == 2
    OutputDirectory(target, overwrite=True)
    assert names(tmp_path) == ["m"]


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with OutputDirectory(tmp_path / "m") as out, pytest.raises(CheckpointError, match=r"cannot read .*tokenizer\.json"):
        out.write("tokenizer.json", tmp_path / "source" / "tokenizer.json")
    assert names(tmp_path) == []


def test_a_stage_that_cannot_be_made_leaves_no_parents(tmp_path):
    out = OutputDirectory(tmp_path / "a" / "b" / "m")
    out.stage = out.stage.with_name("x" * 300)
    with pytest.raises(OutputError, match="too long"):
        out.__enter__()
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["x" * 240, "ü" * 120, "x" * 300])
def test_long_names_are_refused_at_once(tmp_path, name):
    with pytest.raises(OutputError, match=rf"{len(name.encode())} bytes; at most 2\d\d fit"):
        OutputDirectory(tmp_path / "a" / name)


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(OutputError, match=r"link is a symbolic link to .*gone, which does not exist"):
        OutputDirectory(tmp_path / "link" / "deep" / "m")


def test_unwritable_parent(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        OutputDirectory(tmp_path / "file" / "m")


def test_leftovers_of_killed_runs_are_cleared_and_those_of_running_ones_are_not(tmp_path):
    dead = tmp_path / f".m.partial-{dead_pid()}-0"
    running = tmp_path / f".m.partial-{os.getppid()}-0"
    other = tmp_path / f".other.partial-{dead_pid()}-0"
    for d in (dead, running, other):
        d.mkdir()
        (d / "model.safetensors").write_bytes(b"x")
    OutputDirectory(tmp_path / "m")
    assert not dead.exists()
    assert running.exists()
    assert other.exists()


def test_a_replacement_cut_between_its_renames_is_undone(tmp_path):
    old_model(tmp_path / f".m.replaced-{dead_pid()}-0")
    with pytest.raises(OutputError, match="exists"):
        OutputDirectory(tmp_path / "m")
    assert (tmp_path / "m" / "config.json").read_text() == "old"


def test_a_number_of_this_process_from_before_a_restart_is_cleared(tmp_path):
    """In a container every run may have the same process number."""
    (tmp_path / f".m.partial-{os.getpid()}-999999").mkdir()
    (tmp_path / f".m.partial-{10**30}-0").mkdir()
    OutputDirectory(tmp_path / "m")
    assert names(tmp_path) == []


def test_what_was_replaced_is_no_longer_a_model_once_its_removal_begins(tmp_path, monkeypatch):
    """Killed while removing an old model: the rest of it must not come back when the new one is moved away."""
    (tmp_path / "m").mkdir()
    old_model(tmp_path / f".m.replaced-{dead_pid()}-0")
    with monkeypatch.context() as m:
        m.setattr(shutil, "rmtree", lambda path, **k: (Path(path) / "model.safetensors").unlink(missing_ok=True))
        OutputDirectory(tmp_path / "m", overwrite=True)
    (tmp_path / "m").rmdir()
    OutputDirectory(tmp_path / "m")
    assert names(tmp_path) == []


def test_space_is_checked_before_work(tmp_path):
    with pytest.raises(OutputError, match=r"free.*may take"):
        OutputDirectory(tmp_path / "m").check_space(1 << 60)
