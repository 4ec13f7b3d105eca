"""Parameters that are nothing but source tensors one above the other (experts): found by what `sanitize` does to
small stand-ins, so that packed experts keep their codes and are read one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mlxq.errors import CheckpointError
from mlxq.formats.floats import to_float32
from mlxq.types import FLOAT_BYTES, QuantizedTensor, TensorInfo

#: Of a stand-in: a transposed, cut or scaled one is told from itself.
_SHAPE = (2, 3)


def find_stacks(
    sanitize: Callable[[dict[str, Any]], dict[str, Any]],
    placeholders: Mapping[str, Any],
    sources: Mapping[str, TensorInfo],
    computed: Mapping[str, frozenset[str]],
) -> dict[str, tuple[str, ...]]:
    """Of the `computed` parameters those that are stacks of packed matrices: name -> its source tensors, in order.

    Args:
        sanitize: renames and computes, in a model of its own.
        placeholders: an array for every source tensor.
        sources: what the source tensors are.
        computed: parameter -> the source tensors that it is made of.
    """
    import mlx.core as mx

    wanted = {n for n, parts in computed.items() if parts and _alike([sources[p] for p in parts])}
    if not wanted:
        return {}
    packed = sorted({p for n in wanted for p in computed[n]})
    size = int(np.prod(_SHAPE))
    values = {p: np.arange(i * size, (i + 1) * size, dtype=np.float32).reshape(_SHAPE) for i, p in enumerate(packed)}
    try:
        outputs = sanitize(dict(placeholders) | {p: mx.array(a) for p, a in values.items()})
    except CheckpointError:
        # It looks at shapes: then these are more than stacks.
        return {}
    found = {}
    for name in wanted & outputs.keys():
        if outputs[name].shape != (len(computed[name]), *_SHAPE):
            continue
        stacked = np.array(outputs[name])
        parts = tuple(packed[min(int(a[0, 0]) // size, len(packed) - 1)] for a in stacked)
        if set(parts) == computed[name] and np.array_equal(stacked, np.stack([values[p] for p in parts])):
            found[name] = parts
    return found


def _alike(infos: list[TensorInfo]) -> bool:
    """Whether packed matrices are of one shape and format."""
    first = infos[0]
    return (
        first.dtype not in FLOAT_BYTES
        and len(first.shape) == 2
        and all((i.dtype, i.shape, i.spec) == (first.dtype, first.shape, first.spec) for i in infos)
    )


def stacked_info(name: str, infos: list[TensorInfo]) -> TensorInfo:
    """The stack of these matrices, of their grid: columns that are out of order are so in each in its own way."""
    dtypes = {i.scales_dtype for i in infos}
    permuted = {i.permuted_spec for i in infos}
    permuted_spec = permuted.pop() if len(permuted) == 1 else None
    has_grid = infos[0].spec is not None or permuted_spec is not None
    return dataclasses.replace(
        infos[0],
        name=name,
        shape=(len(infos), *infos[0].shape),
        nbytes=sum(i.nbytes for i in infos),
        scales_dtype=(dtypes.pop() if len(dtypes) == 1 else "F32") if has_grid else None,
        permuted_spec=permuted_spec,
    )


def stack_quantized(parts: list[QuantizedTensor]) -> QuantizedTensor:
    """Matrices of one grid as one; their scales in float32 where their float types differ."""
    first = parts[0]
    dtype = first.dtype if all(p.dtype == first.dtype for p in parts) else "F32"

    def stacked(field: str) -> np.ndarray | None:
        arrays = [getattr(p, field) for p in parts]
        if arrays[0] is None:
            return None
        wide = [a if p.dtype == dtype else to_float32(a, p.dtype) for a, p in zip(arrays, parts, strict=True)]
        return np.stack(wide)

    shape = (len(parts), *first.shape)
    w_q = np.stack([p.w_q for p in parts])
    return dataclasses.replace(
        first, w_q=w_q, scales=stacked("scales"), biases=stacked("biases"), shape=shape, dtype=dtype
    )
