"""The MLX directory: codes in safetensors, `config.json` with every override explicit, as mlx-lm reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlxq.architectures.parameters import ParameterMap
from mlxq.checkpoint.config import to_json
from mlxq.errors import FormatError
from mlxq.formats import crossings, floats, rescaled
from mlxq.plan.dtypes import narrows
from mlxq.plan.planner import Plan
from mlxq.plan.recoding import MOST_ADDED, recoding_of
from mlxq.quantizers import rtn
from mlxq.types import DTYPE_NAMES, QuantizedTensor, QuantSpec, TensorPlan
from mlxq.writers.measured import MeasuredErrors, counted
from mlxq.writers.safetensors import Entry, SafetensorsWriter
from mlxq.writers.weighting import Weighting


class Codes(Protocol):
    """Quantized tensors by parameter name that are there before anything is written."""

    def __contains__(self, name: str) -> bool: ...

    def read(self, name: str, rows: slice | None = None) -> QuantizedTensor: ...


def _quantize(w: np.ndarray, plan: TensorPlan, importance: np.ndarray | None) -> QuantizedTensor:
    if plan.method == "portable":
        from mlxq.quantizers import portable

        return portable.quantize(w, plan.spec, plan.dtype, importance)
    if plan.four_way:
        from mlxq.quantizers import calibrated

        return calibrated.rounded(floats.to_float32(w, floats.dtype_of(w)), plan.spec, plan.dtype, four_way=True)[0]
    return rtn.quantize(w, plan.spec, plan.dtype)


class MlxTarget:
    """The weights of an MLX directory.

    `errors` gathers what repacking, requantizing and keeping changed; `notes()` afterwards says it in lines.
    """

    def __init__(
        self,
        parameters: ParameterMap,
        plan: Plan,
        weighting: Weighting | None = None,
        codes: Codes | None = None,
    ):
        """`codes` are what calibration made of tensors already."""
        self._codes = codes
        self.parameters = parameters
        self.plan = plan
        self._weighting = weighting or Weighting()
        self.errors = MeasuredErrors()

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
            yield _arrays(self._repack(plan, self.parameters.read_quantized(plan.info.name, rows)))
            return
        if self._codes is not None and plan.info.name in self._codes:
            q = self._codes.read(plan.info.name, rows)
            if plan.action == "requantize":
                w = self.parameters.read(plan.info.name, rows)
                self._measure(plan, floats.to_float32(w, floats.dtype_of(w)), crossings.dequantize(q))
            yield _arrays(q)
            return
        w = self.parameters.read(plan.info.name, rows)
        if plan.spec is None:
            yield (self._cast(plan, w),)
            return
        for part, importance in self._weighting.matrices(w, plan.info, rows):
            check()
            q = _quantize(part, plan, importance)
            if plan.action == "requantize":
                self._measure(plan, floats.to_float32(part, floats.dtype_of(part)), crossings.dequantize(q))
            yield _arrays(q)

    def _repack(self, plan: TensorPlan, q: QuantizedTensor) -> QuantizedTensor:
        """The same codes, with scales and biases in the planned float type; a float mode has scales of its own."""
        if q.dtype == plan.dtype or q.biases is None:
            return q
        parts = [floats.from_float32(floats.to_float32(a, q.dtype), plan.dtype) for a in (q.scales, q.biases)]
        if not all(floats.all_finite(a) for a in parts):
            raise FormatError(f"the scales exceed the range of {DTYPE_NAMES[plan.dtype]}; choose another --dtype")
        cast = replace(q, scales=parts[0], biases=parts[1], dtype=plan.dtype)
        if narrows(q.dtype, plan.dtype):
            error, size = rescaled.squares(q, cast)
            self._refuse_loss(error > 0)
            self.errors.add_squares(plan.info.name, error, size)
        return cast

    def _cast(self, plan: TensorPlan, w: np.ndarray) -> np.ndarray:
        """A kept tensor in its stored dtype."""
        if not floats.all_finite(w):
            raise FormatError("a weight is NaN or infinite")
        dtype = floats.dtype_of(w)
        if dtype == plan.dtype:
            return w
        exact = floats.to_float32(w, dtype)
        cast = floats.from_float32(exact, plan.dtype)
        if not floats.all_finite(cast):
            raise FormatError(f"the weights exceed the range of {plan.dtype}; choose another --dtype")
        self._measure(plan, exact, floats.to_float32(cast, plan.dtype))
        return cast

    def _measure(self, plan: TensorPlan, w: np.ndarray, w_hat: np.ndarray) -> None:
        """Count what these rows lost; with `exact` they must not have lost anything."""
        self._refuse_loss(self.plan.exact and not np.array_equal(w, w_hat))
        self.errors.add(plan.info.name, w, w_hat)

    def _refuse_loss(self, lost: bool) -> None:
        if self.plan.exact and lost:
            stored = DTYPE_NAMES[self.plan.dtype]
            raise FormatError(f"--exact: rounding to {stored} changes its weights: use --dtype float32")

    def notes(self) -> list[str]:
        """What was lost beside the quantization that was asked for; to be read when all is written."""
        stored = DTYPE_NAMES[self.plan.dtype]
        said = {
            "keep": f"kept and rounded to {stored}",
            "repack": f"repacked, the same codes with scales rounded to {stored}",
            "requantize": "requantized",
        }
        return self.errors.notes(self.plan.tensors, said) + self._beyond_bound()

    def _beyond_bound(self) -> list[str]:
        """Names the tensors that a new format changed by more than the share of their type's own error it may add."""
        errors, beyond = self.errors.relative_rmse, dict[str, float]()
        for p in self.plan.tensors:
            recoding = recoding_of(p.info)
            if p.action == "requantize" and recoding is not None and recoding.spec.bits == p.spec.bits:
                ratio = errors.get(p.info.name, 0.0) / recoding.bound
                if ratio > 1:
                    beyond[p.info.name] = ratio
        if not beyond:
            return []
        worst = max(beyond, key=lambda n: beyond[n])
        return [
            f"{counted(beyond)} lost more by it than half the usual error of the source's type: up to "
            f"{MOST_ADDED * beyond[worst]:.2g} times that error, in {worst}; --tensor-type gives more bits"
        ]


def _arrays(q: QuantizedTensor) -> tuple[np.ndarray, ...]:
    return (q.w_q, q.scales) if q.biases is None else (q.w_q, q.scales, q.biases)


def entries(plan: TensorPlan) -> list[Entry]:
    """The stored tensors of a planned one: the tensor itself, or its codes, scales and (affine) biases."""
    info, spec = plan.info, plan.spec
    if spec is None:
        return [Entry(info.name, plan.dtype, info.shape)]
    path = info.name.removesuffix("weight")
    lead, in_features = info.shape[:-1], info.shape[-1]
    groups = (*lead, in_features // spec.group_size)
    words = Entry(info.name, "U32", (*lead, in_features * spec.bits // 32))
    if spec.mode != "affine":
        return [words, Entry(f"{path}scales", "U8", groups)]
    return [words, Entry(f"{path}scales", plan.dtype, groups), Entry(f"{path}biases", plan.dtype, groups)]


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
