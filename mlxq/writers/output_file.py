"""An output file, with what belongs beside it, that appears whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from mlxq.errors import OutputError
from mlxq.writers.files import sync, writing
from mlxq.writers.output import OutputDirectory

_MAGIC = b"GGUF"


class OutputFile(OutputDirectory):
    """Stages `path` and files beside it in a hidden directory, and moves them to their places on `commit`.

    Only a GGUF file is ever replaced, and only with `overwrite`; so is what stands beside it under the names given
    in `beside`. A run that is killed while it moves leaves the file without what belongs beside it, never with that
    of another file.

    Raises:
        OutputError: `path` exists (and `overwrite` is False), is no GGUF file, or cannot be written.
    """

    def __init__(self, path: Path, *, overwrite: bool = False, beside: tuple[str, ...] = ()):
        self._beside = beside
        if not path.suffix:
            raise OutputError(f"{path} has no name before its ending; name a file to make")
        super().__init__(path, overwrite=overwrite)

    @property
    def staged(self) -> Path:
        """The file while it is being written."""
        return self.stage / self.path.name

    def _check_place(self) -> None:
        for place in (self.path, *(self.path.parent / name for name in self._beside)):
            if not os.path.lexists(place):
                continue
            if place.is_dir():
                raise OutputError(f"{place} is a directory; name a file to make")
            if not self._overwrite:
                raise OutputError(f"{place} exists; choose another place or pass --overwrite")
        if self.path.exists() and not _is_gguf(self.path):
            raise OutputError(f"{self.path} is not a GGUF file, so --overwrite does not replace it")

    def _move(self) -> None:
        parent = self.path.parent
        for name in self._beside:
            (parent / name).unlink(missing_ok=True)
        self.staged.replace(self.path)
        for name in self._beside:
            if (self.stage / name).exists():
                (self.stage / name).replace(parent / name)
        sync(parent)


def _is_gguf(path: Path) -> bool:
    with writing(path), open(path, "rb") as f:
        return f.read(len(_MAGIC)) == _MAGIC
