"""The rules of the operations, checked on shapes and dtypes before anything is computed.

A message names the operation, the rule, both sides, and every parameter.
"""

from __future__ import annotations

from typing import Any

from mlxq.errors import FormatError
from mlxq.formats.geometry import AFFINE_BITS, AFFINE_GROUP_SIZES, validate_width
from mlxq.ops.arrays import dtype_name, kind_of
from mlxq.types import FLOAT_BYTES


def check_weights(op: str, w: Any, bits: int, group_size: int, mode: str) -> None:
    """`w` is a float array `[..., N, K]` whose rows divide into groups."""
    kind_of(op, "w", w)
    params = f"; w.shape == {tuple(w.shape)}, bits={bits}, group_size={group_size}, mode={mode!r}"
    _check_mode(op, mode, params)
    _check_float(op, "w", w, params)
    if w.ndim < 2:
        raise FormatError(f"{op}: w must have at least 2 dimensions, but it has {w.ndim}{params}")
    try:
        validate_width(w.shape[-1], bits, group_size)
    except FormatError as error:
        raise FormatError(f"{op}: {error}{params}") from None


def check_packed(op: str, w_q: Any, scales: Any, biases: Any, bits: int, group_size: int, mode: str) -> None:
    """`w_q` uint32 `[..., N, K * bits // 32]` with scales and biases `[..., N, K // group_size]` of one float dtype."""
    for name, a in (("w_q", w_q), ("scales", scales), ("biases", biases)):
        kind_of(op, name, a)
    params = (
        f"; w_q.shape == {tuple(w_q.shape)}, scales.shape == {tuple(scales.shape)}, "
        f"biases.shape == {tuple(biases.shape)}, bits={bits}, group_size={group_size}, mode={mode!r}"
    )
    _check_mode(op, mode, params)
    _check_grid_parameters(op, bits, group_size, params)
    if dtype_name(w_q) != "uint32":
        raise FormatError(f"{op}: w_q must be uint32 words, got {dtype_name(w_q)}{params}")
    _check_float(op, "scales", scales, params)
    if dtype_name(biases) != dtype_name(scales):
        raise FormatError(
            f"{op}: scales and biases must have one dtype, got {dtype_name(scales)} and {dtype_name(biases)}{params}"
        )
    if w_q.ndim < 2:
        raise FormatError(f"{op}: w_q must have at least 2 dimensions, but it has {w_q.ndim}{params}")
    K, expected = packed_width(w_q, bits), scales.shape[-1] * group_size if scales.ndim else 0
    if tuple(scales.shape) != tuple(biases.shape) or tuple(scales.shape[:-1]) != tuple(w_q.shape[:-1]):
        raise FormatError(f"{op}: w_q, scales and biases must agree in all axes but the last{params}")
    if w_q.shape[-1] * 32 % bits or expected != K:
        raise FormatError(
            f"{op}: the words of a row hold {w_q.shape[-1] * 32 / bits:g} codes, "
            f"but its scales are for {expected}{params}"
        )


def check_product(op: str, x: Any, inner: int, params: str) -> None:
    """`x` is a float array whose last axis is the inner dimension of the product."""
    kind_of(op, "x", x)
    params = f"; x.shape == {tuple(x.shape)}{params}"
    _check_float(op, "x", x, params)
    if x.ndim < 1 or x.shape[-1] != inner:
        columns = x.shape[-1] if x.ndim else "no"
        raise FormatError(f"{op}: x has {columns} columns, but the weights multiply {inner}{params}")


def check_matrix(op: str, w: Any, ndim: int, layout: str) -> None:
    """`w` is a float array of exactly `ndim` dimensions."""
    kind_of(op, "w", w)
    params = f"; w.shape == {tuple(w.shape)}"
    _check_float(op, "w", w, params)
    check_axes(op, "w", w, ndim, layout, params)


def check_axes(op: str, name: str, w: Any, ndim: int, layout: str, params: str) -> None:
    """An array has exactly `ndim` axes."""
    if w.ndim != ndim:
        raise FormatError(f"{op}: {name} must be {layout}, but it has {w.ndim} axes{params}")


def check_experts(op: str, x: Any, rhs_indices: Any, params: str) -> None:
    """`x` is `[*batch, M, K]`, and the indices are integers whose shape broadcasts with `batch`."""
    kind_of(op, "rhs_indices", rhs_indices)
    params = f"; x.shape == {tuple(x.shape)}, rhs_indices.shape == {tuple(rhs_indices.shape)}{params}"
    if x.ndim < 2:
        raise FormatError(f"{op}: x must be [*batch, M, K], but it has {x.ndim} axes{params}")
    # A NumPy uint16 array is an index type here, although among floats it means bfloat16.
    dtype = dtype_name(rhs_indices)
    if not (dtype.startswith(("int", "uint")) or getattr(rhs_indices.dtype, "kind", "") == "u"):
        raise FormatError(f"{op}: rhs_indices must be integers, got {dtype}{params}")
    for a, b in zip(reversed(x.shape[:-2]), reversed(rhs_indices.shape), strict=False):
        if a != b and 1 not in (a, b):
            raise FormatError(f"{op}: the batch axes of x do not broadcast with rhs_indices{params}")


def check_dtype(op: str, dtype: str | None) -> None:
    """`dtype` names a float type, or is None."""
    if dtype is not None and dtype not in FLOAT_BYTES:
        raise FormatError(f"{op}: dtype must be one of {', '.join(FLOAT_BYTES)}, got {dtype!r}")


def packed_width(w_q: Any, bits: int) -> int:
    """Weights in a row of packed words."""
    return w_q.shape[-1] * 32 // bits


def packed_params(w_q: Any, scales: Any, bits: int, group_size: int, transpose: bool) -> str:
    """The parameters of a product with packed weights, for a message."""
    return (
        f", w_q.shape == {tuple(w_q.shape)}, scales.shape == {tuple(scales.shape)}, "
        f"transpose={transpose}, bits={bits}, group_size={group_size}"
    )


def _check_mode(op: str, mode: str, params: str) -> None:
    if mode != "affine":
        raise FormatError(f"{op}: mode must be 'affine', got {mode!r}{params}")


def _check_grid_parameters(op: str, bits: int, group_size: int, params: str) -> None:
    for name, value, legal in (("bits", bits, AFFINE_BITS), ("group_size", group_size, AFFINE_GROUP_SIZES)):
        if value not in legal:
            raise FormatError(f"{op}: {name} must be one of {', '.join(map(str, legal))}, got {value!r}{params}")


def _check_float(op: str, name: str, a: Any, params: str) -> None:
    if dtype_name(a) not in FLOAT_BYTES:
        raise FormatError(
            f"{op}: {name} must be float32, float16 or bfloat16 (uint16 bits in NumPy), got {dtype_name(a)}{params}"
        )
