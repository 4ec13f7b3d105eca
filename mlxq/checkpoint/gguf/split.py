"""Split GGUF files: the parts `<name>-00001-of-0000N.gguf` as one source, opened by the name of any of them.

The first part holds the metadata; every part has `split.no` (from 0), `split.count` and `split.tensors.count`, and
tensors of its own (source: `gguf-split.cpp` and `llama_model_loader` in llama.cpp).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np

from mlxq.checkpoint.gguf.file import GgufFile, GgufTensor, shown
from mlxq.checkpoint.safetensors import quoted
from mlxq.errors import CheckpointError, FormatError

_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL | re.ASCII)
_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"
_KEYS = (_NUMBER, _COUNT, _TENSORS)
#: The format stores the number of parts in 16 bits, their names hold five digits.
_MAX_PARTS = 65535


def open_gguf(path: str | Path) -> GgufFile | GgufParts:
    """Open a GGUF file, with all other parts where it is one part of several.

    Raises:
        CheckpointError: a file cannot be opened or read, or a part is missing.
        FormatError: a file is malformed, or the parts do not belong together.
    """
    file = GgufFile(path)
    try:
        count = _natural(file, _COUNT, 1)
        if count <= 1:
            return file
        match = _NAME.fullmatch(file.path.name)
        if match is None or int(match["count"]) != count:
            raise FormatError(
                f"{file.path}: {_COUNT} is {count}: one of {count} parts of a split GGUF, but its name does not end "
                f"in -00001-of-{count:05d}.gguf, by which the others are found: give the parts their names back"
            )
    except BaseException:
        file.close()
        raise
    file.close()
    return GgufParts([file.path.with_name(f"{match['stem']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)])


class GgufParts:
    """All parts of a split GGUF file, read as `GgufFile` is.

    Attributes:
        path: the first part.
        files: all parts, in order.
        metadata: that of the first part, without the keys about splitting.
        tensors: name -> `GgufTensor`, part after part; offsets count as if the parts' bytes followed one another.

    Raises:
        CheckpointError: a part is missing or cannot be read.
        FormatError: a part is malformed, belongs to another file, or is not what its name says.
    """

    def __init__(self, paths: list[Path]):
        self.path, self.files = paths[0], list(paths)
        self._parts: list[GgufFile] = []
        try:
            missing = [p for p in paths if not p.exists()]
            if missing:
                raise CheckpointError(
                    f"{missing[0]}: this part is missing, {len(missing)} of {len(paths)} in all: "
                    f"put the parts into one directory, {paths[0].parent}"
                )
            for path in paths:
                self._parts.append(GgufFile(path))
            self._join()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close all parts; reading afterwards raises CheckpointError."""
        for part in self._parts:
            part.close()

    def read_bytes(self, offset: int, n: int) -> np.ndarray:
        """`n` bytes of one part, uint8 `[n]`, the caller's own; `offset` is a tensor's, or inside of it.

        Raises:
            CheckpointError: the part is closed, or ended early.
        """
        part = bisect_right(self._starts, offset) - 1
        return self._parts[part].read_bytes(offset - self._starts[part], n)

    def _join(self) -> None:
        first = self._parts[0]
        self.metadata = {key: value for key, value in first.metadata.items() if key not in _KEYS}
        self._starts = [0, *accumulate(part.size for part in self._parts[:-1])]
        self.tensors: dict[str, GgufTensor] = {}
        owner: dict[str, GgufFile] = {}
        for number, (part, start) in enumerate(zip(self._parts, self._starts, strict=True)):
            self._check(part, number)
            for name, tensor in part.tensors.items():
                if name in owner:
                    raise FormatError(f"{part.path}: tensor {quoted(name)} is in {owner[name].path.name} too")
                owner[name] = part
                self.tensors[name] = replace(tensor, offset=start + tensor.offset)
        expected = _natural(first, _TENSORS)
        if len(self.tensors) != expected:
            raise FormatError(
                f"{self.path}: {_TENSORS} is {expected}, but the {len(self._parts)} parts have {len(self.tensors)}"
            )

    def _check(self, part: GgufFile, number: int) -> None:
        """A part says of itself what its name says, and of the whole what the first part says."""
        first = self._parts[0].metadata
        for key, expected in ((_NUMBER, number), (_COUNT, len(self._parts))):
            found = _natural(part, key)
            if found != expected:
                raise FormatError(f"{part.path}: {key} is {found}, but its name says {expected}")
        for key, value in part.metadata.items():
            if key != _NUMBER and key in first and not _same(value, first[key]):
                raise FormatError(
                    f"{part.path}: {quoted(key)} is {shown(value)}, but {shown(first[key])} in {self.path.name}: "
                    "the parts are of two files"
                )


def _same(a: object, b: object) -> bool:
    return type(a) is type(b) and (np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b)


def _natural(file: GgufFile, key: str, default: int | None = None) -> int:
    most = (1 << 31) - 1 if key == _TENSORS else _MAX_PARTS
    value = file.metadata.get(key, default)
    if type(value) is not int or not 0 <= value <= most:
        raise FormatError(f"{file.path}: {key} is {shown(value)}, expected an integer from 0 to {most}")
    return value
