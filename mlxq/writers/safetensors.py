"""Sharded safetensors files, laid out before the first byte is known and filled in any order.

The plan fixes every size, so headers are written first and parts of tensors go straight to their place: no shard is
ever held in memory. Format: https://huggingface.co/docs/safetensors, 8-byte little-endian header length, JSON
header, data.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mlxq.checkpoint.shards import INDEX
from mlxq.errors import CheckpointError, OutputError
from mlxq.types import FLOAT_BYTES
from mlxq.writers.files import reserve, write_at, writing

#: Bytes after which a new shard begins, as on the Hub and in mlx-lm.
MAX_SHARD_BYTES = 5 << 30
#: Bytes hashed at a time.
HASH_PIECE = 1 << 20
#: Codes, and the float types of everything else: no other type is ever planned.
_ITEM_BYTES = {"U32": 4} | FLOAT_BYTES


@dataclass(frozen=True)
class Entry:
    """One stored tensor: safetensors dtype name and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        n = _ITEM_BYTES[self.dtype]
        for d in self.shape:
            n *= d
        return n


class SafetensorsWriter:
    """Writes tensors into `directory` as `model.safetensors` or `model-0000i-of-0000n.safetensors` with an index.

    `groups` lists the entries that must share a shard (a weight with its scales and biases). `write` may be called
    from several threads, once for each part of a tensor.

    Raises:
        OutputError: the disk is full, or (from `close`) a tensor was not written whole.
    """

    def __init__(self, directory: Path, groups: Iterable[Sequence[Entry]], max_shard_bytes: int = MAX_SHARD_BYTES):
        self.directory = directory
        shards = _shards(groups, max_shard_bytes)
        total = len(shards)
        self._names = [
            "model.safetensors" if total == 1 else f"model-{i:05d}-of-{total:05d}.safetensors"
            for i in range(1, total + 1)
        ]
        self._fds: list[int] = []
        self._place: dict[str, tuple[int, int, int]] = {}
        self._left: dict[str, int] = {}
        self._lock = threading.Lock()
        self._in_use = 0
        self._aborted = False
        try:
            for i, entries in enumerate(shards):
                self._open(i, entries)
        except BaseException:
            self.abort()
            raise

    def _open(self, index: int, entries: list[Entry]) -> None:
        # Wide items first keep every tensor aligned to its item size, as the reference writer does.
        ordered = sorted(entries, key=lambda e: -_ITEM_BYTES[e.dtype])
        header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
        offset = 0
        for e in ordered:
            header[e.name] = {
                "dtype": e.dtype,
                "shape": list(e.shape),
                "data_offsets": [offset, offset + e.nbytes],
            }
            offset += e.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        with writing(self.directory):
            fd = os.open(self.directory / self._names[index], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            self._fds.append(fd)
            reserve(fd, start + offset)
            write_at(fd, len(text).to_bytes(8, "little") + text, 0)
        for e in ordered:
            self._place[e.name] = (index, start + header[e.name]["data_offsets"][0], e.nbytes)
            self._left[e.name] = e.nbytes

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
        """The descriptor of a shard, which stays open while it is used, whoever aborts meanwhile.

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
        """Finish: check that every tensor is whole and write the index. Returns the SHA-256 of each file by name.

        `check` is called before each `HASH_PIECE` bytes are hashed, and may raise.
        """
        try:
            short = [name for name, left in self._left.items() if left]
            if short:
                raise OutputError(f"{len(short)} tensors were not written whole: {short[0]}")
            return self._sync_and_hash(check) | self._write_index()
        finally:
            self.abort()

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

    def _write_index(self) -> dict[str, str]:
        weight_map = {name: self._names[place[0]] for name, place in sorted(self._place.items())}
        index = {"metadata": {"total_size": sum(p[2] for p in self._place.values())}, "weight_map": weight_map}
        content = (json.dumps(index, indent=2) + "\n").encode()
        with writing(self.directory):
            (self.directory / INDEX).write_bytes(content)
        return {INDEX: hashlib.sha256(content).hexdigest()}

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


def _shards(groups: Iterable[Sequence[Entry]], max_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for group in groups:
        nbytes = sum(e.nbytes for e in group)
        if shards[-1] and size + nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].extend(group)
        size += nbytes
    return shards
