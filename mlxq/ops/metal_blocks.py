"""The operations on ggml blocks by the project's own Metal kernels (`metal/ggml_*.h`), on mlx's default device.

The functions have the signatures of the other back ends. The blocks are a GGUF file's bytes, as they are. Arguments are
validated mlx arrays (`mlxq.ops` checks them), so no kernel sees shapes it was not made for. Kernels are made for a type
of blocks, a dtype of x, and what the tables here say; their names encode it. Up to `MAX_VECTOR_ROWS` rows of x are
multiplied by `ggml_qmv`, which reads each weight once for all of them and is bound by that; more by `ggml_qmm`, tiled.

Blocks must begin at a multiple of 16 bytes in memory, as every array of mlx does; rows taken from one do too, as far as
it matters (`piece`).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, prod

import mlx.core as mx
import numpy as np

from mlxq.errors import BackendError
from mlxq.formats.geometry import block_format
from mlxq.ops.arrays import mlx_dtype
from mlxq.ops.dispatch import METAL_TYPES
from mlxq.ops.metal_source import check_sizes, kernel, kernel_name

#: Rows of x that `ggml_qmv` takes at once.
MAX_VECTOR_ROWS = 16

#: Threads of a threadgroup, and 1024s of weights of a row that are in threadgroup memory at once: enough that a row's
#: bytes fill whole lines.
_QMV_THREADS = 64
_STEPS = {"Q8_0": 1, "Q2_K": 4, "Q3_K": 4}
#: Threads, rows of x and outputs of a threadgroup of `ggml_qmm`, and weights of a row in its threadgroup memory.
_QMM_THREADS, _QMM_BM, _QMM_BN, _QMM_SPAN = 128, 32, 64, 256
_DEQUANTIZE_THREADS = 256
#: A batch is sorted by experts and multiplied in tiles if it has at least so many rows, and so many of each expert.
_MIN_SORTED_ROWS, _MIN_ROWS_OF_EXPERT = 32, 4


def block_dequantize(blocks: mx.array, type_name: str, dtype: str) -> mx.array:
    """The weights, bit for bit those of `formats.ggml.dequantize`, rounded to `dtype` once.

    Arguments and result as in `mlxq.ops.block_dequantize`.

    Raises:
        BackendError: a type without kernels.
    """
    op = "block_dequantize"
    _check_type(op, type_name)
    f = block_format(type_name)
    shape = (*blocks.shape[:-1], blocks.shape[-1] // f.type_size * f.block_size)
    check_sizes(op, 0, threads=prod(shape) // 32)
    T = mlx_dtype(dtype)
    if not blocks.size:
        return mx.zeros(shape, T)
    launch = kernel(
        kernel_name(f"ggml_dequantize_{type_name.lower()}", T),
        ["w"],
        ["out"],
        f"ggml_dequantize<T, {type_name}>(w, out, thread_position_in_grid.x);",
        "ggml_blocks",
    )
    (out,) = launch(
        inputs=[blocks],
        template=[("T", T)],
        grid=(prod(shape) // 32, 1, 1),
        threadgroup=(_DEQUANTIZE_THREADS, 1, 1),
        output_shapes=[shape],
        output_dtypes=[T],
    )
    return out


def block_matmul(x: mx.array, blocks: mx.array, type_name: str) -> mx.array:
    """`x @ w.T`; arguments and result as in `mlxq.ops.block_matmul`.

    Raises:
        BackendError: a type without kernels, or more rows or columns than a launch counts.
    """
    op = "block_matmul"
    _check_type(op, type_name)
    M, N, K = prod(x.shape[:-1]), blocks.shape[0], x.shape[-1]
    check_sizes(op, N, M=M, K=K)
    shape = (*x.shape[:-1], N)
    if not (M and N and K):
        return mx.zeros(shape, x.dtype)
    rows = x.reshape(M, K)
    if M <= MAX_VECTOR_ROWS:
        return _qmv(rows, blocks, type_name).reshape(shape)
    return _qmm(rows, blocks, type_name).reshape(shape)


def gather_block_matmul(
    x: mx.array, blocks: mx.array, rhs_indices: mx.array, type_name: str, sorted_indices: bool = False
) -> mx.array:
    """Products with experts; arguments and result as in `mlxq.ops.gather_block_matmul`.

    A product with an expert that `blocks` does not have is NaN.

    Raises:
        BackendError: a type without kernels, or more rows, columns or products than a launch counts.
    """
    op = "gather_block_matmul"
    _check_type(op, type_name)
    (E, N), (M, K) = blocks.shape[:2], x.shape[-2:]
    batch = np.broadcast_shapes(x.shape[:-2], rhs_indices.shape)
    B = prod(batch)
    check_sizes(op, N, M=M, K=K, products=B * M)
    shape = (*batch, M, N)
    if not (B and M and N and K and E):
        return mx.zeros(shape, x.dtype)
    experts = mx.broadcast_to(rhs_indices.astype(mx.uint32), batch).reshape(B)
    n_lhs = prod(x.shape[:-2])
    lhs = mx.broadcast_to(mx.arange(n_lhs, dtype=mx.uint32).reshape(x.shape[:-2]), batch).reshape(B)
    matrices = x.reshape(n_lhs, M, K)
    enough = max(_MIN_SORTED_ROWS, _MIN_ROWS_OF_EXPERT * E)
    if M > MAX_VECTOR_ROWS or enough <= B * M:
        return _gather_qmm(matrices, blocks, lhs, experts, type_name, sorted_indices).reshape(shape)
    return _gather_qmv(matrices, blocks, lhs, experts, type_name).reshape(shape)


def _qmv(x: mx.array, blocks: mx.array, type_name: str) -> mx.array:
    M, N = x.shape[0], blocks.shape[0]
    function, template = _qmv_template("ggml_qmv", type_name, x, M, blocks)
    arguments = (
        "x, w, y, x_shape[1], w_shape[0], room, threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup, "
        "thread_index_in_simdgroup"
    )
    launch = kernel(function, ["x", "w"], ["y"], _qmv_source("ggml_qmv", type_name, arguments), "ggml_qmv")
    (y,) = launch(
        inputs=[x, blocks],
        template=template,
        grid=(_qmv_threads(N, M), 1, 1),
        threadgroup=(_QMV_THREADS, 1, 1),
        output_shapes=[(M, N)],
        output_dtypes=[x.dtype],
    )
    return y


def _gather_qmv(x: mx.array, blocks: mx.array, lhs: mx.array, experts: mx.array, type_name: str) -> mx.array:
    (_, M, _), N, B = x.shape, blocks.shape[1], experts.size
    function, template = _qmv_template("ggml_gather_qmv", type_name, x, M, blocks)
    arguments = (
        "x, w, rows, experts, y, w_shape[0], x_shape[2], w_shape[1], room, threadgroup_position_in_grid, "
        "simdgroup_index_in_threadgroup, thread_index_in_simdgroup"
    )
    source = _qmv_source("ggml_gather_qmv", type_name, arguments)
    launch = kernel(function, ["x", "w", "rows", "experts"], ["y"], source, "ggml_qmv")
    (y,) = launch(
        inputs=[x, blocks, lhs, experts],
        template=template,
        grid=(_qmv_threads(N, M), 1, B),
        threadgroup=(_QMV_THREADS, 1, 1),
        output_shapes=[(B, M, N)],
        output_dtypes=[x.dtype],
    )
    return y


def _qmm(x: mx.array, blocks: mx.array, type_name: str) -> mx.array:
    M, N = x.shape[0], blocks.shape[0]
    function, template = _qmm_template("ggml_qmm", type_name, x, blocks)
    arguments = (
        "x, w, y, x_shape[0], w_shape[0], x_shape[1], room, threadgroup_position_in_grid, "
        "simdgroup_index_in_threadgroup, thread_index_in_simdgroup"
    )
    launch = kernel(function, ["x", "w"], ["y"], _qmm_source("ggml_qmm", type_name, arguments), "ggml_qmm")
    (y,) = launch(
        inputs=[x, blocks],
        template=template,
        grid=(-(-N // _QMM_BN) * _QMM_THREADS, -(-M // _QMM_BM), 1),
        threadgroup=(_QMM_THREADS, 1, 1),
        output_shapes=[(M, N)],
        output_dtypes=[x.dtype],
    )
    return y


def _gather_qmm(
    x: mx.array, blocks: mx.array, lhs: mx.array, experts: mx.array, type_name: str, sorted_indices: bool
) -> mx.array:
    """All rows of the batch as one matrix, sorted by their experts, each expert's in tiles."""
    (_, M, K), N, B = x.shape, blocks.shape[1], experts.size
    if not sorted_indices:
        order = mx.argsort(experts)
        lhs, experts = lhs[order], experts[order]
    rows, experts = x[lhs].reshape(B * M, K), mx.repeat(experts, M)
    function, template = _qmm_template("ggml_gather_qmm", type_name, x, blocks)
    arguments = (
        "x, w, experts, y, x_shape[0], w_shape[0], w_shape[1], x_shape[1], room, threadgroup_position_in_grid, "
        "simdgroup_index_in_threadgroup, thread_index_in_simdgroup"
    )
    source = _qmm_source("ggml_gather_qmm", type_name, arguments)
    launch = kernel(function, ["x", "w", "experts"], ["y"], source, "ggml_qmm")
    (y,) = launch(
        inputs=[rows, blocks, experts],
        template=template,
        grid=(-(-N // _QMM_BN) * _QMM_THREADS, -(-B * M // _QMM_BM), 1),
        threadgroup=(_QMM_THREADS, 1, 1),
        output_shapes=[(B * M, N)],
        output_dtypes=[x.dtype],
    )
    y = y.reshape(B, M, N)
    return y if sorted_indices else y[mx.argsort(order)]


def _qmv_template(function: str, type_name: str, x: mx.array, M: int, blocks: mx.array) -> tuple[str, list]:
    """The kernel's name and template; ROWS and STEPS follow from the type and M."""
    width = piece(blocks.shape[-1])
    name = kernel_name(f"{function}_{type_name.lower()}", x.dtype, m=M, w=width)
    steps = steps_of(type_name)
    return name, [("T", x.dtype), ("M", M), ("ROWS", qmv_rows(M)), ("STEPS", steps), ("WIDTH", width)]


def _qmv_source(function: str, type_name: str, arguments: str) -> str:
    room = f"threadgroup uint4 room[ggml_qmv_room<{type_name}, ROWS, STEPS>()];"
    return f"{room}\n{function}<T, {type_name}, M, ROWS, STEPS, WIDTH>({arguments});"


def steps_of(type_name: str) -> int:
    """How many 1024s of weights of a row `ggml_qmv` has in threadgroup memory at once."""
    return _STEPS.get(type_name, 2)


def qmv_rows(M: int) -> int:
    """Outputs of a SIMD-group: four share what is loaded of x, as far as the sums of M rows fit into registers."""
    return 4 if M <= 8 else 2


def _qmv_threads(N: int, M: int) -> int:
    outputs = qmv_rows(M) * _QMV_THREADS // 32
    return -(-N // outputs) * _QMV_THREADS


def _qmm_template(function: str, type_name: str, x: mx.array, blocks: mx.array) -> tuple[str, list]:
    f = block_format(type_name)
    span, row_bytes = _QMM_SPAN // f.block_size * f.type_size, blocks.shape[-1]
    # Pieces of four bytes may begin before a span, within its row; wider ones would load too much twice.
    width = max(piece(row_bytes, span), min(piece(row_bytes), 4))
    name = kernel_name(f"{function}_{type_name.lower()}", x.dtype, w=width)
    return name, [("T", x.dtype), ("WIDTH", width)]


def _qmm_source(function: str, type_name: str, arguments: str) -> str:
    room = f"threadgroup uint4 room[ggml_qmm_room<{type_name}>()];"
    return f"{room}\n{function}<T, {type_name}, WIDTH>({arguments});"


def piece(*sizes: int) -> int:
    """Bytes of a load of weights: as many as divide all sizes at which pieces begin, at most 16, and so also the
    distance of any row from the beginning of memory."""
    return gcd(16, *sizes)


def _check_type(op: str, type_name: str) -> None:
    if type_name not in METAL_TYPES:
        raise BackendError(
            f"{op}: the metal back end has no kernel for ggml type {type_name!r}; it has for {_listed(METAL_TYPES)}"
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
