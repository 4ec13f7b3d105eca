"""How far each tensor of a result is from its source: decoded weights compared by rows, whatever either format is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxq.architectures.parameters import ParameterMap
from mlxq.evaluate.bounds import expected_rmse, largest_rmse
from mlxq.formats.floats import dtype_of, to_float32
from mlxq.types import CancelToken, QuantSpec, TensorInfo

#: Weights compared at a time.
_CHUNK = 1 << 22
#: Relative RMSE of the same weights, should one format decode them with float16 arithmetic (roundoff 2^-11).
_EXACT = 1e-3


@dataclass(frozen=True)
class TensorError:
    """`rmse` is `|w_hat - w| / |w|` over the tensor `name` of a result, NaN where it is not finite.

    `exact` says that it holds the source's own codes or floats.
    """

    name: str
    rmse: float
    spec: QuantSpec | None
    exact: bool = False

    @property
    def expected(self) -> float:
        """What rounding to the tensor's format causes in ordinary weights."""
        return _EXACT if self.exact else expected_rmse(self.spec)

    @property
    def broken(self) -> bool:
        """Whether it is further from its source than rounding can bring it."""
        return not self.rmse <= (_EXACT if self.exact else largest_rmse(self.spec))

    @property
    def excess(self) -> float:
        """How many times the expected error it has; infinite when it is not finite."""
        return self.rmse / self.expected if math.isfinite(self.rmse) else math.inf

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
        errors.append(
            TensorError(
                name, _relative_rmse(source, result, name, cancel), info.spec, same_format(source.tensors[name], info)
            )
        )
    return sorted(errors, key=lambda e: -e.excess)


def _relative_rmse(source: ParameterMap, result: ParameterMap, name: str, cancel: CancelToken | None) -> float:
    info = result.tensors[name]
    n_rows = info.shape[0] if info.shape else 0
    step = max(_CHUNK // max(info.size // max(n_rows, 1), 1), 1)
    parts = [slice(i, min(i + step, n_rows)) for i in range(0, n_rows, step)] or [None]
    difference = size = 0.0
    for rows in parts:
        if cancel is not None:
            cancel.check()
        w, w_hat = _float32(source, name, rows), _float32(result, name, rows)
        size += float(np.vdot(w, w))
        w_hat -= w
        difference += float(np.vdot(w_hat, w_hat))
    if not math.isfinite(difference):
        return math.nan
    return math.sqrt(difference / size) if size else (math.inf if difference else 0.0)


def _float32(parameters: ParameterMap, name: str, rows: slice | None) -> np.ndarray:
    values = parameters.read(name, rows)
    return np.array(to_float32(values, dtype_of(values)))
