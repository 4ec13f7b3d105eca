"""Sharded safetensors files, laid out before the first byte is known and filled in any order.

The plan fixes every size, so headers are written first and parts of tensors go straight to their place: no shard is
ever held in memory. Format: https://huggingface.co/docs/safetensors, 8-byte little-endian header length, JSON
header, data.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mlxq.errors import OutputError
from mlxq.writers.output import writing

#: Bytes after which a new shard begins, as on the Hub and in mlx-lm.
MAX_SHARD_BYTES = 5 << 30
#: Bytes hashed at a time.
HASH_PIECE = 1 << 20
_ITEM_BYTES = {"U32": 4, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


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
            if hasattr(os, "posix_fallocate") and start + offset:
                os.posix_fallocate(fd, 0, start + offset)
            _write_all(fd, len(text).to_bytes(8, "little") + text, 0)
        for e in ordered:
            self._place[e.name] = (index, start + header[e.name]["data_offsets"][0], e.nbytes)
            self._left[e.name] = e.nbytes

    def write(self, name: str, data: memoryview | bytes, offset: int = 0) -> None:
        """Write `data` at byte `offset` of tensor `name`."""
        view = memoryview(data).cast("B")
        index, start, nbytes = self._place[name]
        if offset + view.nbytes > nbytes:
            raise OutputError(f"{name}: {offset + view.nbytes} bytes given, {nbytes} planned")
        with writing(self.directory):
            _write_all(self._fds[index], view, start + offset)
        with self._lock:
            self._left[name] -= view.nbytes

    def close(self, check: Callable[[], None] = lambda: None) -> dict[str, str]:
        """Finish: check that every tensor is whole, write the index, and return the SHA-256 of each shard.

        `check` is called before each `HASH_PIECE` bytes are hashed, and may raise.
        """
        short = [name for name, left in self._left.items() if left]
        if short:
            self.abort()
            raise OutputError(f"{len(short)} tensors were not written whole: {short[0]}")
        # Syncing waits for the disk and hashing for a core: together they take as long as the slower one.
        with writing(self.directory), ThreadPoolExecutor(1) as pool:
            synced = [pool.submit(os.fsync, fd) for fd in self._fds]
            digests = {name: sha256(self.directory / name, check) for name in self._names}
            for future in synced:
                future.result()
        self.abort()
        weight_map = {name: self._names[place[0]] for name, place in sorted(self._place.items())}
        index = {"metadata": {"total_size": sum(p[2] for p in self._place.values())}, "weight_map": weight_map}
        with writing(self.directory):
            path = self.directory / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return digests

    def abort(self) -> None:
        """Close the files as they are."""
        for fd in self._fds:
            os.close(fd)
        self._fds = []


def sha256(path: Path, check: Callable[[], None] = lambda: None) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces; `check` is called before each and may raise."""
    digest = hashlib.sha256()
    buffer = bytearray(HASH_PIECE)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as f:
        while n := f.readinto(buffer):
            check()
            digest.update(view[:n])
    return digest.hexdigest()


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


def _write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view.nbytes:
        n = os.pwrite(fd, view, offset)
        view, offset = view[n:], offset + n
