"""What a scheme gives for each quantized weight, and what it may read: the interface between both."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mlxq.checkpoint.safetensors import Entry, quoted
from mlxq.checkpoint.shards import ShardedTensors
from mlxq.errors import CheckpointError
from mlxq.types import QuantizedTensor, TensorInfo

#: Bytes of a matrix that are read before they are transposed.
_PIECE = 1 << 23
#: Transposed matrices that are remembered: codes, scales and zero points of two tensors.
_REMEMBERED = 6


class RawTensors:
    """Stored tensors as they lie in the files. May be used from several threads.

    Attributes:
        entries: name -> dtype name, shape and bytes of every stored tensor.
    """

    def __init__(self, stored: ShardedTensors):
        self._stored = stored
        self.entries: Mapping[str, Entry] = stored.tensors
        self._columns: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def rows(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor, or a range of its first axis, in the NumPy dtype of `safetensors.NUMPY_DTYPES` (BF16 and the
        8-bit floats as bits).

        Raises:
            CheckpointError: no such tensor, a dtype that NumPy has no storage for, or a file that changed.
        """
        return self._stored.read(name, rows)

    def columns(self, name: str, columns: slice | None = None) -> np.ndarray:
        """A matrix `[a, b]` as its transpose `[b, a]`, or a range of that one's rows.

        The file is read once, in order, and the transpose remembered for the next range: strided reads of a few
        columns would fetch every page of the file again. All columns together are not remembered.

        Raises:
            CheckpointError: as `rows`.
        """
        if columns is None:
            return self._transposed(name)
        with self._lock:
            found = self._columns.pop(name, None)
            if found is None:
                found = self._transposed(name)
            self._columns[name] = found
            while len(self._columns) > _REMEMBERED:
                self._columns.popitem(last=False)
        return found[columns]

    def _transposed(self, name: str) -> np.ndarray:
        n_rows, n_columns = self.entries[name].shape
        step = max(_PIECE * n_rows // max(self.entries[name].nbytes, 1), 1)
        out = None
        for start in range(0, n_rows, step):
            piece = self.rows(name, slice(start, start + step))
            if out is None:
                out = np.empty((n_columns, n_rows), piece.dtype)
            out[:, start : start + step] = piece.T
        return np.empty((n_columns, 0), self.rows(name).dtype) if out is None else out

    def close(self) -> None:
        """Forget what is remembered."""
        with self._lock:
            self._columns.clear()


class Packed(ABC):
    """One logical tensor, stored in parts.

    Attributes:
        info: the logical tensor: its Hugging Face name (`...q_proj.weight`), its shape in weights, the format's name
            as dtype, all parts' bytes. `spec` is set where `codes` are these weights exactly, in the columns' order as
            stored; then `scales_dtype` is the float type that scales and biases need for that. `permuted_spec` is set
            instead where they are once the columns are put in the order of `order`.
        parts: names of the stored tensors that it is made of.
    """

    def __init__(self, info: TensorInfo, parts: tuple[str, ...]):
        self.info = info
        self.parts = parts

    @abstractmethod
    def values(self, raw: RawTensors, rows: slice | None) -> np.ndarray:
        """The weights by the producer's own formula, computed in float32: `info.shape`, first axis cut by `rows`.

        Raises:
            FormatError: scales that are not finite, or codes that mean nothing.
        """

    def codes(self, raw: RawTensors, rows: slice | None) -> QuantizedTensor:
        """The same weights as codes of `info.spec` or `info.permuted_spec`, first axis cut by `rows`.

        Scales and biases come in `info.scales_dtype`, or wider where these rows need it.

        Raises:
            FormatError: as `values`.
        """
        raise NotImplementedError(f"{self.info.dtype} has no affine grid")

    def order(self, raw: RawTensors) -> np.ndarray:
        """Column of the logical tensor that each column of `codes` is, int32 `[K]`; for `permuted_spec` only."""
        raise NotImplementedError(f"{self.info.dtype} columns are in order")


class Source(NamedTuple):
    """What a scheme makes its tensors from.

    `settings` are those of the quantization (`quantization_config`), `config` config.json without them; `where` names
    the model in messages.
    """

    settings: dict[str, Any]
    config: dict[str, Any]
    raw: RawTensors
    where: str


class Scheme(NamedTuple):
    """How one `quant_method` is read.

    `check(settings, where)` refuses by name what cannot be read, before any weight is: settings alone are looked at.
    `collect(source)` gives the logical tensors by name, headers and small parts looked at; every stored tensor that
    none of them names stays a tensor of its own.
    Both raise CheckpointError.
    """

    check: Callable[[dict[str, Any], str], None]
    collect: Callable[[Source], dict[str, Packed]]


def part(source: Source, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None = None) -> Entry:
    """The stored tensor `name`, its dtype one of `dtypes`, its shape as given.

    Raises:
        CheckpointError: it is missing, or of another dtype or shape.
    """
    entry = source.raw.entries.get(name)
    where = f"{source.where}: {quoted(name)}"
    if entry is None:
        raise CheckpointError(f"{where} is missing")
    if entry.dtype not in dtypes:
        raise CheckpointError(f"{where} is {entry.dtype}, but must be {' or '.join(dtypes)}")
    if shape is not None and entry.shape != shape:
        raise CheckpointError(
            f"{where} is {list(entry.shape)}, but with the other parts and the settings it must be {list(shape)}"
        )
    return entry
