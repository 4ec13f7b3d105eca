"""The MLX directory: affine tensors in safetensors, `config.json` with every override explicit, as mlx-lm reads it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlxq.architectures.parameters import ParameterMap
from mlxq.checkpoint.config import to_json
from mlxq.errors import FormatError
from mlxq.formats import floats
from mlxq.plan.planner import Plan
from mlxq.quantizers import rtn
from mlxq.types import DTYPE_NAMES, QuantizedTensor, QuantSpec, TensorPlan
from mlxq.writers.safetensors import Entry, SafetensorsWriter
from mlxq.writers.stream import CHUNK_WEIGHTS


class MlxTarget:
    """The weights of an MLX directory. `notes()` afterwards says what rounding kept tensors cost."""

    def __init__(self, parameters: ParameterMap, plan: Plan):
        self.parameters = parameters
        self.plan = plan
        self._rounding: dict[str, float] = {}
        self._lock = threading.Lock()

    def open(self, directory: Path) -> SafetensorsWriter:
        return SafetensorsWriter(directory, [entries(p) for p in self.plan.tensors])

    def parts(
        self, plan: TensorPlan, rows: slice | None, check: Callable[[], None]
    ) -> Iterator[tuple[str, int, memoryview]]:
        stored = entries(plan)
        # Bytes of each stored tensor before these rows.
        offsets = [e.nbytes // plan.info.shape[0] * rows.start if rows else 0 for e in stored]
        for arrays in self._convert(plan, rows, check):
            for i, (entry, array) in enumerate(zip(stored, arrays, strict=True)):
                data = memoryview(np.ascontiguousarray(array)).cast("B")
                yield entry.name, offsets[i], data
                offsets[i] += data.nbytes

    def _convert(
        self, plan: TensorPlan, rows: slice | None, check: Callable[[], None]
    ) -> Iterator[tuple[np.ndarray, ...]]:
        """The arrays of these rows, one after another where a row alone is large (one expert of a stack)."""
        if plan.action == "repack":
            yield _arrays(self.parameters.read_quantized(plan.info.name, rows))
            return
        w = self.parameters.read(plan.info.name, rows)
        if plan.spec is None:
            yield (self._cast(plan, w),)
            return
        matrix = w.reshape(-1, w.shape[-1])
        step = max(CHUNK_WEIGHTS // matrix.shape[1], 1)
        for start in range(0, len(matrix), step):
            check()
            yield _arrays(rtn.quantize(matrix[start : start + step], plan.spec, plan.dtype))

    def _cast(self, plan: TensorPlan, w: np.ndarray) -> np.ndarray:
        """A kept tensor in its stored dtype; what rounding changes is noted."""
        if not floats.all_finite(w):
            raise FormatError("a weight is NaN or infinite")
        dtype = floats.dtype_of(w)
        if dtype == plan.dtype:
            return w
        exact = floats.to_float32(w, dtype)
        cast = floats.from_float32(exact, plan.dtype)
        if not floats.all_finite(cast):
            raise FormatError(f"the weights exceed the range of {plan.dtype}; choose another --dtype")
        largest = np.abs(exact).max(initial=0)
        error = np.abs(floats.to_float32(cast, plan.dtype) - exact).max(initial=0) / largest if largest else 0.0
        with self._lock:
            self._rounding[plan.info.name] = max(self._rounding.get(plan.info.name, 0.0), float(error))
        return cast

    def notes(self) -> list[str]:
        """What was lost beside the quantization that was asked for; to be read when all is written."""
        rounded = {name: error for name, error in self._rounding.items() if error}
        if not rounded:
            return []
        worst = max(rounded, key=lambda n: rounded[n])
        return [
            f"{len(rounded)} kept tensors were rounded to {self.plan.dtype}; the largest error is "
            f"{rounded[worst]:.1e} of the tensor's maximum, in {worst}"
        ]


def _arrays(q: QuantizedTensor) -> tuple[np.ndarray, ...]:
    return q.w_q, q.scales, q.biases


def entries(plan: TensorPlan) -> list[Entry]:
    """The stored tensors of a planned one: the tensor itself, or its codes, scales and biases."""
    info, spec = plan.info, plan.spec
    if spec is None:
        return [Entry(info.name, plan.dtype, info.shape)]
    path = info.name.removesuffix("weight")
    lead, in_features = info.shape[:-1], info.shape[-1]
    groups = (*lead, in_features // spec.group_size)
    return [
        Entry(info.name, "U32", (*lead, in_features * spec.bits // 32)),
        Entry(f"{path}scales", plan.dtype, groups),
        Entry(f"{path}biases", plan.dtype, groups),
    ]


def config_json(config: dict[str, Any], plans: Sequence[TensorPlan], dtype: str) -> bytes:
    """The source's configuration with `quantization` (repeated as `quantization_config`) and the stored dtype."""
    out = {k: v for k, v in config.items() if k not in ("quantization", "quantization_config", "torch_dtype")}
    out["dtype"] = out["torch_dtype"] = DTYPE_NAMES.get(dtype, dtype)
    quantization = _quantization(plans)
    if quantization:
        out["quantization"] = quantization
        out["quantization_config"] = quantization
    return to_json(out).encode()


def _quantization(plans: Sequence[TensorPlan]) -> dict[str, Any] | None:
    weights: dict[QuantSpec, int] = {}
    for p in plans:
        if p.spec:
            weights[p.spec] = weights.get(p.spec, 0) + p.info.size
    if not weights:
        return None
    base = max(weights, key=lambda s: weights[s])
    out: dict[str, Any] = _as_dict(base)
    for p in plans:
        path = p.info.name.rpartition(".")[0]
        if p.spec is None:
            if p.info.module != "other":
                out[path] = False
        elif p.spec != base:
            out[path] = _as_dict(p.spec)
    return out


def _as_dict(spec: QuantSpec) -> dict[str, Any]:
    return {"group_size": spec.group_size, "bits": spec.bits, "mode": spec.mode}
