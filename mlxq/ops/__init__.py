"""The operations on quantized weights: one validated signature each, computed by one of several back ends.

Every function takes NumPy arrays (uint16 holds bfloat16 bits) or mlx arrays, and returns the kind of its first
argument. `backend` is `numpy`, `mlx`, or None: then `MLXQ_BACKEND` decides, or the table in `mlxq.ops.dispatch`.
With NumPy arrays and the NumPy back end mlx is not imported.

All of them raise `FormatError` when bits, group size, shapes or dtypes break a rule, and `BackendError` for a back
end that is unknown or not installed.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from mlxq.ops import validation
from mlxq.ops.arrays import Kind, dtype_name, import_mlx, indices_to_kind, kind_of, to_kind
from mlxq.ops.dispatch import Call, choose, device_of

__all__ = ["dequantize", "gather_matmul", "gather_quantized_matmul", "matmul", "quantize", "quantized_matmul"]


def quantize(w: Any, *, bits: int, group_size: int, mode: str = "affine", backend: str | None = None) -> tuple:
    """Quantize to the min/max grid of `mx.quantize`.

    Args:
        w: float `[..., N, K]`, `K` a multiple of `group_size`, finite.
        bits: 2, 3, 4, 5, 6 or 8.
        group_size: 32, 64 or 128.
        mode: `affine`.

    Returns:
        `w_q` uint32 `[..., N, K * bits // 32]`; `scales`, `biases` `[..., N, K // group_size]` in the dtype of `w`.
    """
    kind = kind_of("quantize", "w", w)
    validation.check_weights("quantize", w, bits, group_size, mode)
    run, run_kind = _backend(Call("quantize", device_of(kind), dtype_name(w)), backend)
    return tuple(to_kind(a, kind) for a in run.quantize(to_kind(w, run_kind), bits, group_size))


def dequantize(
    w_q: Any,
    scales: Any,
    biases: Any,
    *,
    bits: int,
    group_size: int,
    mode: str = "affine",
    dtype: str | None = None,
    backend: str | None = None,
) -> Any:
    """Reconstruct `w_hat = scales * q + biases`, rounded as `mx.dequantize` rounds on the CPU.

    Args:
        w_q: uint32 `[..., N, K * bits // 32]`.
        scales, biases: `[..., N, K // group_size]`, one float dtype.
        dtype: `F32`, `F16` or `BF16`, what the result is converted to; the dtype of `scales` by default.

    Returns:
        `[..., N, K]`.
    """
    op = "dequantize"
    validation.check_packed(op, w_q, scales, biases, bits, group_size, mode)
    validation.check_dtype(op, dtype)
    kind = kind_of(op, "w_q", w_q)
    run, run_kind = _backend(Call(op, device_of(kind), dtype_name(scales)), backend)
    packed = [to_kind(a, run_kind) for a in (w_q, scales, biases)]
    return to_kind(run.dequantize(*packed, bits, group_size, dtype), kind)


def quantized_matmul(
    x: Any,
    w_q: Any,
    scales: Any,
    biases: Any,
    *,
    transpose: bool = True,
    bits: int,
    group_size: int,
    mode: str = "affine",
    backend: str | None = None,
) -> Any:
    """`x @ w_hat.T`, or `x @ w_hat` when not `transpose`.

    Args:
        x: float `[..., K]` (`[..., N]` when not `transpose`).
        w_q: uint32 `[N, K * bits // 32]`.
        scales, biases: `[N, K // group_size]`, one float dtype.

    Returns:
        `[..., N]` (`[..., K]`), in the dtype of x and scales when they are the same, else float32.
    """
    op = "quantized_matmul"
    validation.check_packed(op, w_q, scales, biases, bits, group_size, mode)
    params = validation.packed_params(w_q, scales, bits, group_size, transpose)
    validation.check_axes(op, "w_q", w_q, 2, "[N, K * bits // 32]", params)
    N, K = w_q.shape[0], validation.packed_width(w_q, bits)
    validation.check_product(op, x, K if transpose else N, params)
    kind = kind_of(op, "x", x)
    call = Call(op, device_of(kind), dtype_name(x), rows=x.size // x.shape[-1])
    run, run_kind = _backend(call, backend)
    arrays = [to_kind(a, run_kind) for a in (x, w_q, scales, biases)]
    return to_kind(run.quantized_matmul(*arrays, transpose, bits, group_size), kind)


def gather_quantized_matmul(
    x: Any,
    w_q: Any,
    scales: Any,
    biases: Any,
    rhs_indices: Any,
    *,
    transpose: bool = True,
    bits: int,
    group_size: int,
    mode: str = "affine",
    sorted_indices: bool = False,
    backend: str | None = None,
) -> Any:
    """Products with chosen matrices of a stack (mixture of experts), as `mx.gather_qmm` with `rhs_indices`.

    Args:
        x: float `[*batch, M, K]` (`[*batch, M, N]` when not `transpose`).
        w_q: uint32 `[experts, N, K * bits // 32]`.
        scales, biases: `[experts, N, K // group_size]`, one float dtype.
        rhs_indices: integers whose shape broadcasts with `batch`: the expert of each `[M, K]` matrix.
        sorted_indices: the indices are in ascending order; the mlx back end may use it.

    Returns:
        `[*(batch broadcast with rhs_indices), M, N]` (`[..., M, K]`), dtype as in `quantized_matmul`.
    """
    op = "gather_quantized_matmul"
    validation.check_packed(op, w_q, scales, biases, bits, group_size, mode)
    params = validation.packed_params(w_q, scales, bits, group_size, transpose)
    validation.check_axes(op, "w_q", w_q, 3, "[experts, N, K * bits // 32]", params)
    N, K = w_q.shape[1], validation.packed_width(w_q, bits)
    validation.check_product(op, x, K if transpose else N, params)
    validation.check_experts(op, x, rhs_indices, params)
    kind = kind_of(op, "x", x)
    call = Call(op, device_of(kind), dtype_name(x), rows=_gathered_rows(x, rhs_indices))
    run, run_kind = _backend(call, backend)
    arrays = [to_kind(a, run_kind) for a in (x, w_q, scales, biases)]
    indices = indices_to_kind(rhs_indices, run_kind)
    y = run.gather_quantized_matmul(*arrays, indices, transpose, bits, group_size, sorted_indices)
    return to_kind(y, kind)


def matmul(x: Any, w: Any, *, backend: str | None = None) -> Any:
    """`x @ w.T` with float weights.

    Args:
        x: float `[..., K]`.
        w: float `[N, K]`.

    Returns:
        `[..., N]`, in the dtype of x and w when they are the same, else float32.
    """
    op = "matmul"
    validation.check_matrix(op, w, 2, "[N, K]")
    validation.check_product(op, x, w.shape[1], f", w.shape == {tuple(w.shape)}")
    kind = kind_of(op, "x", x)
    call = Call(op, device_of(kind), dtype_name(x), rows=x.size // x.shape[-1])
    run, run_kind = _backend(call, backend)
    return to_kind(run.matmul(to_kind(x, run_kind), to_kind(w, run_kind)), kind)


def gather_matmul(x: Any, w: Any, rhs_indices: Any, *, sorted_indices: bool = False, backend: str | None = None) -> Any:
    """`matmul` with chosen matrices of a stack `w` `[experts, N, K]`; the rest as in `gather_quantized_matmul`."""
    op = "gather_matmul"
    validation.check_matrix(op, w, 3, "[experts, N, K]")
    params = f", w.shape == {tuple(w.shape)}"
    validation.check_product(op, x, w.shape[2], params)
    validation.check_experts(op, x, rhs_indices, params)
    kind = kind_of(op, "x", x)
    call = Call(op, device_of(kind), dtype_name(x), rows=_gathered_rows(x, rhs_indices))
    run, run_kind = _backend(call, backend)
    indices = indices_to_kind(rhs_indices, run_kind)
    return to_kind(run.gather_matmul(to_kind(x, run_kind), to_kind(w, run_kind), indices, sorted_indices), kind)


def _backend(call: Call, backend: str | None) -> tuple[ModuleType, Kind]:
    """The module that computes a call, and the kind of arrays it takes."""
    name = choose(call, backend)
    if name == "mlx":
        import_mlx()
    return importlib.import_module(f"mlxq.ops.{name}_backend"), name


def _gathered_rows(x: Any, rhs_indices: Any) -> int:
    return max(x.size // x.shape[-1], x.shape[-2] * rhs_indices.size)
