"""The MLX directory's text side: `config.json` with every override explicit, as stock mlx-lm reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxq.checkpoint.config import to_json
from mlxq.types import DTYPE_NAMES, QuantSpec, TensorPlan
from mlxq.writers.safetensors import Entry


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
