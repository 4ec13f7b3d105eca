"""Large arrays that wait in a temporary file."""

from __future__ import annotations

import contextlib
import os
import tempfile
from math import prod
from typing import IO

import numpy as np

from mlxq.errors import OutputError

#: Bytes of a temporary file that are written at a time.
_PIECE = 1 << 22


def spool(shape: tuple[int, ...], what: str) -> np.ndarray:
    """A float32 array in a temporary file, mapped; it is gone when nothing refers to it.

    Args:
        shape: of the array.
        what: it is for, in words.

    Raises:
        OutputError: the disk has not so much room.
    """
    with room_on_disk(4 * prod(shape), what) as file:
        return np.memmap(file, np.float32, "r+", shape=shape)


def room_on_disk(nbytes: int, what: str) -> IO[bytes]:
    """A temporary file whose bytes are all there: a mapped file with holes ends the process when the disk is full.

    Raises:
        OutputError: the disk has not so much room.
    """
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(tempfile.TemporaryFile())
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, nbytes)
            else:
                for start in range(0, nbytes, _PIECE):
                    file.write(bytes(min(_PIECE, nbytes - start)))
                file.flush()
            stack.pop_all()
            return file
    except OSError as e:
        raise OutputError(
            f"{tempfile.gettempdir()}: {nbytes / 1e6:,.0f} MB for {what} cannot be had there:"
            f" {e.strerror or e}; make room, or name another place in TMPDIR"
        ) from e
