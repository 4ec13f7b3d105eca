"""The operations in NumPy. Arguments are validated arrays in NumPy storage (uint16 is bfloat16).

Products are computed in float32 and rounded once, to the dtype that mlx would return.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from math import prod
from typing import Any

import numpy as np

from mlxq.errors import FormatError
from mlxq.formats import affine, ggml
from mlxq.formats.floats import dtype_of, from_float32, to_float32
from mlxq.formats.geometry import packed_words
from mlxq.ops import blocks as block_products
from mlxq.ops import planes

#: Weights quantized at a time, so that their float32 copy stays in the second-level cache.
_CHUNK = 1 << 18
#: Half weights widened for one product: 8 MB of float32, and few BLAS calls, whose threads wait for each other.
_WIDE_CHUNK = 1 << 21


def _quiet(compute: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Infinite and NaN operands go through products as they do in mlx, without a word."""

    @wraps(compute)
    def run(*args: Any) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            return compute(*args)

    return run


def quantize(w: np.ndarray, bits: int, group_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    dtype, K = dtype_of(w), w.shape[-1]
    rows = w.reshape(-1, K)
    w_q = np.empty((rows.shape[0], packed_words(K, bits)), np.uint32)
    scales = np.empty((rows.shape[0], K // group_size), w.dtype)
    biases = np.empty_like(scales)
    for part in _row_parts(rows.shape[0], K, _CHUNK):
        values = to_float32(rows[part], dtype)
        step, offset = affine.choose_qparams(values, bits, group_size)
        w_q[part] = affine.pack(affine.quantize(values, step, offset, bits, group_size), bits)
        scales[part], biases[part] = from_float32(step, dtype), from_float32(offset, dtype)
    return tuple(a.reshape(*w.shape[:-1], a.shape[-1]) for a in (w_q, scales, biases))


@_quiet
def dequantize(
    w_q: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int, group_size: int, dtype: str | None
) -> np.ndarray:
    codes = affine.unpack(w_q, bits, scales.shape[-1] * group_size)
    w_hat = affine.dequantize(codes, scales, biases, bits, group_size)
    own = dtype_of(scales)
    return w_hat if dtype in (None, own) else from_float32(to_float32(w_hat, own), dtype)


@_quiet
def quantized_matmul(
    x: np.ndarray, w_q: np.ndarray, scales: np.ndarray, biases: np.ndarray, transpose: bool, bits: int, group_size: int
) -> np.ndarray:
    dtype = promote(dtype_of(x), dtype_of(scales))
    y = _packed_product(_rows(x), w_q, scales, biases, transpose, bits, group_size)
    return from_float32(y, dtype).reshape(*x.shape[:-1], y.shape[-1])


@_quiet
def gather_quantized_matmul(
    x: np.ndarray,
    w_q: np.ndarray,
    scales: np.ndarray,
    biases: np.ndarray,
    rhs_indices: np.ndarray,
    transpose: bool,
    bits: int,
    group_size: int,
    sorted_indices: bool,
) -> np.ndarray:
    N = w_q.shape[1] if transpose else scales.shape[2] * group_size

    def multiply(rows: np.ndarray, expert: int) -> np.ndarray:
        return _packed_product(rows, w_q[expert], scales[expert], biases[expert], transpose, bits, group_size)

    y = gather(x, len(w_q), N, rhs_indices, multiply)
    return from_float32(y, promote(dtype_of(x), dtype_of(scales)))


@_quiet
def matmul(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    y = _matmul(_rows(x), w)
    return from_float32(y, promote(dtype_of(x), dtype_of(w))).reshape(*x.shape[:-1], y.shape[-1])


@_quiet
def gather_matmul(x: np.ndarray, w: np.ndarray, rhs_indices: np.ndarray, sorted_indices: bool) -> np.ndarray:
    y = gather(x, len(w), w.shape[1], rhs_indices, lambda rows, expert: _matmul(rows, w[expert]))
    return from_float32(y, promote(dtype_of(x), dtype_of(w)))


def block_dequantize(blocks: np.ndarray, type_name: str, dtype: str) -> np.ndarray:
    return from_float32(ggml.dequantize(blocks, type_name), dtype)


@_quiet
def block_matmul(x: np.ndarray, blocks: np.ndarray, type_name: str) -> np.ndarray:
    y = block_products.matmul(_rows(x), blocks, type_name)
    return from_float32(y, dtype_of(x)).reshape(*x.shape[:-1], y.shape[-1])


@_quiet
def gather_block_matmul(
    x: np.ndarray, blocks: np.ndarray, rhs_indices: np.ndarray, type_name: str, sorted_indices: bool
) -> np.ndarray:
    def multiply(rows: np.ndarray, expert: int) -> np.ndarray:
        return block_products.matmul(rows, blocks[expert], type_name)

    return from_float32(gather(x, len(blocks), blocks.shape[1], rhs_indices, multiply), dtype_of(x))


def promote(a: str, b: str) -> str:
    """dtype of a product: equal ones stay, float16 with bfloat16 is float32, as in mlx."""
    return a if a == b else "F32"


def _packed_product(
    rows: np.ndarray,
    w_q: np.ndarray,
    scales: np.ndarray,
    biases: np.ndarray,
    transpose: bool,
    bits: int,
    group_size: int,
) -> np.ndarray:
    """Product of float32 rows `[M, K]` (`[M, N]` when not `transpose`) with one packed matrix, in float32."""
    if not rows.size or not w_q.size:
        columns = w_q.shape[0] if transpose else scales.shape[1] * group_size
        return np.zeros((rows.shape[0], columns), np.float32)
    product = planes.matmul_transposed if transpose else planes.matmul_plain
    grid = _widened(scales), _widened(biases)
    if group_size * bits % 32:
        return _product_by_halves(product, rows, w_q, grid, transpose, bits, group_size)
    return product(rows, w_q, *grid, bits, group_size)


def _product_by_halves(
    product: Callable[..., np.ndarray],
    rows: np.ndarray,
    w_q: np.ndarray,
    grid: tuple[np.ndarray, np.ndarray],
    transpose: bool,
    bits: int,
    group_size: int,
) -> np.ndarray:
    """A product with groups that end within a word (16 codes of 3 or 5 bits), which `planes` does not decode.

    Two groups in the place of one, once on the grid of the first and once on that of the second: of each only its own
    half counts.
    """
    total: np.ndarray | None = None
    for half in (0, 1):
        x = rows
        if transpose:
            x = np.zeros_like(rows)
            own = _halves(x, group_size)[:, :, half]
            own[...] = _halves(rows, group_size)[:, :, half]
        y = product(x, w_q, *(np.ascontiguousarray(p[:, half::2]) for p in grid), bits, 2 * group_size)
        if total is None:
            total = y
        elif transpose:
            total += y
        else:
            _halves(total, group_size)[:, :, half] = _halves(y, group_size)[:, :, half]
    return total


def _halves(a: np.ndarray, group_size: int) -> np.ndarray:
    """A view `[M, pairs of groups, 2, group_size]` of a contiguous `[M, K]`."""
    return a.reshape(len(a), -1, 2, group_size)


def _rows(x: np.ndarray) -> np.ndarray:
    """x in float32 as `[M, K]`; M may be 0."""
    return to_float32(x, dtype_of(x)).reshape(prod(x.shape[:-1]), x.shape[-1])


def _matmul(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """`x @ w.T` in float32; half weights are widened in parts."""
    dtype = dtype_of(w)
    if dtype == "F32":
        return x @ w.T
    y = np.empty((x.shape[0], w.shape[0]), np.float32)
    for part in _row_parts(*w.shape, _WIDE_CHUNK):
        y[:, part] = x @ to_float32(w[part], dtype).T
    return y


def gather(
    x: np.ndarray, n_experts: int, N: int, rhs_indices: np.ndarray, multiply: Callable[[np.ndarray, int], np.ndarray]
) -> np.ndarray:
    """Send each `[M, K]` of x to its expert: float32 `[*batch, M, N]`, batch being x's axes broadcast with indices."""
    if rhs_indices.size and not (rhs_indices.min() >= 0 and rhs_indices.max() < n_experts):
        raise FormatError(f"rhs_indices must be in 0..{n_experts - 1}, got {rhs_indices.min()}..{rhs_indices.max()}")
    M, K = x.shape[-2:]
    batch = np.broadcast_shapes(x.shape[:-2], rhs_indices.shape)
    matrices = to_float32(x, dtype_of(x)).reshape(prod(x.shape[:-2]), M, K)
    sources = np.arange(len(matrices)).reshape(x.shape[:-2])
    sources = np.broadcast_to(sources, batch).reshape(-1)
    experts = np.broadcast_to(rhs_indices, batch).reshape(-1)
    y = np.empty((experts.size, M, N), np.float32)
    for expert in np.unique(experts):
        targets = np.flatnonzero(experts == expert)
        rows = matrices[sources[targets]].reshape(targets.size * M, K)
        y[targets] = multiply(rows, int(expert)).reshape(targets.size, M, N)
    return y.reshape(*batch, M, N)


def _row_parts(n_rows: int, K: int, chunk: int) -> list[slice]:
    step = max(chunk // max(K, 1), 1)
    return [slice(start, start + step) for start in range(0, n_rows, step)]


def _widened(a: np.ndarray) -> np.ndarray:
    return to_float32(a, dtype_of(a))
