"""Files whose tensors have their place before the first byte is known, filled in any order by several threads."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mlxq.errors import CheckpointError, OutputError
from mlxq.writers.files import reserve, write_at, writing

#: Bytes hashed at a time.
HASH_PIECE = 1 << 20


class LaidOutFiles:
    """Files in `directory`, opened with `_add_file`, whose tensors have places.

    `write` may be called from several threads, once for each part of a tensor.

    Raises:
        OutputError: the disk is full, or (from `close`) a tensor was not written whole.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._names: list[str] = []
        self._fds: list[int] = []
        #: Tensor -> file, first byte, bytes.
        self._place: dict[str, tuple[int, int, int]] = {}
        self._left: dict[str, int] = {}
        self._lock = threading.Lock()
        self._in_use = 0
        self._aborted = False

    def _add_file(self, name: str, header: bytes, places: dict[str, tuple[int, int]], nbytes: int) -> None:
        """Make a file of `nbytes` that begins with `header`; `places` are first byte and bytes of each tensor."""
        with writing(self.directory):
            fd = os.open(self.directory / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            self._fds.append(fd)
            reserve(fd, nbytes)
            write_at(fd, header, 0)
        index = len(self._names)
        self._names.append(name)
        for tensor, (start, size) in places.items():
            self._place[tensor] = (index, start, size)
            self._left[tensor] = size

    def write(self, name: str, data: memoryview | bytes, offset: int = 0) -> None:
        """Write `data` at byte `offset` of tensor `name`."""
        view = memoryview(data).cast("B")
        index, start, nbytes = self._place[name]
        if offset + view.nbytes > nbytes:
            raise OutputError(f"{name}: {offset + view.nbytes} bytes given, {nbytes} planned")
        with writing(self.directory), self._file(index) as fd:
            write_at(fd, view, start + offset)
        with self._lock:
            self._left[name] -= view.nbytes

    @contextlib.contextmanager
    def _file(self, index: int) -> Iterator[int]:
        """The descriptor of a file, which stays open while it is used, whoever aborts meanwhile.

        A descriptor closed under a thread's hands may by then be another file's.
        """
        with self._lock:
            if self._aborted:
                raise OutputError(f"{self.directory}: the writer is closed")
            self._in_use += 1
        try:
            yield self._fds[index]
        finally:
            with self._lock:
                self._in_use -= 1
                self._close_unused()

    def _close_unused(self) -> None:
        if self._aborted and not self._in_use:
            while self._fds:
                os.close(self._fds.pop())

    def close(self, check: Callable[[], None] = lambda: None) -> dict[str, str]:
        """Finish: check that every tensor is whole. Returns the SHA-256 of each file by name.

        `check` is called before each `HASH_PIECE` bytes are hashed, and may raise.
        """
        try:
            short = [name for name, left in self._left.items() if left]
            if short:
                raise OutputError(f"{len(short)} tensors were not written whole: {short[0]}")
            return self._sync_and_hash(check) | self._write_index()
        finally:
            self.abort()

    def _write_index(self) -> dict[str, str]:
        """Write what belongs beside the files; its SHA-256 by name."""
        return {}

    def _sync_and_hash(self, check: Callable[[], None]) -> dict[str, str]:
        # Syncing waits for the disk and hashing for a core: together they take as long as the slower one.
        pool = ThreadPoolExecutor(1)
        try:
            synced = [pool.submit(self._sync, i) for i in range(len(self._names))]
            digests = {name: sha256(self.directory / name, check) for name in self._names}
            with writing(self.directory):
                for future in synced:
                    future.result()
            return digests
        finally:
            pool.shutdown(cancel_futures=True)

    def _sync(self, index: int) -> None:
        with self._file(index) as fd:
            os.fsync(fd)

    def abort(self) -> None:
        """Close the files as they are, each as soon as no thread writes to it; later writes are refused."""
        with self._lock:
            self._aborted = True
            self._close_unused()


def sha256(path: Path, check: Callable[[], None] = lambda: None) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces; `check` is called before each and may raise.

    Raises:
        CheckpointError: the file cannot be read.
    """
    digest = hashlib.sha256()
    for piece in _pieces(path):
        check()
        digest.update(piece)
    return digest.hexdigest()


def _pieces(path: Path) -> Iterator[memoryview]:
    """A file's bytes, `HASH_PIECE` at a time, in a buffer that is used again."""
    buffer = memoryview(bytearray(HASH_PIECE))
    try:
        with open(path, "rb", buffering=0) as f:
            while n := f.readinto(buffer):
                yield buffer[:n]
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror or e}") from e
