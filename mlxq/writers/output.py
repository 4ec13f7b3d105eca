"""An output directory that appears whole or not at all: written beside its place, synced, renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from mlxq.errors import OutputError

_PARTIAL = "partial"
_REPLACED = "replaced"


class OutputDirectory:
    """Stages a directory next to `path` and moves it there on `commit`; leaving without it removes the stage.

    Raises:
        OutputError: `path` exists (and `overwrite` is False), is no model directory, or cannot be written.
    """

    def __init__(self, path: Path, *, overwrite: bool = False):
        self.path = Path(os.path.abspath(path))
        self.stage = self._sibling(_PARTIAL)
        self._committed = False
        self._recover()
        self._check(overwrite)

    def _sibling(self, what: str) -> Path:
        return self.path.parent / f".{self.path.name}.{what}-{os.getpid()}"

    def _check(self, overwrite: bool) -> None:
        if self.path.is_symlink() or self.path.exists():
            if not overwrite:
                raise OutputError(f"{self.path} exists; choose another place or pass --overwrite")
            if not self.path.is_dir() or self.path.is_symlink():
                raise OutputError(f"{self.path} is not a directory, so --overwrite does not replace it")
            names = {p.name for p in self.path.iterdir()}
            if names and not names & {"config.json", "mlxq.json"}:
                raise OutputError(f"{self.path} does not look like a model (no config.json); it is not replaced")
        parent = next(p for p in self.path.parents if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(f"{parent} is not a directory that can be written to")

    def _recover(self) -> None:
        """Clear what killed runs left, and undo a replacement that was cut between its two renames."""
        pattern = re.compile(re.escape(f".{self.path.name}.") + rf"({_PARTIAL}|{_REPLACED})-(\d+)")
        with contextlib.suppress(OSError):
            for entry in list(self.path.parent.iterdir()):
                match = pattern.fullmatch(entry.name)
                if match is None or _alive(int(match[2])):
                    continue
                if match[1] == _REPLACED and not self.path.exists():
                    entry.rename(self.path)
                else:
                    shutil.rmtree(entry, ignore_errors=True)

    def check_space(self, nbytes: int) -> None:
        """Refuse early when the disk has less than `nbytes` free."""
        parent = next(p for p in self.path.parents if p.exists())
        free = shutil.disk_usage(parent).free
        if free < nbytes:
            raise OutputError(f"{parent} has {free / 1e6:,.0f} MB free; the result needs {nbytes / 1e6:,.0f} MB")

    def __enter__(self) -> OutputDirectory:
        with writing(self.path):
            self._created = [p for p in [*self.path.parents] if not p.exists()]
            self.stage.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self.stage, ignore_errors=True)
            self.stage.mkdir()
        return self

    def write(self, name: str, content: bytes | Path) -> None:
        """Write a small file into the stage, or copy one byte for byte."""
        with writing(self.path):
            data = content.read_bytes() if isinstance(content, Path) else content
            path = self.stage / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "xb") as f:
                f.write(data)

    def commit(self) -> None:
        """Sync everything and move the stage to its place; an old directory is replaced only now."""
        with writing(self.path):
            for file in self.stage.rglob("*"):
                _sync(file)
            _sync(self.stage)
            replaced = self._sibling(_REPLACED)
            if self.path.exists():
                self.path.rename(replaced)
            try:
                self.stage.rename(self.path)
            except OSError:
                if replaced.exists():
                    replaced.rename(self.path)
                raise
            _sync(self.path.parent)
            self._committed = True
            shutil.rmtree(replaced, ignore_errors=True)

    def __exit__(self, *exc: object) -> None:
        if not self._committed:
            shutil.rmtree(self.stage, ignore_errors=True)
            for parent in self._created:
                with contextlib.suppress(OSError):
                    parent.rmdir()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's write errors into one clear line."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(f"{path}: the disk is full ({os.strerror(e.errno).lower()}); nothing was left") from e
        raise OutputError(f"cannot write {path}: {e.strerror or e}") from e


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
