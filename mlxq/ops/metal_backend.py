"""The operations on affine weights by the project's own Metal kernels (`metal/affine*.h`), on mlx's default device.

The functions have the signatures of `mlxq.ops.mlx_backend`. Arguments are validated mlx arrays (`mlxq.ops` checks
them), so no kernel sees shapes it was not made for. Which kernel computes a product is
`mlxq.ops.metal_affine.choose_product`.
"""

from __future__ import annotations

from math import prod

import mlx.core as mx
import numpy as np

from mlxq.ops.arrays import mlx_dtype
from mlxq.ops.metal_affine import SIMD, Weights, blocks_of, launch_gather, launch_product, launch_sorted
from mlxq.ops.metal_source import at_device, check_sizes, kernel, kernel_name

#: Rows of x, each with an expert, from which a tile of them costs less than one by one.
MIN_SORTED_ROWS = 64

_THREADS = 256
#: Codes that a thread of `affine_dequantize` reads (`affine_dequantize_run` in metal/affine_quantize.h).
_DEQUANTIZE_RUN = {2: 16, 3: 32, 4: 8, 5: 32, 6: 16, 8: 8}
_PACKED = ("w_q", "scales", "biases")


def quantize(w: mx.array, bits: int, group_size: int) -> tuple[mx.array, mx.array, mx.array]:
    """The codes, scales and biases of mlx's Metal kernel; arguments and result as in `mlxq.ops.quantize`."""
    K = w.shape[-1]
    packed, groups = (*w.shape[:-1], K * bits // 32), (*w.shape[:-1], K // group_size)
    check_sizes("quantize", 0, threads=w.size // 8)
    if not w.size:
        return mx.zeros(packed, mx.uint32), mx.zeros(groups, w.dtype), mx.zeros(groups, w.dtype)
    launch = kernel(
        kernel_name("affine_quantize", w.dtype, gs=group_size, b=bits),
        ["w"],
        _PACKED,
        "affine_quantize<T, GROUP_SIZE, BITS>(w, w_q, scales, biases, thread_position_in_grid.x, uint(w_shape[0]));",
        "affine_quantize",
    )
    runs = w.size // 8
    return tuple(
        launch(
            inputs=[w.reshape(runs, 8)],
            template=[("T", w.dtype), ("GROUP_SIZE", group_size), ("BITS", bits)],
            grid=(blocks_of(runs, SIMD) * SIMD, 1, 1),
            threadgroup=(_THREADS, 1, 1),
            output_shapes=[packed, groups, groups],
            output_dtypes=[mx.uint32, w.dtype, w.dtype],
        )
    )


def dequantize(
    w_q: mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int, dtype: str | None
) -> mx.array:
    """`w_hat`, rounded as `mx.dequantize` rounds on the CPU; arguments and result as in `mlxq.ops.dequantize`."""
    shape = (*scales.shape[:-1], scales.shape[-1] * group_size)
    check_sizes("dequantize", 0, threads=prod(shape) // _DEQUANTIZE_RUN[bits])
    if not w_q.size:
        return mx.zeros(shape, mlx_dtype(dtype) if dtype else scales.dtype)
    launch = kernel(
        kernel_name("affine_dequantize", scales.dtype, gs=group_size, b=bits),
        _PACKED,
        ["w_hat"],
        "affine_dequantize<T, GROUP_SIZE, BITS>(w_q, scales, biases, w_hat, thread_position_in_grid.x);",
        "affine_quantize",
    )
    (w_hat,) = launch(
        inputs=[at_device(w_q), at_device(scales), at_device(biases)],
        template=[("T", scales.dtype), ("GROUP_SIZE", group_size), ("BITS", bits)],
        grid=(prod(shape) // _DEQUANTIZE_RUN[bits], 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[shape],
        output_dtypes=[scales.dtype],
    )
    return w_hat if dtype is None else w_hat.astype(mlx_dtype(dtype))


def quantized_matmul(
    x: mx.array, w_q: mx.array, scales: mx.array, biases: mx.array, transpose: bool, bits: int, group_size: int
) -> mx.array:
    """`x @ w_hat.T`, or `x @ w_hat`; as `mlxq.ops.quantized_matmul`."""
    weights = Weights(w_q.shape[0], scales.shape[1] * group_size, bits, group_size)
    inner, columns = (weights.K, weights.N) if transpose else (weights.N, weights.K)
    check_sizes("quantized_matmul", columns, M=prod(x.shape[:-1]), inner=inner)
    dtype = _promoted(x, scales)
    if not (x.size and w_q.size):
        return mx.zeros((*x.shape[:-1], columns), dtype)
    y = launch_product(x.reshape(-1, inner), (w_q, scales, biases), weights, transpose, dtype)
    return y.reshape(*x.shape[:-1], columns)


def gather_quantized_matmul(
    x: mx.array,
    w_q: mx.array,
    scales: mx.array,
    biases: mx.array,
    rhs_indices: mx.array,
    transpose: bool,
    bits: int,
    group_size: int,
    sorted_indices: bool,
) -> mx.array:
    """Products with chosen matrices of a stack; as `mlxq.ops.gather_quantized_matmul`. An index past the stack chooses
    its last matrix."""
    weights = Weights(w_q.shape[1], scales.shape[2] * group_size, bits, group_size)
    columns = weights.N if transpose else weights.K
    dtype = _promoted(x, scales)
    batch = np.broadcast_shapes(x.shape[:-2], rhs_indices.shape)
    shape = (*batch, x.shape[-2], columns)
    check_sizes("gather_quantized_matmul", columns, products=prod(batch) * x.shape[-2], inner=x.shape[-1])
    if not (x.size and w_q.size and rhs_indices.size):
        return mx.zeros(shape, dtype)
    experts = mx.broadcast_to(rhs_indices.astype(mx.uint32), batch).reshape(-1)
    tiled = sorted_indices and transpose and x.shape[:-2] == batch and x.shape[-2] == 1
    packed = (w_q, scales, biases)
    if tiled and experts.size >= MIN_SORTED_ROWS:
        return launch_sorted(x.reshape(-1, x.shape[-1]), packed, experts, weights, dtype).reshape(shape)
    return launch_gather(x, packed, experts, weights, transpose, batch, dtype).reshape(shape)


def _promoted(a: mx.array, b: mx.array) -> mx.Dtype:
    return a.dtype if a.dtype == b.dtype else mx.float32
