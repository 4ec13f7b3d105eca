"""Sharded safetensors files, laid out before the first byte is known and filled in any order.

The plan fixes every size, so headers are written first and parts of tensors go straight to their place: no shard is
ever held in memory. Format: https://huggingface.co/docs/safetensors, 8-byte little-endian header length, JSON
header, data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlxq.checkpoint.shards import INDEX
from mlxq.types import FLOAT_BYTES
from mlxq.writers.files import writing
from mlxq.writers.laid_out import LaidOutFiles

#: Bytes after which a new shard begins, as on the Hub and in mlx-lm.
MAX_SHARD_BYTES = 5 << 30
#: Codes (signed in GPTQ and AWQ files), scales of float modes, and the float types of everything else: no other type
#: is ever planned.
_ITEM_BYTES = {"U32": 4, "I32": 4, "U8": 1} | FLOAT_BYTES


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


class SafetensorsWriter(LaidOutFiles):
    """Writes tensors into `directory` as `model.safetensors` or `model-0000i-of-0000n.safetensors` with an index.

    `groups` lists the entries that must share a shard (a weight with its scales and biases); `format` is what the
    metadata names, `mlx` or `pt`.
    """

    def __init__(
        self,
        directory: Path,
        groups: Iterable[Sequence[Entry]],
        max_shard_bytes: int = MAX_SHARD_BYTES,
        *,
        format: str = "mlx",
    ):
        super().__init__(directory)
        self._format = format
        shards = _shards(groups, max_shard_bytes)
        total = len(shards)
        try:
            for i, entries in enumerate(shards, 1):
                self._open("model.safetensors" if total == 1 else f"model-{i:05d}-of-{total:05d}.safetensors", entries)
        except BaseException:
            self.abort()
            raise

    def _open(self, name: str, entries: list[Entry]) -> None:
        # Wide items first keep every tensor aligned to its item size, as the reference writer does.
        ordered = sorted(entries, key=lambda e: -_ITEM_BYTES[e.dtype])
        header: dict[str, object] = {"__metadata__": {"format": self._format}}
        places, offset = {}, 0
        for e in ordered:
            header[e.name] = {
                "dtype": e.dtype,
                "shape": list(e.shape),
                "data_offsets": [offset, offset + e.nbytes],
            }
            places[e.name] = (offset, e.nbytes)
            offset += e.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        places = {name: (start + at, nbytes) for name, (at, nbytes) in places.items()}
        self._add_file(name, len(text).to_bytes(8, "little") + text, places, start + offset)

    def _write_index(self) -> dict[str, str]:
        weight_map = {name: self._names[place[0]] for name, place in sorted(self._place.items())}
        index = {"metadata": {"total_size": sum(p[2] for p in self._place.values())}, "weight_map": weight_map}
        content = (json.dumps(index, indent=2) + "\n").encode()
        with writing(self.directory):
            (self.directory / INDEX).write_bytes(content)
        return {INDEX: hashlib.sha256(content).hexdigest()}


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
