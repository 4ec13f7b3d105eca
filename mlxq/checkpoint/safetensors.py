"""A strict reader of safetensors files. Everything is checked against the file's size before anything is allocated.

Layout (README of the repository huggingface/safetensors):

    8 bytes          N, little-endian unsigned length of the header
    N bytes          JSON: {"name": {"dtype", "shape", "data_offsets": [begin, end]}, ..., "__metadata__": {...}}
    the rest         the tensors' bytes, row-major, little-endian; the offsets cover it without gap or overlap

Tensors are read with plain reads into NumPy buffers, by rows of the first axis. Nothing is mapped, so resident memory
is what the caller holds and no more.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlxq.errors import CheckpointError

#: The largest header that is parsed, in bytes; the format's own limit.
MAX_HEADER_BYTES = 100_000_000
#: Sizes and offsets must fit a signed 64-bit integer, as file offsets do.
_MAX_INT = 2**63 - 1
#: NumPy 1 has no arrays of more axes.
_MAX_RANK = 32

#: Bits of one element of every dtype that the format defines.
DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64, "BOOL": 8,
    "I64": 64, "U64": 64, "I32": 32, "U32": 32, "I16": 16, "U16": 16, "I8": 8, "U8": 8,
}  # fmt: skip

#: The dtypes that can be read, and what they become in NumPy. BF16 and floats of 8 bits stay bits.
NUMPY_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?",
    "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1",
    "I64": "<i8", "U64": "<u8", "I32": "<i4", "U32": "<u4", "I16": "<i2", "U16": "<u2", "I8": "i1", "U8": "u1",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype name, shape, and place in the file in bytes from the start."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def quoted(name: object) -> str:
    """A name out of a file, safe to print on one line of an error message."""
    text = repr(name)
    return text if len(text) <= 160 else f"{text[:157]}..."


class SafetensorsFile:
    """One safetensors file, its header read and validated.

    Attributes:
        path: the file.
        tensors: name -> `Entry`, in the order of their bytes in the file.
        metadata: the header's `__metadata__`, text to text.

    Raises:
        CheckpointError: the file is missing, truncated, or breaks a rule of the format.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as f:
                self._size = os.fstat(f.fileno()).st_size
                header, start = self._read_header(f)
        except OSError as e:
            raise CheckpointError(f"{self.path}: cannot be read: {e.strerror or e}") from e
        self.metadata = self._check_metadata(header.pop("__metadata__", None))
        entries = {name: self._entry(name, info, start) for name, info in header.items()}
        self.tensors = dict(sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
        self._check_coverage(start)

    def _fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}")

    def _read_header(self, f: BinaryIO) -> tuple[dict[str, Any], int]:
        if self._size < 8:
            raise self._fail(f"not a safetensors file: {self._size} bytes, but the header's length alone takes 8")
        n = int.from_bytes(f.read(8), "little")
        if n > MAX_HEADER_BYTES:
            raise self._fail(f"not a safetensors file: a header of {n} bytes, at most {MAX_HEADER_BYTES} are allowed")
        if 8 + n > self._size:
            raise self._fail(
                f"truncated: the header takes {n} bytes, but the file has {self._size - 8} after its length"
            )
        raw = f.read(n)
        if len(raw) != n:
            raise self._fail(f"truncated: the header takes {n} bytes, {len(raw)} could be read")
        try:
            header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
        except (ValueError, RecursionError) as e:
            raise self._fail(f"the header is not valid JSON: {_one_line(e)}") from e
        if not isinstance(header, dict):
            raise self._fail(f"the header is a JSON {type(header).__name__}, not an object")
        return header, 8 + n

    def _check_metadata(self, metadata: Any) -> dict[str, str]:
        if metadata is None:
            return {}
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._fail("__metadata__ of the header must map text to text")
        return metadata

    def _entry(self, name: str, info: Any, start: int) -> Entry:
        where = f"tensor {quoted(name)}"
        if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
            raise self._fail(f"{where} must have dtype, shape and data_offsets, and nothing else")
        dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            raise self._fail(f"{where} has the unknown dtype {quoted(dtype)}; known: {', '.join(DTYPE_BITS)}")
        if not _are_sizes(shape):
            raise self._fail(f"{where} has shape {quoted(shape)}; it must be a list of integers that are not negative")
        if not _are_sizes(offsets) or len(offsets) != 2:
            raise self._fail(
                f"{where} has data_offsets {quoted(offsets)}; they must be two integers that are not negative"
            )
        if len(shape) > _MAX_RANK:
            raise self._fail(f"{where} has {len(shape)} axes; at most {_MAX_RANK} can be read")
        begin, end = offsets
        available = self._size - start
        if end < begin or end > available:
            raise self._fail(
                f"{where} has data_offsets [{begin}, {end}], which do not lie in the {available} bytes after the header"
                " (is the file truncated?)"
            )
        # An empty tensor's other sizes must fit too: NumPy multiplies them before it sees the zero.
        if DTYPE_BITS[dtype] * math.prod(max(dim, 1) for dim in shape) > _MAX_INT:
            raise self._fail(f"{where} has shape {quoted(shape)}: its size overflows 64 bits")
        n_bits = DTYPE_BITS[dtype] * math.prod(shape)
        if n_bits % 8 or n_bits // 8 != end - begin:
            raise self._fail(
                f"{where} of shape {quoted(shape)} and dtype {dtype} takes {n_bits / 8:.10g} bytes,"
                f" but data_offsets span {end - begin}"
            )
        return Entry(dtype, tuple(shape), start + begin, end - begin)

    def _check_coverage(self, start: int) -> None:
        position, before = start, "the header"
        for name, entry in self.tensors.items():
            if entry.offset != position:
                what = "overlaps" if entry.offset < position else f"leaves {entry.offset - position} unused bytes after"
                raise self._fail(f"tensor {quoted(name)} {what} {before}")
            position, before = entry.offset + entry.nbytes, f"tensor {quoted(name)}"
        if position != self._size:
            raise self._fail(f"{self._size - position} bytes after {before} belong to no tensor")

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Values of a tensor, or of a contiguous range of its first axis, in a new array.

        Shapes and dtypes are the file's own; BF16 comes as uint16 bits.

        Raises:
            CheckpointError: no such tensor, a dtype NumPy cannot hold, or the file changed since it was opened.
            ValueError: `rows` skips rows, or the tensor has no axis to cut.
        """
        entry = self.tensors.get(name)
        if entry is None:
            raise self._fail(f"no tensor {quoted(name)}")
        if entry.dtype not in NUMPY_DTYPES:
            raise self._fail(f"tensor {quoted(name)} is {entry.dtype}, which cannot be read yet")
        dtype = np.dtype(NUMPY_DTYPES[entry.dtype])
        shape, offset = entry.shape, entry.offset
        if rows is not None:
            first, count = row_range(rows, shape)
            row_bytes = entry.nbytes // shape[0] if shape[0] else 0
            shape, offset = (count, *shape[1:]), offset + first * row_bytes
        out = np.empty(shape, dtype)
        self._fill(out, offset, name)
        return out

    def _fill(self, out: np.ndarray, offset: int, name: str) -> None:
        """Read `out.nbytes` bytes at `offset`. The file is opened for each read, so that many shards stay closed."""
        if out.nbytes == 0:
            return
        buffer = memoryview(out.reshape(-1)).cast("B")
        try:
            with open(self.path, "rb", buffering=0) as f:
                if os.fstat(f.fileno()).st_size != self._size:
                    raise self._fail("the file changed while it was being read")
                f.seek(offset)
                done = 0
                while done < len(buffer):
                    n = f.readinto(buffer[done:])
                    if not n:
                        raise self._fail(f"the file ended inside tensor {quoted(name)}")
                    done += n
        except OSError as e:
            raise self._fail(f"cannot be read: {e.strerror or e}") from e


def row_range(rows: slice, shape: tuple[int, ...]) -> tuple[int, int]:
    """`(first, count)` of a slice of the first axis.

    Raises:
        ValueError: the slice skips or reverses rows, or `shape` has no axis.
    """
    if not shape:
        raise ValueError("a scalar has no rows to cut")
    start, stop, step = rows.indices(shape[0])
    if step != 1:
        raise ValueError(f"rows must be contiguous and ascending, got step {step}")
    return start, max(stop - start, 0)


def _are_sizes(values: Any) -> bool:
    # A JSON true is an int to Python: compare types exactly.
    return isinstance(values, list) and all(type(v) is int and 0 <= v <= _MAX_INT for v in values)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"duplicate key {quoted(key)}")
            seen.add(key)
    return result


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."
