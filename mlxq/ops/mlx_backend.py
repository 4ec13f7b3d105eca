"""The operations by mlx's own kernels, on mlx's default device. Arguments are validated mlx arrays.

mlx has no kernels for groups of 16: where they are asked for, `BackendError` says so.

On the CPU mlx emulates half floats, rounding every step of a sum to them, ten times slower than float32 and more.
Products with packed weights are therefore computed in float32 there and rounded once. A CPU stream of mlx is one
thread: the product of a single row is split over several, 1.7 times as fast on two idle cores, with the same bits.
"""

from __future__ import annotations

import os
from functools import cache
from itertools import pairwise

import mlx.core as mx
import numpy as np

from mlxq.errors import BackendError
from mlxq.formats import ggml
from mlxq.formats.geometry import AFFINE_GROUP_SIZES
from mlxq.ops.arrays import mlx_dtype

#: Weights that are worth a stream of their own: half a millisecond or so of work.
_STREAM_WEIGHTS = 1 << 19
_MAX_STREAMS = 8


def quantize(w: mx.array, bits: int, group_size: int) -> tuple[mx.array, mx.array, mx.array]:
    _check_group("quantize", group_size)
    return mx.quantize(w, group_size=group_size, bits=bits)


def quantize_on_cpu(w: mx.array, bits: int, group_size: int) -> tuple[mx.array, mx.array, mx.array]:
    """`quantize` with the CPU's codes, whatever the default device: Metal's kernel rounds in other details."""
    _check_group("quantize", group_size)
    return mx.quantize(w, group_size=group_size, bits=bits, stream=mx.cpu)


def dequantize(
    w_q: mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int, dtype: str | None
) -> mx.array:
    _check_group("dequantize", group_size)
    if not w_q.size:
        return mx.zeros(
            (*scales.shape[:-1], scales.shape[-1] * group_size), mlx_dtype(dtype) if dtype else scales.dtype
        )
    w_hat = mx.dequantize(w_q, scales, biases, group_size=group_size, bits=bits)
    return w_hat if dtype is None else w_hat.astype(mlx_dtype(dtype))


def quantized_matmul(
    x: mx.array, w_q: mx.array, scales: mx.array, biases: mx.array, transpose: bool, bits: int, group_size: int
) -> mx.array:
    _check_group("quantized_matmul", group_size)
    grid = {"transpose": transpose, "bits": bits, "group_size": group_size}
    columns = w_q.shape[0] if transpose else scales.shape[1] * group_size
    if not (x.size and w_q.size):
        # mlx 0.32.4 divides by the number of rows, which ends the process.
        return mx.zeros((*x.shape[:-1], columns), _promoted(x, scales))
    if not _on_cpu():
        return mx.quantized_matmul(x, w_q, scales, biases, **grid)
    dtype = _promoted(x, scales)
    x, scales, biases = (a.astype(mx.float32) for a in (x, scales, biases))
    parts = min(w_q.size * 32 // bits // _STREAM_WEIGHTS, _cpus(), _MAX_STREAMS)
    if transpose and parts > 1 and x.size == x.shape[-1]:
        y = _split_over_streams(x, (w_q, scales, biases), parts, grid)
    else:
        y = mx.quantized_matmul(x, w_q, scales, biases, **grid)
    return y.astype(dtype)


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
    _check_group("gather_quantized_matmul", group_size)
    dtype = _promoted(x, scales)
    if not (x.size and w_q.size and rhs_indices.size):
        batch = np.broadcast_shapes(x.shape[:-2], rhs_indices.shape)
        columns = w_q.shape[1] if transpose else scales.shape[2] * group_size
        return mx.zeros((*batch, x.shape[-2], columns), dtype)
    if _on_cpu():
        x, scales, biases = (a.astype(mx.float32) for a in (x, scales, biases))
    y = mx.gather_qmm(
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
    return y.astype(dtype)


def matmul(x: mx.array, w: mx.array) -> mx.array:
    return x @ w.T


def gather_matmul(x: mx.array, w: mx.array, rhs_indices: mx.array, sorted_indices: bool) -> mx.array:
    dtype = _promoted(x, w)
    if not (x.size and w.size and rhs_indices.size):
        return mx.zeros((*np.broadcast_shapes(x.shape[:-2], rhs_indices.shape), x.shape[-2], w.shape[1]), dtype)
    if _on_cpu():
        # mlx has this in float32 only on the CPU.
        x, w = x.astype(mx.float32), w.astype(mx.float32)
    y = mx.gather_mm(x, w.swapaxes(-1, -2), rhs_indices=rhs_indices, sorted_indices=sorted_indices)
    return y.astype(dtype)


def block_dequantize(blocks: mx.array, type_name: str, dtype: str) -> mx.array:
    # mlx knows nothing of ggml blocks: NumPy decodes them.
    return mx.array(ggml.dequantize(np.asarray(blocks), type_name)).astype(mlx_dtype(dtype))


def block_matmul(x: mx.array, blocks: mx.array, type_name: str) -> mx.array:
    return matmul(x.astype(mx.float32), block_dequantize(blocks, type_name, "F32")).astype(x.dtype)


def gather_block_matmul(
    x: mx.array, blocks: mx.array, rhs_indices: mx.array, type_name: str, sorted_indices: bool
) -> mx.array:
    w = block_dequantize(blocks, type_name, "F32")
    return gather_matmul(x.astype(mx.float32), w, rhs_indices, sorted_indices).astype(x.dtype)


def _split_over_streams(x: mx.array, packed: tuple[mx.array, ...], parts: int, grid: dict) -> mx.array:
    """Outputs in `parts` runs of weight rows, the last on the current stream, the others each on one of their own."""
    N = packed[0].shape[0]
    bounds = [N * i // parts for i in range(parts + 1)]
    pieces = []
    for i, (start, stop) in enumerate(pairwise(bounds)):
        stream = mx.default_stream(mx.cpu) if i == parts - 1 else _extra_stream(i)
        with mx.stream(stream):
            rows = [a[start:stop] for a in packed]
            pieces.append(mx.quantized_matmul(x, *rows, **grid))
    return mx.concatenate(pieces, axis=-1)


@cache
def _extra_stream(index: int) -> mx.ThreadLocalStream:
    """A CPU stream beside the default one; each calling thread has its own behind it."""
    return mx.new_thread_local_stream(mx.cpu)


@cache
def _cpus() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_group(op: str, group_size: int) -> None:
    if group_size not in AFFINE_GROUP_SIZES:
        legal = ", ".join(map(str, AFFINE_GROUP_SIZES))
        raise BackendError(
            f"{op}: mlx has no kernels for groups of {group_size}, only for {legal}; the back ends numpy and metal have"
        )


def _on_cpu() -> bool:
    return mx.default_device() == mx.cpu


def _promoted(a: mx.array, b: mx.array) -> mx.Dtype:
    return a.dtype if a.dtype == b.dtype else mx.float32
