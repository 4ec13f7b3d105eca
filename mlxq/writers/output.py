"""An output directory that appears whole or not at all: written beside its place, synced, renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mlxq.checkpoint.huggingface import COMPANIONS
from mlxq.errors import CheckpointError, OutputError
from mlxq.writers.files import remove_tree, sync, writing
from mlxq.writers.manifest import NAME as MANIFEST
from mlxq.writers.recovery import Siblings, recover

T = TypeVar("T")

#: Directories inside a model that hold files of the tokenizer.
_KNOWN_DIRECTORIES = {pattern.split("/")[0] for pattern in COMPANIONS if "/" in pattern}
_WEIGHTS = (".safetensors", ".gguf")
#: Bytes of a file name on the common file systems of Linux and macOS.
_NAME_MAX = 255


class OutputDirectory:
    """Stages a directory next to `path` and moves it there on `commit`; leaving without it removes the stage.

    Raises:
        OutputError: `path` exists (and `overwrite` is False), is no model directory, or cannot be written.
    """

    def __init__(self, path: Path, *, overwrite: bool = False):
        with writing(path):
            self.path = Path(os.path.abspath(path))
            self._overwrite = overwrite
            self._siblings = Siblings(self.path)
            self.stage = self._siblings.partial
            self._created: list[Path] = []
            _check_name(self.path, self._siblings)
            _check_parents(self.path)
            recover(self.path)
            self._check_place()

    def _check_place(self) -> None:
        if not (self.path.is_symlink() or self.path.exists()):
            return
        if _holds_working_directory(self.path):
            raise OutputError(f"{self.path} holds the current directory; name a directory to make")
        if not self._overwrite:
            raise OutputError(f"{self.path} exists; choose another place or pass --overwrite")
        _check_replaceable(self.path)

    def check_space(self, nbytes: int) -> None:
        """Refuse early when the disk has less than `nbytes` free."""
        with writing(self.path):
            parent = _existing_parent(self.path)
            free = shutil.disk_usage(parent).free
        if free < nbytes:
            raise OutputError(f"{parent} has {free / 1e6:,.0f} MB free; the result may take {nbytes / 1e6:,.0f} MB")

    def __enter__(self) -> OutputDirectory:
        self._siblings.acquire()
        try:
            with writing(self.path):
                self._created = [p for p in self.path.parents if not p.exists()]
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.stage.mkdir()
        except BaseException:
            self._leave()
            raise
        return self

    def write(self, name: str, content: bytes | Path) -> None:
        """Write a small file into the stage, or copy one byte for byte.

        Raises:
            CheckpointError: the file to copy cannot be read.
            OutputError: the copy cannot be written.
        """
        try:
            data = content.read_bytes() if isinstance(content, Path) else content
        except OSError as e:
            raise CheckpointError(f"cannot read {content}: {e.strerror or e}") from e
        with writing(self.path):
            path = self.stage / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "xb") as f:
                f.write(data)

    def fill(self, write: Callable[[Path], T]) -> T:
        """What `write` makes of the stage; errors about it name the place that it stands for."""
        try:
            return write(self.stage)
        except OutputError as e:
            raise OutputError(str(e).replace(str(self.stage), str(self.path))) from e

    def commit(self) -> None:
        """Sync everything and move the stage to its place; an old directory is replaced only now.

        Raises:
            OutputError: something that may not be replaced has appeared at `path`, or the disk failed.
        """
        with writing(self.path):
            for file in self.stage.rglob("*"):
                sync(file)
            sync(self.stage)
            self._check_place()
            self._move()

    def _move(self) -> None:
        replaced, ours = self._siblings.replaced, self.stage.stat()
        try:
            if self._overwrite and self.path.exists():
                self.path.rename(replaced)
            # Whatever appears here in this instant stays: a directory is not renamed onto a file or a full directory.
            self.stage.rename(self.path)
            sync(self.path.parent)
        except BaseException:
            # Also when interrupted: either all was done or nothing.
            if self.path.exists() and os.path.samestat(self.path.stat(), ours):
                self.path.rename(self.stage)
            if replaced.exists():
                replaced.rename(self.path)
            raise
        if replaced.exists():
            # Under the stage's name it is removed on leaving, or by the next run should this one be killed first.
            replaced.rename(self.stage)

    def __exit__(self, *exc: object) -> None:
        self._leave()

    def _leave(self) -> None:
        """Remove the stage (or after a commit, what was replaced) and the parents that were made and hold nothing."""
        if not remove_tree(self.stage):
            warnings.warn(f"{self.stage} could not be removed; remove it by hand", stacklevel=3)
        for parent in self._created:
            with contextlib.suppress(OSError):
                parent.rmdir()
        self._siblings.release()


def _existing_parent(path: Path) -> Path:
    return next(p for p in path.parents if p.exists())


def _check_name(path: Path, siblings: Siblings) -> None:
    own, longest = (len(os.fsencode(p.name)) for p in (path, siblings.replaced))
    if longest > _NAME_MAX:
        raise OutputError(f"{path}: the name has {own} bytes; at most {_NAME_MAX - longest + own} fit; shorten it")


def _check_parents(path: Path) -> None:
    for p in path.parents:
        if p.is_symlink() and not p.exists():
            raise OutputError(f"{p} is a symbolic link to {os.readlink(p)}, which does not exist")
    parent = _existing_parent(path)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent} is not a directory that can be written to")


def _check_replaceable(path: Path) -> None:
    """Only an empty directory or a model, and nothing else beside it, is ever replaced."""
    if path.is_symlink() or not path.is_dir():
        raise OutputError(f"{path} is not a directory, so --overwrite does not replace it")
    entries = list(path.iterdir())
    names = {p.name for p in entries}
    has_weights = any(name.endswith(_WEIGHTS) for name in names)
    if names and MANIFEST not in names and not ("config.json" in names and has_weights):
        raise OutputError(
            f"{path} does not look like a model (no {MANIFEST}, no config.json with weights); it is not replaced"
        )
    unknown = sorted(p.name for p in entries if p.is_dir() and p.name not in _KNOWN_DIRECTORIES)
    if unknown:
        raise OutputError(
            f"{path} holds a directory that is no part of a model ({unknown[0]}); it is not replaced; "
            "move that away or choose another output"
        )


def _holds_working_directory(path: Path) -> bool:
    try:
        here = Path.cwd()
    except FileNotFoundError:
        return False
    return path.is_dir() and any(p.samefile(path) for p in (here, *here.parents))
