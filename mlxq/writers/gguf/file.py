"""The GGUF file: metadata and tensor table through the `gguf` package, tensor data streamed to its place.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Tensors lie one after another, each aligned.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mlxq.errors import FormatError
from mlxq.formats.geometry import block_format
from mlxq.writers.files import write_at, writing
from mlxq.writers.laid_out import LaidOutFiles

#: Metadata on its way into a file: key -> (kind, value); a kind is a GGUF value type, with `[]` for an array of it.
TypedMetadata = dict[str, tuple[str, Any]]

ALIGNMENT = 32
_ARCHITECTURE = "general.architecture"
_KIND = re.compile(r"([a-z0-9]+)(\[\])?")
#: What ggml keeps a tensor's name in, the final zero included (`GGML_MAX_NAME`).
_LONGEST_NAME = 63


@dataclass(frozen=True)
class GgufEntry:
    """One stored tensor: name, ggml type, and shape row-major as in PyTorch (the file holds it reversed)."""

    name: str
    type_name: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        stored = block_format(self.type_name)
        return prod(self.shape) // stored.block_size * stored.type_size


class GgufWriter(LaidOutFiles):
    """Writes `directory / filename`, laid out whole before the first tensor is known.

    Args:
        metadata: what the file says of itself, `general.architecture` included.
        entries: the tensors in file order.

    Raises:
        FormatError: metadata of an unknown kind, a name that is too long, or rows that are not whole blocks.
        OutputError: the file cannot be made.
    """

    def __init__(self, directory: Path, filename: str, metadata: TypedMetadata, entries: Sequence[GgufEntry]):
        super().__init__(directory)
        for entry in entries:
            _check(entry)
        try:
            header = header_bytes(directory / f".{filename}.header", metadata, entries)
            start = _padded(len(header))
            places, offset = {}, 0
            for entry in entries:
                places[entry.name] = (start + offset, entry.nbytes)
                offset += _padded(entry.nbytes)
            self._add_file(filename, header, places, start + offset)
            with writing(directory):
                # Where the system reserves no space, what is never written would be missing at the end.
                for place, nbytes in [(0, len(header)), *places.values()]:
                    write_at(self._fds[0], bytes(_padded(nbytes) - nbytes), place + nbytes)
        except BaseException:
            self.abort()
            raise


def header_bytes(scratch: Path, metadata: TypedMetadata, entries: Sequence[GgufEntry]) -> bytes:
    """Everything before the tensor data, as the `gguf` package writes it by way of a file `scratch`."""
    import gguf

    writer = gguf.GGUFWriter(None, metadata[_ARCHITECTURE][1])
    for key, (kind, value) in metadata.items():
        if key != _ARCHITECTURE:
            _add(writer, key, kind, value)
    for entry in entries:
        kind = gguf.GGMLQuantizationType[entry.type_name]
        # A dtype other than uint8: the shape is taken as it is, in weights.
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.nbytes, raw_dtype=kind)
    with writing(scratch):
        try:
            writer.write_header_to_file(scratch)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.close()
            return scratch.read_bytes()
        finally:
            scratch.unlink(missing_ok=True)


def _add(writer: Any, key: str, kind: str, value: Any) -> None:
    import gguf

    match = _KIND.fullmatch(kind)
    try:
        element = gguf.GGUFValueType[match[1].upper()] if match else None
    except KeyError:
        element = None
    if element is None:
        raise FormatError(f"metadata {key}: {kind!r} is no kind of GGUF value")
    if not match[2]:
        writer.add_key_value(key, value, element)
        return
    values = value.tolist() if isinstance(value, np.ndarray) else list(value)
    # The package cannot write an array of no elements; a reader takes a missing key for one.
    if values:
        writer.add_key_value(key, values, gguf.GGUFValueType.ARRAY, element)


def _check(entry: GgufEntry) -> None:
    stored = block_format(entry.type_name)
    if len(entry.name.encode()) > _LONGEST_NAME:
        raise FormatError(f"tensor name {entry.name!r} is longer than {_LONGEST_NAME} bytes, which ggml cannot hold")
    if entry.shape and entry.shape[-1] % stored.block_size:
        raise FormatError(
            f"{entry.name}: rows of {entry.shape[-1]} weights are not whole {entry.type_name} blocks of "
            f"{stored.block_size}"
        )


def _padded(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT
