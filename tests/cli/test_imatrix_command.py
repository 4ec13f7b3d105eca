"""`mlxq imatrix` as a person meets it: a file that llama.cpp's tools read, what it says, one line for every mistake."""

from __future__ import annotations

import os
from pathlib import Path

import command
import pytest
import tiny

from mlxq.calibration.imatrix import ImportanceMatrix
from mlxq.conversion.importance import write_importance
from mlxq.errors import CalibrationError, Cancelled, CheckpointError, OutputError, PlanError
from mlxq.types import CancelToken

SHORT = {"calib_sequences": 3, "calib_length": 32}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("imatrix")
    (root / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 20)
    return tiny.make_model(root / "source")


@pytest.fixture
def text(source: Path) -> Path:
    return source.parent / "text.txt"


def test_the_command_writes_a_matrix_and_says_what_is_in_it(source: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    arguments = ("imatrix", source, out, "--calib", text, "--calib-sequences", 3, "--calib-length", 32)
    done = command.mlxq(*arguments)
    assert (done.returncode, done.stderr.replace("Calibrating ...\n", "")) == (0, "")
    assert done.stdout == f"15 matrices, 3 sequences of 32 tokens of text.txt\nWrote {out}\n"
    matrix = ImportanceMatrix.read(out)
    assert (matrix.datasets, matrix.chunk_count, matrix.chunk_size) == (("text.txt",), 3, 32)
    again = command.mlxq(*arguments)
    assert (again.returncode, again.stderr) == (
        1,
        f"mlxq: {out} exists; choose another place or pass --overwrite\n",
    )
    help_text = command.mlxq("imatrix", "--help").stdout
    for option in ("--calib-sequences", "--calib-length", "--seed", "--max-memory", "--overwrite"):
        assert option in help_text


def test_the_old_form_holds_the_same_numbers_and_replaces_a_matrix_alone(
    source: Path, text: Path, tmp_path: Path
) -> None:
    new = write_importance(source, tmp_path / "m.gguf", calib=text, **SHORT)
    write_importance(source, tmp_path / "m.dat", calib=text, **SHORT)
    old = ImportanceMatrix.read(tmp_path / "m.dat")
    assert set(old.entries) == set(new.entries)
    for name in new.entries:
        assert abs(old.get(name) / new.get(name) - 1).max() < 1e-6
    for suffix in ("gguf", "dat"):
        place = tmp_path / f"m.{suffix}"
        before = place.read_bytes()
        write_importance(source, place, calib=text, max_memory="1kB", overwrite=True, **SHORT)
        assert place.read_bytes() == before
    (tmp_path / "notes.dat").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"notes.dat is not an importance matrix, so --overwrite does not replace it"):
        write_importance(source, tmp_path / "notes.dat", calib=text, overwrite=True, **SHORT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.dat", "m.gguf", "notes.dat"]


@pytest.mark.parametrize(
    ("output", "options", "error", "words"),
    [
        ("m.txt", {}, OutputError, "name it .gguf, or .dat"),
        ("m", {}, OutputError, "name it .gguf, or .dat"),
        ("folder.gguf", {}, OutputError, "is a directory"),
        ("file/m.gguf", {}, OutputError, "not a directory"),
        ("m.gguf", {"calib": "none.txt"}, CalibrationError, "none.txt"),
        ("m.gguf", {"calib": "empty.txt"}, CalibrationError, "empty.txt"),
        ("m.gguf", {"max_memory": "much"}, PlanError, "'much' is no size"),
    ],
)
def test_mistakes_leave_nothing(source, tmp_path, monkeypatch, output, options, error, words) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.gguf").mkdir()
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(error, match=words):
        write_importance(source, output, **SHORT, **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_the_source_stays(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="lies in the source directory"):
        write_importance(source, source / "m.gguf", **SHORT)
    with pytest.raises(CheckpointError, match="no-such-model"):
        write_importance(tmp_path / "no-such-model", tmp_path / "m.gguf", **SHORT)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_cannot_be_written_is_refused_before_any_work(source: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="can be written to"):
        write_importance(source, tmp_path / "m.gguf", **SHORT)


def test_it_can_be_cancelled_and_tells_of_each_block(source: Path, text: Path, tmp_path: Path) -> None:
    cancel, seen = CancelToken(), []

    def progress(event) -> None:
        seen.append((event.stage, event.done, event.total))
        if event.stage == "calibrate" and event.done == 2:
            cancel.cancel()

    with pytest.raises(Cancelled):
        write_importance(source, tmp_path / "m.gguf", calib=text, progress=progress, cancel=cancel, **SHORT)
    assert [s for s in seen if s[0] == "calibrate"][-2:] == [("calibrate", 1, 3), ("calibrate", 2, 3)]
    assert list(tmp_path.iterdir()) == []
