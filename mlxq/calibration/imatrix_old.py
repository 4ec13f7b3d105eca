"""The old container of importance matrices, `.dat`: its fields, and no more.

Layout, little-endian (source: `save_imatrix_legacy` in llama.cpp's `tools/imatrix/imatrix.cpp`):

    n_entries i32
    n_entries times:   name, n_calls i32, n_values i32, float32 values [n_values]
    n_chunks i32       left out, with what follows, by the oldest files
    dataset            a name

A name is an i32 length and UTF-8 bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlxq.checkpoint.safetensors import quoted
from mlxq.errors import FormatError

#: name, n_calls, float32 values `[n_values]`
Entry = tuple[str, int, np.ndarray]
#: Bytes of the smallest entry: three numbers, a name of one letter, one value.
_SMALLEST = 17


def encode(entries: Sequence[Entry], n_chunks: int, dataset: str) -> bytes:
    """The file's bytes."""
    out = [struct.pack("<i", len(entries))]
    for name, n_calls, values in entries:
        out += [_name(name), struct.pack("<ii", n_calls, values.size), values.astype("<f4").tobytes()]
    return b"".join([*out, struct.pack("<i", n_chunks), _name(dataset)])


def decode(path: Path, data: bytes) -> tuple[list[Entry], int, str]:
    """Entries, chunks (0 where left out) and dataset ("" where left out) of a file's bytes.

    Raises:
        FormatError: truncated, longer than its fields, or a field that no such file has; the message names it.
    """
    cursor = _Cursor(path, data)
    count = cursor.integer("the number of entries", 1)
    if count > len(data) // _SMALLEST:
        raise FormatError(f"{path}: {count} entries do not fit into {len(data)} bytes: {_NEITHER}")
    entries = []
    for i in range(count):
        name = cursor.text(f"the name of entry {i}", 1)
        n_calls = cursor.integer(f"the number of calls of {quoted(name)}", 0)
        n_values = cursor.integer(f"the number of values of {quoted(name)}", 1)
        values = np.frombuffer(cursor.take(4 * n_values, f"the values of {quoted(name)}"), "<f4")
        entries.append((name, n_calls, values.astype(np.float32)))
    n_chunks = 0 if cursor.at_end else cursor.integer("the number of chunks", 0)
    dataset = "" if cursor.at_end else cursor.text("the dataset's name", 0)
    if not cursor.at_end:
        raise FormatError(f"{path}: {cursor.left} bytes follow the last field")
    return entries, n_chunks, dataset


_NEITHER = "truncated, or neither GGUF nor an importance matrix of the old form"


class _Cursor:
    """Steps over the fields; every length is held against what is left of the file."""

    def __init__(self, path: Path, data: bytes):
        self._path, self._data, self._at = path, data, 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    @property
    def at_end(self) -> bool:
        return self.left == 0

    def take(self, n: int, what: str) -> bytes:
        if n > self.left:
            raise FormatError(
                f"{self._path}: {what} ends at byte {self._at + n}, but the file has {len(self._data)}: {_NEITHER}"
            )
        self._at += n
        return self._data[self._at - n : self._at]

    def integer(self, what: str, least: int) -> int:
        value = struct.unpack("<i", self.take(4, what))[0]
        if value < least:
            raise FormatError(f"{self._path}: {what} is {value}, expected {least} or more: {_NEITHER}")
        return value

    def text(self, what: str, least: int) -> str:
        data = self.take(self.integer(f"the length of {what}", least), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as e:
            raise FormatError(f"{self._path}: {what} is not UTF-8 text: {e.reason}") from e


def _name(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<i", len(data)) + data
