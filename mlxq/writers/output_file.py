"""An output file, with what belongs beside it, that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mlxq.errors import OutputError
from mlxq.writers.files import sync, writing
from mlxq.writers.output import OutputDirectory, T
from mlxq.writers.recovery import Siblings

_MAGIC = b"GGUF"


class OutputFile(OutputDirectory):
    """Stages `path` and files beside it in a hidden directory, and moves them to their places on `commit`.

    Only a file of its kind is ever replaced, and only with `overwrite`; so is what stands beside it under the names
    given in `beside`. A run that is killed while it moves leaves the file without what belongs beside it, never with
    that of another file.

    Raises:
        OutputError: `path` exists (and `overwrite` is False), is no GGUF file, or cannot be written.
    """

    #: What alone is replaced, as messages say it.
    kind = "a GGUF file"

    def __init__(self, path: Path, *, overwrite: bool = False, beside: tuple[str, ...] = ()):
        self._beside = beside
        if not path.suffix:
            raise OutputError(f"{path} has no name before its ending; name a file to make")
        super().__init__(path, overwrite=overwrite)

    @property
    def staged(self) -> Path:
        """The file while it is being written."""
        return self.stage / self.path.name

    def fill(self, write: Callable[[Path], T]) -> T:
        """What `write` makes of the file's stage; errors about it name the file."""
        try:
            return write(self.stage)
        except OutputError as e:
            message = str(e).replace(str(self.staged), str(self.path))
            raise OutputError(message.replace(str(self.stage), str(self.path))) from e

    def _check_place(self) -> None:
        for place in (self.path, *(self.path.parent / name for name in self._beside)):
            if not os.path.lexists(place):
                continue
            if place.is_dir():
                raise OutputError(f"{place} is a directory; name a file to make")
            if not self._overwrite:
                raise OutputError(f"{place} exists; choose another place or pass --overwrite")
        if self.path.exists() and not self._is_of_kind():
            raise OutputError(f"{self.path} is not {self.kind}, so --overwrite does not replace it")

    def _is_of_kind(self) -> bool:
        with writing(self.path), open(self.path, "rb") as f:
            return f.read(len(_MAGIC)) == _MAGIC

    def _move(self) -> None:
        parent = self.path.parent
        for name in self._beside:
            (parent / name).unlink(missing_ok=True)
        self.staged.replace(self.path)
        for name in self._beside:
            if (self.stage / name).exists():
                (self.stage / name).replace(parent / name)
        sync(parent)


@contextlib.contextmanager
def kept(path: Path, beside: Sequence[str] = ()) -> Iterator[None]:
    """An old file and the small ones beside it are there again if the block fails, though it has replaced them.

    A second name holds the old file meanwhile: file systems without hard links keep none, and the new file stays.
    """
    siblings = Siblings(path)
    places = [path.with_name(name) for name in beside]
    small = {place: place.read_bytes() if place.is_file() else None for place in places}
    siblings.acquire()
    try:
        if path.is_file():
            with contextlib.suppress(OSError, NotImplementedError):
                os.link(path, siblings.replaced, follow_symlinks=False)
        yield
    except BaseException:
        if os.path.lexists(siblings.replaced):
            is_new = not os.path.lexists(path) or not os.path.samestat(os.lstat(path), os.lstat(siblings.replaced))
            os.replace(siblings.replaced, path)
            for place, content in small.items():
                if content is not None:
                    place.write_bytes(content)
                elif is_new:
                    place.unlink(missing_ok=True)
        raise
    finally:
        # Two names of one file are not renamed to one another.
        siblings.replaced.unlink(missing_ok=True)
        siblings.release()
