"""The GGUF container: a strict, bounded reader of its metadata and tensor directory, and of byte ranges.

Layout, little-endian (source: the GGUF specification in ggml's `docs/gguf.md`, versions 2 and 3):

    "GGUF"  version u32  n_tensors u64  n_metadata u64
    n_metadata times:   key string, value type u32, value
    n_tensors times:    name string, n_dims u32, n_dims times u64 (fastest axis first), ggml type u32, offset u64
    padding to the alignment, then the tensors' data; offsets count from here

Every length and count is held against what is left of the file before anything of that size is allocated, and the
data is read with `pread`, never mapped, so that memory does not grow with the file.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mlxq.checkpoint.gguf.header import Header
from mlxq.checkpoint.safetensors import quoted
from mlxq.errors import CheckpointError, FormatError
from mlxq.formats.geometry import BLOCK_FORMATS

#: Bytes asked for at a time.
_PIECE = 1 << 20
_MAX_DIMS = 4
#: Weights of one tensor; file offsets are signed 64-bit numbers.
_MAX_WEIGHTS = 1 << 60
_MAX_ALIGNMENT = 1 << 20
#: Entries of a head; the largest models in use have some 50 000 tensors and 100 keys.
_MAX_TENSORS, _MAX_KEYS = 1 << 17, 1 << 16
#: Number in a file -> (name, block_size, type_size), those of tensors that hold no weights too.
_TYPES = {f.ggml_id: (f.name, f.block_size, f.type_size) for f in BLOCK_FORMATS.values()} | {
    9: ("Q8_1", 32, 40),
    15: ("Q8_K", 256, 292),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
}


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
        files: the file, as the one of a list.
        metadata: key -> int, float, bool, str, list of str, or a NumPy array of numbers.
        tensors: name -> `GgufTensor`, in file order.

    Raises:
        CheckpointError: the file cannot be opened or read.
        FormatError: not a GGUF file, an unsupported version, truncated, or inconsistent: the message names the field,
            its value and the rule.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.files = [self.path]
        try:
            # Without O_NONBLOCK, a named pipe would wait for its other end.
            self._fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
        except OSError as e:
            raise CheckpointError(f"{self.path}: cannot be opened: {e.strerror}") from e
        try:
            status = os.fstat(self._fd)
            if not stat.S_ISREG(status.st_mode):
                kind = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file"
                raise CheckpointError(f"{self.path}: cannot be read: it is {kind}")
            self.size = status.st_size
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
        header = Header(self.path, self.size, self.read_bytes)
        if header.take(4, "the magic number") != b"GGUF":
            raise FormatError(f"{self.path}: not a GGUF file: it does not begin with the letters GGUF")
        version = header.u32("the version")
        if version not in (2, 3):
            big = " (a big-endian file?)" if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, 2, 3) else ""
            raise FormatError(f"{self.path}: GGUF version {version}{big}: versions 2 and 3 are supported")
        n_tensors, n_metadata = header.u64("the number of tensors"), header.u64("the number of metadata entries")
        # Smallest entries: an empty name, no dimensions; an empty key and a one-byte value.
        for what, count, smallest, most in (
            ("tensors", n_tensors, 8 + 4 + 4 + 8, _MAX_TENSORS),
            ("metadata entries", n_metadata, 8 + 4 + 1, _MAX_KEYS),
        ):
            header.check_count(what, count, smallest)
            if count > most:
                raise FormatError(f"{self.path}: {count} {what}, expected at most {most}")
        self.metadata = self._metadata(header, n_metadata)
        entries = [self._entry(header) for _ in range(n_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise FormatError(
                f"{self.path}: general.alignment is {shown(alignment)}, expected a power of two up to {_MAX_ALIGNMENT}"
            )
        data = -(-header.position // alignment) * alignment
        self.tensors = self._place(entries, data, alignment)

    def _metadata(self, header: Header, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for i in range(count):
            key = header.string(f"the key of metadata entry {i}")
            if not key or key in metadata:
                rule = "appears twice" if key else "is empty"
                raise FormatError(f"{self.path}: metadata key {quoted(key)} {rule}")
            metadata[key] = header.value(key)
        return metadata

    def _entry(self, header: Header) -> tuple[str, tuple[int, ...], int, int]:
        name = header.string("the name of a tensor")
        what = f"tensor {quoted(name)}"
        n_dims = header.u32(f"the number of dimensions of {what}")
        if not 1 <= n_dims <= _MAX_DIMS:
            raise FormatError(f"{self.path}: {what} has {n_dims} dimensions, expected 1 to {_MAX_DIMS}")
        shape = tuple(header.u64(f"the shape of {what}") for _ in range(n_dims))[::-1]
        if not 1 <= prod(shape) <= _MAX_WEIGHTS:
            raise FormatError(
                f"{self.path}: {what} has the impossible shape {list(shape)}, expected 1 to {_MAX_WEIGHTS} weights"
            )
        return name, shape, header.u32(f"the type of {what}"), header.u64(f"the offset of {what}")

    def _place(self, entries: list, data: int, alignment: int) -> dict[str, GgufTensor]:
        """The directory, every tensor inside of the file and none over another."""
        tensors: dict[str, GgufTensor] = {}
        for name, shape, ggml_id, offset in entries:
            where = f"{self.path}: tensor {quoted(name)}"
            if not name or name in tensors:
                raise FormatError(f"{where} {'appears twice' if name else 'has an empty name'}")
            type_name, block_size, type_size = _geometry(ggml_id, where)
            if shape[-1] % block_size:
                raise FormatError(
                    f"{where}: {type_name} packs blocks of {block_size} weights, but its rows have {shape[-1]}"
                )
            if offset % alignment:
                raise FormatError(f"{where}: offset {offset} is not a multiple of the alignment {alignment}")
            row_bytes = shape[-1] // block_size * type_size
            nbytes = prod(shape[:-1]) * row_bytes
            if data + offset + nbytes > self.size:
                raise FormatError(
                    f"{where} ends at byte {data + offset + nbytes}, but the file has {self.size}: "
                    "it is truncated or still being downloaded"
                )
            tensors[name] = GgufTensor(name, shape, type_name, data + offset, row_bytes, nbytes)
        previous = None
        for tensor in sorted(tensors.values(), key=lambda t: t.offset):
            if previous is not None and tensor.offset < previous.offset + previous.nbytes:
                raise FormatError(
                    f"{self.path}: tensors {quoted(previous.name)} and {quoted(tensor.name)} overlap: "
                    f"byte {tensor.offset} belongs to both"
                )
            previous = tensor
        return tensors


def shown(value: Any) -> str:
    """A value of the metadata, safe to print on one line of an error message."""
    if isinstance(value, (list, np.ndarray)):
        return f"an array of {len(value)}"
    return quoted(value)


def _geometry(ggml_id: int, where: str) -> tuple[str, int, int]:
    """Name, weights and bytes of a block of a type, also of one that cannot be decoded."""
    if ggml_id in _TYPES:
        return _TYPES[ggml_id]
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(ggml_id)
        return (kind.name, *GGML_QUANT_SIZES[kind])
    except (ValueError, KeyError):
        raise FormatError(f"{where} has the unknown ggml type {ggml_id}") from None
