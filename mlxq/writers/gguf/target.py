"""What of a planned tensor is stored in a GGUF file: its rows in ggml's order, as blocks of its type or as floats."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlxq.architectures.parameters import ParameterMap
from mlxq.checkpoint.gguf.heads import permuted_rows
from mlxq.checkpoint.gguf.names import MappedTensor
from mlxq.errors import FormatError
from mlxq.formats import crossings, floats, ggml
from mlxq.plan.planner import Plan
from mlxq.quantizers import ggml as encoders
from mlxq.types import FLOAT_BYTES, Action, QuantizedTensor, TensorPlan
from mlxq.writers.gguf.file import ALIGNMENT, GgufEntry, GgufWriter, TypedMetadata, header_bytes
from mlxq.writers.measured import MeasuredErrors
from mlxq.writers.weighting import Weighting

_SAID: dict[Action, str] = {
    "keep": "rounded to another float type",
    "repack": "written with their codes, and scales rounded to float16",
    "requantize": "quantized anew from quantized weights",
}


def bytes_beside(metadata: TypedMetadata, plan: Plan, names: Mapping[str, str], rope: Mapping[str, np.ndarray]) -> int:
    """Bytes of a file that are not of the plan's tensors, padding included, whatever their types; at most."""
    weights = [GgufEntry(names[p.info.name], "F32", p.info.shape) for p in plan.tensors]
    factors = [GgufEntry(name, "F32", values.shape) for name, values in rope.items()]
    with tempfile.TemporaryDirectory() as scratch:
        header = header_bytes(Path(scratch) / "header", metadata, [*factors, *weights])
    return len(header) + ALIGNMENT * (1 + len(weights)) + sum(f.nbytes + ALIGNMENT for f in factors)


class Codes(Protocol):
    """Blocks by parameter name that are there before anything is written, uint8 `[..., row_bytes]`."""

    def __contains__(self, name: str) -> bool: ...

    def read(self, name: str, rows: slice | None = None) -> np.ndarray: ...


class GgufTarget:
    """The one file of a GGUF model.

    Args:
        parameters: where the weights come from.
        plan: `TensorPlan.dtype` is each tensor's ggml type.
        names: parameter -> its name in the file, and what is done to its values.
        metadata: the file's.
        rope: tensors of rotary factors by their GGUF names, float32.
        weighting: of the squared errors.
        filename: in the directory that `open` is given.
        codes: blocks that calibration made of tensors already, by parameter, or None.
    """

    def __init__(
        self,
        parameters: ParameterMap,
        plan: Plan,
        names: Mapping[str, MappedTensor],
        metadata: TypedMetadata,
        rope: Mapping[str, np.ndarray],
        weighting: Weighting,
        filename: str,
        codes: Codes | None = None,
    ):
        self.parameters = parameters
        self.plan = plan
        self.errors = MeasuredErrors()
        self._names = names
        self._metadata = metadata
        self._rope = rope
        self._weighting = weighting
        self._filename = filename
        self._codes = codes

    def open(self, directory: Path) -> GgufWriter:
        weights = [self._entry(p) for p in self.plan.tensors]
        rope = [GgufEntry(name, "F32", values.shape) for name, values in self._rope.items()]
        writer = GgufWriter(directory, self._filename, self._metadata, [*rope, *weights])
        for name, values in self._rope.items():
            writer.write(name, values.astype("<f4").data)
        return writer

    def _entry(self, plan: TensorPlan) -> GgufEntry:
        return GgufEntry(self._names[plan.info.name].name, plan.dtype, plan.info.shape)

    def parts(
        self, plan: TensorPlan, rows: slice | None, check: Callable[[], None]
    ) -> Iterator[tuple[str, int, memoryview]]:
        entry = self._entry(plan)
        offset = entry.nbytes // plan.info.shape[0] * rows.start if rows else 0
        for array in self._convert(plan, rows, check):
            data = memoryview(np.ascontiguousarray(array)).cast("B")
            yield entry.name, offset, data
            offset += data.nbytes

    def _convert(self, plan: TensorPlan, rows: slice | None, check: Callable[[], None]) -> Iterator[np.ndarray]:
        name, mapped = plan.info.name, self._names[plan.info.name]
        if plan.action == "repack":
            yield self._repack(plan, rows, mapped)
            return
        if self._codes is not None and name in self._codes:
            blocks = self._read(self._codes.read, plan, rows, mapped)
            if plan.action == "requantize":
                w = self._read(self.parameters.read, plan, rows, mapped)
                self.errors.add(name, floats.to_float32(w, floats.dtype_of(w)), ggml.dequantize(blocks, plan.dtype))
            yield blocks
            return
        w = self._read(self.parameters.read, plan, rows, mapped)
        if not floats.all_finite(w):
            raise FormatError("a weight is NaN or infinite")
        if plan.dtype in FLOAT_BYTES:
            yield self._cast(plan, w, mapped)
            return
        for part, importance in self._weighting.matrices(w, plan.info, rows):
            check()
            part = floats.to_float32(part, floats.dtype_of(part))
            blocks = encoders.quantize(part, plan.dtype, importance)
            # The divergence that the proof measures says what plain quantization costs.
            if plan.action == "requantize":
                self.errors.add(name, part, ggml.dequantize(blocks, plan.dtype))
            yield blocks

    def _read(self, read: Callable[..., Any], plan: TensorPlan, rows: slice | None, mapped: MappedTensor) -> Any:
        """Rows in ggml's order. Those of a head are read together, and of them the ones asked for are taken."""
        name = plan.info.name
        if not mapped.permuted or rows is None:
            return read(name, rows)
        head_dim = plan.info.shape[0] // self.parameters.checkpoint.config[mapped.heads]
        first, last = rows.start // head_dim * head_dim, -(-rows.stop // head_dim) * head_dim
        values = read(name, slice(first, last))
        order = permuted_rows(rows.start, rows.stop, head_dim) - first
        if isinstance(values, QuantizedTensor):
            parts = {k: getattr(values, k) for k in ("w_q", "scales", "biases")}
            parts = {k: a[order] for k, a in parts.items() if a is not None}
            return replace(values, **parts, shape=(len(order), *values.shape[1:]))
        return values[order]

    def _repack(self, plan: TensorPlan, rows: slice | None, mapped: MappedTensor) -> np.ndarray:
        if plan.info.dtype == plan.dtype:
            return self._read(self.parameters.read_blocks, plan, rows, mapped)
        q = self._read(self.parameters.read_quantized, plan, rows, mapped)
        blocks = crossings.from_affine(q, plan.dtype)
        exact = crossings.dequantize(q)
        self.errors.add(plan.info.name, exact, ggml.dequantize(blocks, plan.dtype).reshape(exact.shape))
        return blocks

    def notes(self) -> list[str]:
        """What was lost beside the quantization that was asked for; to be read when all is written."""
        return self.errors.notes(self.plan.tensors, _SAID)

    def _cast(self, plan: TensorPlan, w: np.ndarray, mapped: MappedTensor) -> np.ndarray:
        dtype = floats.dtype_of(w)
        if dtype == plan.dtype and not mapped.norm_offset:
            return w
        exact = floats.to_float32(w, dtype) + np.float32(mapped.norm_offset)
        cast = floats.from_float32(exact, plan.dtype)
        if not floats.all_finite(cast):
            raise FormatError(f"the weights exceed the range of {plan.dtype}; choose another type")
        self.errors.add(plan.info.name, exact, floats.to_float32(cast, plan.dtype))
        return cast
