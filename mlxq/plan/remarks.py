"""What is to be known of a plan before the work: sentences about several tensors. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from mlxq.types import DTYPE_NAMES, FLOAT_BYTES, TensorPlan


def remarks(plans: Sequence[TensorPlan], dtype: str) -> tuple[str, ...]:
    """Of a source that another tool has quantized: wider scales than the model's, columns out of order.

    Args:
        plans: of all tensors.
        dtype: the model's float type (`F32`, `F16`, `BF16`).
    """
    wide = [p for p in plans if p.spec is not None and p.dtype in FLOAT_BYTES and p.dtype != dtype]
    permuted = [p for p in plans if p.action == "keep" and p.info.permuted_spec is not None]
    found = []
    if wide:
        kinds, own = " and ".join(sorted({DTYPE_NAMES[p.dtype] for p in wide})), DTYPE_NAMES[dtype]
        found.append(
            f"scales stay {kinds} in {_counted(wide)}, since {own} would round them: every weight is the source's own, "
            f"and mlx computes in float32; --dtype {own} rounds them and states the error"
        )
    if permuted:
        found.append(
            f"the columns of {_counted(permuted)} are in an order that no MLX directory holds (act-order): kept float; "
            "--bits quantizes them anew, and mlxq generate runs the source with its own codes"
        )
    return tuple(found)


def _counted(plans: Sequence[TensorPlan]) -> str:
    return f"{len(plans)} tensor{'s' if len(plans) > 1 else ''}"
