"""Error feedback into ggml's block formats: GPTQ whose scales are searched, then descent on codes and scales.

`quantize` goes through the columns in the order of their curvature, in which blocks and sub-blocks stay together. When
it comes to a block, it chooses the block's scales by the encoders' own search (`line_search`, `scale_search`) on the
weights as they are then, earlier errors fed back into them, with the inverse Hessian's curvature as importance. When it
comes to a sub-block, its integers are chosen once more among their neighbours, for the weights that errors of the same
block have moved since. Each column is rounded, and its error spread over the columns that follow (Frantar et al. 2022,
"GPTQ"). What that leaves is made smaller by `feedback_descent`.
"""

from __future__ import annotations

import numpy as np

from mlxq.errors import FormatError
from mlxq.quantizers.curvature import Curvature
from mlxq.quantizers.ggml.block_types import TYPES, BlockType
from mlxq.quantizers.ggml.feedback_descent import descend
from mlxq.quantizers.ggml.feedback_rows import Rows, inverse
from mlxq.quantizers.ggml.scale_search import check_range

#: Rows worked on at a time: what a block touches stays in the cache.
_ROWS = 2048


def quantize(w: np.ndarray, curvature: Curvature, name: str, *, sweeps: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Encode a matrix so that its output error on the calibration text is small.

    Args:
        w: float32 `[N, K]`, finite, `K` a multiple of the type's block.
        curvature: of the layer's inputs, made for ggml's blocks (`Curvature.of` with `sizes=block_types.SIZES`).
        name: one of `block_types.TYPES`.
        sweeps: rounds of descent after the feedback.

    Returns:
        blocks uint8 `[N, row_bytes]`, and the decoded weights float32 `[N, K]`.

    Raises:
        FormatError: a type without error feedback, rows that are not whole blocks, an order of columns that tears
            blocks apart, or weights beyond the type's float16 steps.
    """
    type_ = _validated(w, curvature, name)
    N = len(w)
    back = curvature.inverse_order
    blocks, w_hat = [], np.empty(w.shape, np.float32)
    for start in range(0, N, _ROWS):
        part = slice(start, start + _ROWS)
        columns = np.ascontiguousarray(w[part].T[curvature.order])
        rows = _feed_back(columns.copy(), curvature.upper, type_)
        descend(columns, rows, curvature.hessian, type_, sweeps)
        w_hat[part] = rows.w_hat[back].T
        blocks.append(type_.pack(rows.values[back], rows.scales_in(back, type_)))
    return np.concatenate(blocks), w_hat


def _validated(w: np.ndarray, curvature: Curvature, name: str) -> BlockType:
    if name not in TYPES:
        raise FormatError(f"{name!r} has no error feedback: the types that have it are {', '.join(TYPES)}")
    type_ = TYPES[name]
    K = w.shape[1]
    if K % type_.block:
        raise FormatError(f"{name}: a row is whole blocks of {type_.block} weights, got {K}")
    for size in (type_.block, type_.sub_block):
        whole = curvature.order.reshape(-1, size) // size
        if (whole != whole[:, :1]).any():
            raise FormatError(f"{name}: the curvature's order does not keep {size} columns together")
    if not type_.has_mins:
        check_range(w, name, type_.grid, type_.largest)
    return type_


def _feed_back(w: np.ndarray, upper: np.ndarray, type_: BlockType) -> Rows:
    """Quantize columns `w` `[K, n]`, which are overwritten, one after another."""
    K, n = w.shape
    block, size = type_.block, type_.sub_block
    rows = Rows.empty(K, n, type_)
    errors = np.empty((block, n), np.float32)
    for i in range(0, K, block):
        j = i + block
        local = upper[i:j, i:j]
        importance = 1 / np.diagonal(local) ** 2
        rows.store(i // block, type_.choose(w[i:j], importance), type_)
        for at in range(0, block, size):
            to = at + size
            x = w[i + at : i + to]
            if at:
                x = x - local[:at, at:to].T @ errors[:at]
            group = (i + at) // size
            if at and type_.largest > 1:
                rows.adjust(group, x, importance[at:to], type_)
            _round(rows, group, x, local[at:to, at:to], errors[at:to], type_)
        if j < K:
            w[j:] -= upper[i:j, j:].T @ errors
    return rows


def _round(rows: Rows, group: int, x: np.ndarray, local: np.ndarray, errors: np.ndarray, type_: BlockType) -> None:
    """Round the columns `x` `[sub_block, n]` of a sub-block, each with the errors of those before it."""
    step, offset = rows.line(group, type_)
    scale = inverse(step)
    first = group * type_.sub_block
    for k in range(len(x)):
        wanted = x[k] - local[:k, k] @ errors[:k] if k else x[k]
        v = type_.grid.values_of((wanted if offset is None else wanted - offset) * scale)
        w_hat = v * step if offset is None else v * step + offset
        rows.values[first + k], rows.w_hat[first + k] = v, w_hat
        errors[k] = (wanted - w_hat) / local[k, k]
