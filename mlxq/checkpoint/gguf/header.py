"""The head of a GGUF file, field by field: every length and count is held against what is left of the file first.

A string is a u64 length and UTF-8 bytes; an array is an element type u32, a count u64 and the elements; all numbers
are little-endian (source: ggml's `docs/gguf.md`). Only a window of the head is in memory, and each value once.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mlxq.checkpoint.safetensors import quoted
from mlxq.errors import FormatError

#: Metadata and directory together; the largest vocabularies in use need some 20 MB.
MAX_HEADER = 1 << 29
#: One text; chat templates, the longest, have some 50 kB.
_MAX_STRING = 1 << 24
#: Texts of all arrays together; vocabularies and merges in use have less than a million.
_MAX_STRINGS = 1 << 22
_READ_AHEAD = 1 << 22
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


class Header:
    """A bounded cursor over the head of a file of `size` bytes; `read(offset, n)` gives uint8 `[n]` of it.

    Every method raises FormatError where the file is too short for a field, or the field holds what it must not; the
    message names the field, its value and the rule.
    """

    def __init__(self, path: Path, size: int, read: Callable[[int, int], np.ndarray]):
        self._path, self._size, self._read = path, size, read
        self._limit = min(size, MAX_HEADER)
        #: Bytes of the file from `_base` on; `_at` counts from there.
        self._window = memoryview(b"")
        self._base = self._at = 0
        self._strings_left = _MAX_STRINGS

    @property
    def position(self) -> int:
        """Bytes from the file's start."""
        return self._base + self._at

    def check_count(self, what: str, count: int, smallest: int) -> None:
        """Refuse a count whose smallest possible encoding does not fit into what is left of the file."""
        if count * smallest > self._limit - self.position:
            raise FormatError(
                f"{self._path}: {count} {what} need at least {count * smallest} bytes, but {self._left()}: "
                "it is truncated or corrupt"
            )

    def take(self, n: int, what: str) -> bytes:
        start = self._need(n, what)
        return bytes(self._window[start : start + n])

    def u32(self, what: str) -> int:
        start = self._need(4, what)
        return _U32.unpack_from(self._window, start)[0]

    def u64(self, what: str) -> int:
        start = self._need(8, what)
        return _U64.unpack_from(self._window, start)[0]

    def string(self, what: str) -> str:
        n = self.u64(f"the length of {what}")
        if self._limit - self.position >= n > _MAX_STRING:
            raise FormatError(f"{self._path}: {what} is a text of {n} bytes, expected at most {_MAX_STRING}")
        start = self._need(n, what)
        try:
            return str(self._window[start : start + n], "utf-8")
        except UnicodeDecodeError as e:
            raise FormatError(f"{self._path}: {what} is not UTF-8 text: {e.reason}") from e

    def value(self, key: str) -> Any:
        """The value of a metadata key: an int, float, bool or str, a list of str, or a NumPy array of numbers."""
        name = f"metadata key {quoted(key)}"
        kind = self.u32(f"the type of {name}")
        if kind == _STRING:
            return self.string(name)
        if kind == _ARRAY:
            return self._array(name)
        if kind not in _SCALARS:
            raise FormatError(f"{self._path}: {name} has the unknown value type {kind}, expected 0 to 12")
        code = _SCALARS[kind][0]
        return struct.unpack(code, self.take(struct.calcsize(code), name))[0]

    def _array(self, name: str) -> list[str] | np.ndarray:
        kind, count = self.u32(f"the type of the array {name}"), self.u64(f"the length of the array {name}")
        if kind == _STRING:
            self.check_count(f"strings in {name}", count, 8)
            if count > self._strings_left:
                raise FormatError(f"{self._path}: {name} has {count} strings, expected at most {_MAX_STRINGS} in all")
            self._strings_left -= count
            return self._strings(name, count)
        if kind == _ARRAY:
            raise FormatError(f"{self._path}: {name} is an array of arrays, expected one of numbers or strings")
        if kind not in _SCALARS:
            raise FormatError(f"{self._path}: {name} is an array of the unknown value type {kind}, expected 0 to 12")
        dtype = np.dtype(_SCALARS[kind][1])
        self.check_count(f"numbers in {name}", count, dtype.itemsize)
        values = self._numbers(count * dtype.itemsize, name).view(dtype)
        return values != 0 if kind == _BOOL else values

    def _numbers(self, n: int, what: str) -> np.ndarray:
        if n <= _READ_AHEAD:
            return np.frombuffer(self.take(n, what), np.uint8)
        # Past the window, so that they are in memory once.
        start = self.position
        self._window, self._base, self._at = memoryview(b""), start + n, 0
        return self._read(start, n)

    def _strings(self, name: str, count: int) -> list[str]:
        """`count` strings; the loop of `string` with its calls spelled out, for vocabularies of 10**5 and more."""
        out: list[str] = []
        unpack = _U64.unpack_from
        for _ in range(count):
            start = self._at + 8
            if start + 4096 > len(self._window):
                out.append(self.string(f"a string of {name}"))
                continue
            end = start + unpack(self._window, start - 8)[0]
            if end > len(self._window):
                out.append(self.string(f"a string of {name}"))
                continue
            self._at = end
            try:
                out.append(str(self._window[start:end], "utf-8"))
            except UnicodeDecodeError as e:
                raise FormatError(f"{self._path}: {name}: string {len(out)} is not UTF-8 text: {e.reason}") from e
        return out

    def _need(self, n: int, what: str) -> int:
        """Make `n` more bytes available and step over them; returns where in the window they start."""
        if self._at + n > len(self._window):
            if n > self._limit - self.position:
                raise FormatError(
                    f"{self._path}: {what} needs {n} bytes from byte {self.position}, but {self._left()}: "
                    "it is truncated or not GGUF"
                )
            # What is left of the old window is read again, so that there is never more than one.
            self._base, self._at, self._window = self.position, 0, memoryview(b"")
            self._window = self._read(self._base, min(max(n, _READ_AHEAD), self._limit - self._base)).data
        start = self._at
        self._at += n
        return start

    def _left(self) -> str:
        if self._limit < self._size:
            return f"a header may have {self._limit}"
        return f"the file has {self._size}"
