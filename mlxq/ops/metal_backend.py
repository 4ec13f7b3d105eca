"""The operations on affine weights by the project's own Metal kernels (`metal/affine*.h`), on mlx's default device.

The functions have the signatures of `mlxq.ops.mlx_backend`. Each launch is validated first, so that a kernel never
sees a shape it was not made for; groups of 16, which mlx itself refuses, are legal here. Shapes of weights, dtypes,
bits and group size are template constants of a kernel and part of its name; M is not, beyond `_MAX_VECTOR_ROWS`.
"""

from __future__ import annotations

from math import prod

import mlx.core as mx

from mlxq.ops.arrays import mlx_dtype
from mlxq.ops.metal_source import at_device, kernel, kernel_name

_THREADS = 256
#: Codes that a thread of `affine_dequantize` reads (`affine_dequantize_run` in metal/affine_quantize.h).
_DEQUANTIZE_RUN = {2: 16, 3: 32, 4: 8, 5: 32, 6: 16, 8: 8}


def quantize(w: mx.array, bits: int, group_size: int) -> tuple[mx.array, mx.array, mx.array]:
    """The codes, scales and biases of mlx's Metal kernel; arguments and result as in `mlxq.ops.quantize`."""
    K = w.shape[-1]
    packed, groups = (*w.shape[:-1], K * bits // 32), (*w.shape[:-1], K // group_size)
    if not w.size:
        return mx.zeros(packed, mx.uint32), mx.zeros(groups, w.dtype), mx.zeros(groups, w.dtype)
    runs = w.size // 8
    launch = kernel(
        kernel_name("affine_quantize", w.dtype, gs=group_size, b=bits),
        ["w"],
        ["w_q", "scales", "biases"],
        "affine_quantize<T, GROUP_SIZE, BITS>(w, w_q, scales, biases, thread_position_in_grid.x, "
        "uint(RUNS));",
        "affine_quantize",
    )
    return tuple(
        launch(
            inputs=[w],
            template=[("T", w.dtype), ("GROUP_SIZE", group_size), ("BITS", bits), ("RUNS", runs)],
            grid=(-(-runs // 32) * 32, 1, 1),
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
    if not w_q.size:
        return mx.zeros(shape, mlx_dtype(dtype) if dtype else scales.dtype)
    launch = kernel(
        kernel_name("affine_dequantize", scales.dtype, gs=group_size, b=bits),
        ["w_q", "scales", "biases"],
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
