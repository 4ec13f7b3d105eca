"""The GGUF container: a strict, bounded reader of its metadata and tensor directory, and of byte ranges.

Layout, little-endian (source: the GGUF specification in ggml's `docs/gguf.md`, versions 2 and 3):

    "GGUF"  version u32  n_tensors u64  n_metadata u64
    n_metadata times:   key string, value type u32, value
    n_tensors times:    name string, n_dims u32, n_dims times u64 (fastest axis first), ggml type u32, offset u64
    padding to the alignment, then the tensors' data; offsets count from here

A string is a u64 length and UTF-8 bytes; an array is an element type u32, a count u64 and the elements. Every length
and count is held against what is left of the file before anything of that size is allocated, and the data is read
with `pread`, never mapped, so that memory does not grow with the file.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mlxq.errors import CheckpointError
from mlxq.formats.geometry import BLOCK_FORMATS

#: Metadata and directory together; the largest vocabularies in use need some 20 MB.
_MAX_HEADER = 1 << 29
_READ_AHEAD = 1 << 22
#: Bytes asked for at a time.
_PIECE = 1 << 20
_MAX_DIMS = 4
_STRING, _ARRAY, _BOOL = 8, 9, 7
#: Value type -> (struct code, NumPy dtype) of the fixed-size ones.
_SCALARS = {
    0: ("<B", "u1"),
    1: ("<b", "i1"),
    2: ("<H", "<u2"),
    3: ("<h", "<i2"),
    4: ("<I", "<u4"),
    5: ("<i", "<i4"),
    6: ("<f", "<f4"),
    _BOOL: ("<?", "u1"),
    10: ("<Q", "<u8"),
    11: ("<q", "<i8"),
    12: ("<d", "<f8"),
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_BY_ID = {f.ggml_id: f for f in BLOCK_FORMATS.values()}


@dataclass(frozen=True)
class GgufTensor:
    """One entry of the directory. `shape` is row-major (slowest axis first); `offset` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    row_bytes: int
    nbytes: int


class GgufFile:
    """An open GGUF file, validated: every tensor lies inside it and no two share a byte.

    Attributes:
        path: the file.
        metadata: key -> int, float, bool, str, list of str, or a NumPy array of numbers.
        tensors: name -> `GgufTensor`, in file order.

    Raises:
        CheckpointError: not a GGUF file, an unsupported version, truncated, or inconsistent.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self._fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as e:
            raise CheckpointError(f"{self.path}: cannot be opened: {e.strerror}") from e
        try:
            self.size = os.fstat(self._fd).st_size
            self._parse()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; reading afterwards raises CheckpointError."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read_bytes(self, offset: int, n: int) -> np.ndarray:
        """`n` bytes from `offset`, uint8 `[n]`, the caller's own.

        Raises:
            CheckpointError: the file is closed, or ended early.
        """
        if self._fd < 0:
            raise CheckpointError(f"{self.path}: read after close")
        out = np.empty(n, np.uint8)
        view, done = memoryview(out), 0
        while done < n:
            try:
                piece = os.pread(self._fd, min(n - done, _PIECE), offset + done)
            except OSError as e:
                raise CheckpointError(f"{self.path}: cannot be read: {e.strerror}") from e
            if not piece:
                raise CheckpointError(
                    f"{self.path}: ended at byte {offset + done} while {n - done} more were to be read: "
                    "the file changed since it was opened"
                )
            view[done : done + len(piece)] = piece
            done += len(piece)
        return out

    def _parse(self) -> None:
        header = _Header(self)
        if header.take(4) != b"GGUF":
            raise CheckpointError(f"{self.path}: not a GGUF file: it does not begin with the letters GGUF")
        version = header.u32()
        if version not in (2, 3):
            big = " (a big-endian file?)" if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, 2, 3) else ""
            raise CheckpointError(f"{self.path}: GGUF version {version}{big}: versions 2 and 3 are supported")
        n_tensors, n_metadata = header.u64(), header.u64()
        # Smallest entries: an empty name, no dimensions; an empty key and a one-byte value.
        header.check_count("tensors", n_tensors, 8 + 4 + 4 + 8)
        header.check_count("metadata entries", n_metadata, 8 + 4 + 1)
        self.metadata: dict[str, Any] = {}
        for _ in range(n_metadata):
            key = header.string("a metadata key")
            if key in self.metadata:
                raise CheckpointError(f"{self.path}: metadata key {key!r} appears twice")
            self.metadata[key] = header.value(key)
        entries = [self._entry(header) for _ in range(n_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise CheckpointError(
                f"{self.path}: general.alignment is {alignment!r}, expected a power of two up to 1048576"
            )
        data = -(-header.position // alignment) * alignment
        self.tensors = self._place(entries, data, alignment)

    def _entry(self, header: _Header) -> tuple[str, tuple[int, ...], int, int]:
        name = header.string("a tensor name")
        n_dims = header.u32()
        if not 1 <= n_dims <= _MAX_DIMS:
            raise CheckpointError(f"{self.path}: tensor {name!r} has {n_dims} dimensions, expected 1 to {_MAX_DIMS}")
        dims = tuple(header.u64() for _ in range(n_dims))
        if prod(dims) >= 1 << 60 or 0 in dims:
            raise CheckpointError(f"{self.path}: tensor {name!r} has an impossible shape {list(reversed(dims))}")
        return name, dims[::-1], header.u32(), header.u64()

    def _place(self, entries: list, data: int, alignment: int) -> dict[str, GgufTensor]:
        tensors: dict[str, GgufTensor] = {}
        for name, shape, ggml_id, offset in entries:
            where = f"{self.path}: tensor {name!r}"
            if name in tensors:
                raise CheckpointError(f"{where} appears twice")
            type_name, block_size, type_size = self._geometry(ggml_id, where)
            if shape[-1] % block_size:
                raise CheckpointError(
                    f"{where}: {type_name} packs blocks of {block_size} weights, but its rows have {shape[-1]}"
                )
            if offset % alignment:
                raise CheckpointError(f"{where}: offset {offset} is not a multiple of the alignment {alignment}")
            row_bytes = shape[-1] // block_size * type_size
            nbytes = prod(shape[:-1]) * row_bytes
            if data + offset + nbytes > self.size:
                raise CheckpointError(
                    f"{where} ends at byte {data + offset + nbytes}, but the file has {self.size}: "
                    "it is truncated or still being downloaded"
                )
            tensors[name] = GgufTensor(name, shape, type_name, data + offset, row_bytes, nbytes)
        previous = None
        for tensor in sorted(tensors.values(), key=lambda t: t.offset):
            if previous is not None and tensor.offset < previous.offset + previous.nbytes:
                raise CheckpointError(f"{self.path}: tensors {previous.name!r} and {tensor.name!r} overlap")
            previous = tensor
        return tensors

    def _geometry(self, ggml_id: int, where: str) -> tuple[str, int, int]:
        known = _BY_ID.get(ggml_id)
        if known is not None:
            return known.name, known.block_size, known.type_size
        # Types that are not decoded yet still have a name and a size.
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            kind = GGMLQuantizationType(ggml_id)
            return (kind.name, *GGML_QUANT_SIZES[kind])
        except (ValueError, KeyError):
            raise CheckpointError(f"{where} has the unknown ggml type {ggml_id}") from None


class _Header:
    """A bounded cursor over the head of the file."""

    def __init__(self, file: GgufFile):
        self._file = file
        self._limit = min(file.size, _MAX_HEADER)
        self._buffer = bytearray()
        self.position = 0

    def _need(self, n: int) -> int:
        """Make `n` more bytes available and step over them; returns where they start."""
        start, end = self.position, self.position + n
        if end > len(self._buffer):
            if end > self._limit:
                self._too_long(end)
            have = len(self._buffer)
            self._buffer += self._file.read_bytes(have, min(max(end - have, _READ_AHEAD), self._limit - have)).data
        self.position = end
        return start

    def _too_long(self, end: int) -> None:
        path, size = self._file.path, self._file.size
        if end > size:
            raise CheckpointError(
                f"{path}: the header asks for byte {end}, but the file has {size}: it is truncated or not GGUF"
            )
        raise CheckpointError(f"{path}: the header is larger than {_MAX_HEADER} bytes")

    def check_count(self, what: str, count: int, smallest: int) -> None:
        """Refuse a count whose smallest possible encoding does not fit into the file."""
        if self.position + count * smallest > self._limit:
            raise CheckpointError(
                f"{self._file.path}: {count} {what} need at least {count * smallest} bytes, but the file has "
                f"{self._file.size}: it is truncated or corrupt"
            )

    def take(self, n: int) -> bytes:
        start = self._need(n)
        return bytes(self._buffer[start : start + n])

    def u32(self) -> int:
        start = self._need(4)
        return _U32.unpack_from(self._buffer, start)[0]

    def u64(self) -> int:
        start = self._need(8)
        return _U64.unpack_from(self._buffer, start)[0]

    def string(self, what: str) -> str:
        n = self.u64()
        start = self._need(n)
        try:
            return self._buffer[start : start + n].decode("utf-8")
        except UnicodeDecodeError as e:
            raise CheckpointError(f"{self._file.path}: {what} is not UTF-8 text: {e.reason}") from e

    def value(self, key: str) -> Any:
        kind = self.u32()
        if kind == _STRING:
            return self.string(repr(key))
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise CheckpointError(f"{self._file.path}: metadata key {key!r} has the unknown value type {kind}")
        code = _SCALARS[kind][0]
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def _array(self, key: str) -> list[str] | np.ndarray:
        kind, count = self.u32(), self.u64()
        if kind == _STRING:
            self.check_count(f"strings in {key!r}", count, 8)
            return self._strings(key, count)
        if kind not in _SCALARS:
            raise CheckpointError(f"{self._file.path}: metadata key {key!r} is an array of the unsupported type {kind}")
        dtype = np.dtype(_SCALARS[kind][1])
        self.check_count(f"numbers in {key!r}", count, dtype.itemsize)
        values = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        return values != 0 if kind == _BOOL else values

    def _strings(self, key: str, count: int) -> list[str]:
        """`count` strings; the loop of `string` with its calls spelled out, for vocabularies of 10**5 and more."""
        out: list[str] = []
        unpack = _U64.unpack_from
        for _ in range(count):
            if self.position + 4096 > len(self._buffer):
                out.append(self.string(repr(key)))
                continue
            start = self.position + 8
            end = start + unpack(self._buffer, start - 8)[0]
            if end > len(self._buffer):
                out.append(self.string(repr(key)))
                continue
            self.position = end
            try:
                out.append(self._buffer[start:end].decode())
            except UnicodeDecodeError as e:
                raise CheckpointError(f"{self._file.path}: {key!r}: entry {len(out)} is not UTF-8: {e.reason}") from e
        return out
