"""How the affine products of `metal/affine*.h` are launched: which kernel, its template, its grid.

Shapes of weights, dtypes, bits and group size are template constants: mlx compiles a kernel for each combination and
keeps it. M is one for few rows only. A grid counts threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Literal, NamedTuple

import mlx.core as mx
import numpy as np

from mlxq.ops.metal_source import at_device, kernel, kernel_name

Function = Literal["affine_qmv", "affine_qmv_rows", "affine_qmm_t", "affine_qmm_n"]
Packed = Sequence[mx.array]

#: Rows of x up to which each weight is read once, by the vector kernels.
MAX_VECTOR_ROWS = 16
SIMD = 32

_QMV_SIMD_GROUPS = 2
_QMM_SIMD_GROUPS = 4
_QMM_TILE = (32, 64)
_QMM_N_TILE = (32, 256)
_PACKED = ("w_q", "scales", "biases")
_POSITION = "threadgroup_position_in_grid"
_LANE = "simdgroup_index_in_threadgroup, thread_index_in_simdgroup"
_TILES = {"t": "QMM_TILE_M * QMM_STRIDE", "n": "QMM_N_TILE_M * QMM_N_STRIDE"}
_HEADERS = {
    "affine_qmv": "affine_qmv",
    "affine_qmv_rows": "affine_qmv",
    "affine_qmm_t": "affine_qmm",
    "affine_qmm_n": "affine_qmm_n",
}


class Product(NamedTuple):
    """How a product is launched: the function, rows and columns of y a threadgroup, and its threads."""

    function: Function
    tile_rows: int
    tile_columns: int
    threads: int


class Weights(NamedTuple):
    """A packed matrix `[N, K]`, or each of a stack."""

    N: int
    K: int
    bits: int
    group_size: int


def choose_product(M: int, transpose: bool) -> Product:
    """The kernel for M rows of x; what a threadgroup covers is laid down in `metal/affine_qm?.h`."""
    if not transpose:
        return Product("affine_qmm_n", *_QMM_N_TILE, _QMM_SIMD_GROUPS * SIMD)
    if M <= MAX_VECTOR_ROWS:
        rows = 4 if M <= 8 else 2
        function = "affine_qmv" if M == 1 else "affine_qmv_rows"
        return Product(function, M, rows * _QMV_SIMD_GROUPS, _QMV_SIMD_GROUPS * SIMD)
    return Product("affine_qmm_t", *_QMM_TILE, _QMM_SIMD_GROUPS * SIMD)


def launch_product(x: mx.array, packed: Packed, weights: Weights, transpose: bool, dtype: mx.Dtype) -> mx.array:
    rows = x.shape[0]
    # A kernel of tiles takes M from x: of a tiny x it computes rows of zeros too.
    x = at_device(x)
    M = x.shape[0]
    how = choose_product(M, transpose)
    columns = weights.N if transpose else weights.K
    y = _launch(
        how.function,
        weights,
        dict(zip(_PACKED, map(at_device, packed), strict=True), x=x),
        {"M": M} if how.function == "affine_qmv_rows" else {},
        f"y, {_POSITION}.x" if transpose and M <= MAX_VECTOR_ROWS else f"y, tile, x_shape[0], {_POSITION}",
        (blocks_of(columns, how.tile_columns), blocks_of(M, how.tile_rows), 1),
        how.threads,
        (M, columns),
        dtype,
    )
    return y if rows == M else y[:rows]


def launch_gather(
    x: mx.array,
    packed: Packed,
    experts: mx.array,
    weights: Weights,
    transpose: bool,
    batch: tuple[int, ...],
    dtype: mx.Dtype,
) -> mx.array:
    n_experts, M = packed[0].shape[0], x.shape[-2]
    how = choose_product(M, transpose)
    columns = weights.N if transpose else weights.K
    blocks = blocks_of(columns, how.tile_columns)
    arrays = dict(zip(_PACKED, map(at_device, packed), strict=True), x=at_device(x.reshape(-1, *x.shape[-2:])))
    arrays |= {"experts": experts, "sources": _sources(x.shape[:-2], batch)}
    shape = (experts.size, M, columns)
    if transpose and M <= MAX_VECTOR_ROWS:
        extra, grid = {"M": M, "EXPERTS": n_experts}, (blocks, experts.size, 1)
        at = f"y, {_POSITION}"
        return _launch("affine_gather_qmv", weights, arrays, extra, at, grid, how.threads, shape, dtype)
    extra = {"EXPERTS": n_experts, "TRANSPOSE": transpose}
    grid = (blocks, blocks_of(M, how.tile_rows), experts.size)
    at = f"y, tile, x_shape[1], {_POSITION}"
    return _launch("affine_gather_qmm", weights, arrays, extra, at, grid, how.threads, shape, dtype)


def launch_sorted(x: mx.array, packed: Packed, experts: mx.array, weights: Weights, dtype: mx.Dtype) -> mx.array:
    """One row of x a matrix, the matrices in ascending order."""
    rows = experts.size
    arrays = dict(zip(_PACKED, map(at_device, packed), strict=True), x=x, experts=experts)
    return _launch(
        "affine_gather_qmm_sorted",
        weights,
        arrays,
        {"EXPERTS": packed[0].shape[0]},
        f"y, tile, x_shape[0], {_POSITION}",
        (blocks_of(weights.N, _QMM_TILE[1]), blocks_of(rows, _QMM_TILE[0]), 1),
        _QMM_SIMD_GROUPS * SIMD,
        (rows, weights.N),
        dtype,
    )


def _launch(
    function: str,
    weights: Weights,
    arrays: dict[str, mx.array],
    extra: dict[str, int],
    rest: str,
    blocks: tuple[int, int, int],
    threads: int,
    shape: tuple[int, ...],
    dtype: mx.Dtype,
) -> mx.array:
    """Run a product's function.

    Args:
        arrays: inputs in the order of the function's parameters.
        extra: template constants after those that all products have.
        rest: arguments after the inputs, up to the place within the SIMD-group.
        blocks: threadgroups, of `threads` threads.
        shape, dtype: of y.
    """
    template = {"X": arrays["x"].dtype, "S": arrays["scales"].dtype, "Y": dtype}
    template |= {"GROUP_SIZE": weights.group_size, "BITS": weights.bits, "N": weights.N, "K": weights.K, **extra}
    call = f"{function}<{', '.join(template)}>({', '.join(arrays)}, {rest}, {_LANE});"
    name = function
    if "tile" in rest:
        transposed = function in ("affine_qmm_t", "affine_gather_qmm_sorted") or extra.get("TRANSPOSE")
        call = f"threadgroup X tile[{_TILES['t' if transposed else 'n']}];\n{call}"
        name += "_n" if "TRANSPOSE" in extra and not transposed else "_t" if "TRANSPOSE" in extra else ""
    name = kernel_name(name, *list(template.values())[:3], gs=weights.group_size, b=weights.bits)
    launch = kernel(name, list(arrays), ["y"], call, "affine_gather" if "gather" in function else _HEADERS[function])
    (y,) = launch(
        inputs=list(arrays.values()),
        template=list(template.items()),
        grid=(blocks[0] * threads, *blocks[1:]),
        threadgroup=(threads, 1, 1),
        output_shapes=[shape],
        output_dtypes=[dtype],
    )
    return y


@lru_cache(maxsize=256)
def _sources(batch_of_x: tuple[int, ...], batch: tuple[int, ...]) -> mx.array:
    """Which matrix of x each matrix of a batch multiplies, flat."""
    own = np.arange(prod(batch_of_x), dtype=np.uint32).reshape(batch_of_x)
    return mx.array(np.broadcast_to(own, batch).reshape(-1))


def blocks_of(n: int, size: int) -> int:
    """Pieces of `size` that cover n."""
    return -(-n // size)
