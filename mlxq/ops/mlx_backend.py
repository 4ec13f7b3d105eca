"""The operations by mlx's own kernels, on mlx's default device. Arguments are validated mlx arrays."""

from __future__ import annotations

import mlx.core as mx

from mlxq.ops.arrays import mlx_dtype


def quantize(w: mx.array, bits: int, group_size: int) -> tuple[mx.array, mx.array, mx.array]:
    return mx.quantize(w, group_size=group_size, bits=bits)


def dequantize(
    w_q: mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int, dtype: str | None
) -> mx.array:
    w_hat = mx.dequantize(w_q, scales, biases, group_size=group_size, bits=bits)
    return w_hat if dtype is None else w_hat.astype(mlx_dtype(dtype))


def quantized_matmul(
    x: mx.array, w_q: mx.array, scales: mx.array, biases: mx.array, transpose: bool, bits: int, group_size: int
) -> mx.array:
    return mx.quantized_matmul(x, w_q, scales, biases, transpose=transpose, group_size=group_size, bits=bits)


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
    return mx.gather_qmm(
        x,
        w_q,
        scales,
        biases,
        rhs_indices=rhs_indices,
        transpose=transpose,
        group_size=group_size,
        bits=bits,
        sorted_indices=sorted_indices,
    )


def matmul(x: mx.array, w: mx.array) -> mx.array:
    return x @ w.T


def gather_matmul(x: mx.array, w: mx.array, rhs_indices: mx.array, sorted_indices: bool) -> mx.array:
    dtype = x.dtype if x.dtype == w.dtype else mx.float32
    if mx.default_device() == mx.cpu:
        # On the CPU mlx has this in float32 only.
        x, w = x.astype(mx.float32), w.astype(mx.float32)
    y = mx.gather_mm(x, w.swapaxes(-1, -2), rhs_indices=rhs_indices, sorted_indices=sorted_indices)
    return y.astype(dtype)
