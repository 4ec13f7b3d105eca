"""How far each tensor of a result is from its source: decoded weights compared by rows, whatever either format is.

A tensor that was taken over as it is (the same codes in the same grid, or floats of the same type) is compared bit for
bit instead: two formats may round what they decode differently, up to 2^-11 twice in float16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxq.architectures.parameters import ParameterMap
from mlxq.evaluate.bounds import expected_rmse, largest_rmse, precision, smallest_step
from mlxq.formats.floats import all_finite, dtype_of, to_float32
from mlxq.types import CancelToken, QuantSpec, TensorInfo

#: Weights compared at a time.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class TensorError:
    """`rmse` is `|w_hat - w| / |w|` over the tensor `name` of a result, NaN where it is not finite.

    `exact` says that it should hold the source's own codes or floats; then `rmse` is 0 where all bits are the same.
    `negligible` says that the error is no larger than the smallest step of the grid, whatever part of tiny weights.
    """

    name: str
    rmse: float
    spec: QuantSpec | None
    exact: bool = False
    negligible: bool = False

    @property
    def expected(self) -> float:
        """What rounding to the tensor's format causes in ordinary weights."""
        return 0.0 if self.exact else expected_rmse(self.spec)

    @property
    def broken(self) -> bool:
        """Whether it is further from its source than rounding can bring it."""
        if self.exact:
            return self.rmse != 0
        return not (self.negligible or self.rmse <= largest_rmse(self.spec))

    @property
    def excess(self) -> float:
        """How many times the expected error it has; infinite when it is not finite or none is expected."""
        if self.negligible or self.rmse == 0:
            return 0.0
        return self.rmse / self.expected if math.isfinite(self.rmse) and self.expected else math.inf

    def __str__(self) -> str:
        size = f"{self.rmse:.2g}" if math.isfinite(self.rmse) else "not finite"
        format_ = str(self.spec) if self.spec else "float"
        what = f"{format_} as in the source" if self.exact else f"{format_} explains {self.expected:.2g}"
        return f"{self.name} (relative RMSE {size}, {what})"

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "relative_rmse": self.rmse if math.isfinite(self.rmse) else None,
            "expected": self.expected,
        }


def same_format(source: TensorInfo | None, result: TensorInfo) -> bool:
    """Whether a tensor of a result holds the source's own codes, or its floats in the same type."""
    if source is None or source.spec != result.spec:
        return False
    return source.scales_dtype == result.scales_dtype if result.spec else source.dtype == result.dtype


def tensor_errors(source: ParameterMap, result: ParameterMap, cancel: CancelToken | None = None) -> list[TensorError]:
    """The error of every tensor that both have, the furthest beyond what its format explains first.

    Raises:
        CheckpointError: a tensor cannot be read.
        Cancelled: through `cancel`.
    """
    errors = []
    for name, info in result.tensors.items():
        if name not in source.tensors or source.tensors[name].shape != info.shape:
            continue
        exact = same_format(source.tensors[name], info)
        if exact and _same_bits(source, result, info, cancel):
            errors.append(TensorError(name, 0.0, precision(info), exact))
            continue
        rmse, negligible = _relative_rmse(source, result, info, cancel)
        errors.append(TensorError(name, rmse, precision(info), exact, negligible and not exact))
    return sorted(errors, key=lambda e: (-e.excess, -e.rmse if math.isfinite(e.rmse) else -math.inf))


def not_finite(parameters: ParameterMap, cancel: CancelToken | None = None) -> list[str]:
    """Names of the tensors whose values, or scales or biases, are not all finite. Codes always are.

    Raises:
        CheckpointError: a tensor cannot be read.
        Cancelled: through `cancel`.
    """
    return [
        info.name
        for info in parameters.tensors.values()
        if not all(all_finite(a) for rows in _parts(info, cancel) for a in _floats(parameters, info, rows))
    ]


def _floats(parameters: ParameterMap, info: TensorInfo, rows: slice | None) -> list[np.ndarray]:
    if info.spec is None:
        return [parameters.read(info.name, rows)]
    quantized = parameters.read_quantized(info.name, rows)
    # What stands for no number in a float mode is refused when it is read.
    return [] if quantized.biases is None else [quantized.scales, quantized.biases]


def _same_bits(source: ParameterMap, result: ParameterMap, info: TensorInfo, cancel: CancelToken | None) -> bool:
    for rows in _parts(info, cancel):
        if info.spec is None:
            pairs = [(source.read(info.name, rows), result.read(info.name, rows))]
        else:
            a, b = (p.read_quantized(info.name, rows) for p in (source, result))
            pairs = [(a.w_q, b.w_q), (a.scales, b.scales)]
            pairs += [] if a.biases is None else [(a.biases, b.biases)]
        if not all(np.array_equal(_bits(a), _bits(b)) for a, b in pairs):
            return False
    return True


def _bits(a: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(a).reshape(-1).view(f"u{a.itemsize}")


def _relative_rmse(
    source: ParameterMap, result: ParameterMap, info: TensorInfo, cancel: CancelToken | None
) -> tuple[float, bool]:
    """Relative RMSE of a tensor, and whether each weight is (in the mean square) within the smallest step."""
    difference = size = 0.0
    for rows in _parts(info, cancel):
        w, w_hat = _float32(source, info.name, rows), _float32(result, info.name, rows)
        size += float(np.vdot(w, w))
        w_hat -= w
        difference += float(np.vdot(w_hat, w_hat))
    if not math.isfinite(difference):
        return math.nan, False
    dtype = info.scales_dtype if info.spec else info.dtype
    negligible = difference <= info.size * smallest_step(info.spec, dtype) ** 2
    return math.sqrt(difference / size) if size else (math.inf if difference else 0.0), negligible


def _parts(info: TensorInfo, cancel: CancelToken | None) -> Iterator[slice | None]:
    """Ranges of rows of at most `_CHUNK` weights; the work can be cancelled before each."""
    for rows in info.row_ranges(_CHUNK):
        if cancel is not None:
            cancel.check()
        yield rows


def _float32(parameters: ParameterMap, name: str, rows: slice | None) -> np.ndarray:
    values = parameters.read(name, rows)
    return np.array(to_float32(values, dtype_of(values)))
