"""The rules of the operations, checked on kinds, shapes and dtypes before anything is computed.

A message names the operation, the rule, both sides, and every parameter. What passed once passes again: the checks are
cached by what they depend on, because a model makes the same few calls for every token.

Each check returns the number of rows of x, M (0 where there is no x).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from math import prod
from typing import TypeVar

from mlxq.errors import FormatError
from mlxq.formats.geometry import OPS_GROUP_SIZES, PACKED_CODES, block_format, validate_affine, validate_width
from mlxq.ops.arrays import Operand
from mlxq.types import FLOAT_BYTES

_Check = TypeVar("_Check", bound=Callable[..., int])


def _cached(check: _Check) -> _Check:
    # 4.0 and True are equal to legal values and must not pass for them.
    cached = lru_cache(maxsize=4096, typed=True)(check)

    @wraps(check)
    def run(*args: object) -> int:
        try:
            return cached(*args)
        except TypeError:  # a list, say, has no hash: the check itself says what is wrong with it
            return check(*args)

    return run


@_cached
def quantize(w: Operand, bits: int, group_size: int, mode: str) -> int:
    """`w` is a float array `[..., N, K]` whose rows divide into groups."""
    params = f"; w.shape == {w.shape}, bits={bits}, group_size={group_size}, mode={mode!r}"
    _check_mode("quantize", mode, params)
    _check_float("quantize", "w", w, params)
    if w.ndim < 2:
        raise FormatError(f"quantize: w must have at least 2 dimensions, but it has {w.ndim}{params}")
    try:
        validate_width(w.shape[-1], bits, group_size, OPS_GROUP_SIZES)
    except FormatError as error:
        raise FormatError(f"quantize: {error}{params}") from None
    return 0


@_cached
def dequantize(
    w_q: Operand, scales: Operand, biases: Operand, bits: int, group_size: int, mode: str, dtype: str | None
) -> int:
    """`w_q` uint32 `[..., N, K * bits // 32]` with scales and biases `[..., N, K // group_size]`; a known dtype."""
    _check_packed("dequantize", w_q, scales, biases, bits, group_size, mode)
    if dtype is not None and dtype not in tuple(FLOAT_BYTES):
        raise FormatError(f"dequantize: dtype must be one of {', '.join(FLOAT_BYTES)}, got {dtype!r}")
    return 0


@_cached
def quantized_matmul(
    x: Operand,
    w_q: Operand,
    scales: Operand,
    biases: Operand,
    transpose: bool,
    bits: int,
    group_size: int,
    mode: str,
) -> int:
    """One packed matrix `[N, K]`, and an x whose last axis is K (N when not `transpose`)."""
    op = "quantized_matmul"
    _check_packed(op, w_q, scales, biases, bits, group_size, mode)
    params = _packed_params(w_q, scales, transpose, bits, group_size)
    _check_axes(op, "w_q", w_q, 2, "[N, K * bits // 32]", params)
    return _check_product(op, x, _inner(w_q, transpose, bits), params)


@_cached
def gather_quantized_matmul(
    x: Operand,
    w_q: Operand,
    scales: Operand,
    biases: Operand,
    rhs_indices: Operand,
    transpose: bool,
    bits: int,
    group_size: int,
    mode: str,
) -> int:
    """A stack of packed matrices, x `[*batch, M, K]`, and integers whose shape broadcasts with `batch`."""
    op = "gather_quantized_matmul"
    _check_packed(op, w_q, scales, biases, bits, group_size, mode)
    params = _packed_params(w_q, scales, transpose, bits, group_size)
    _check_axes(op, "w_q", w_q, 3, "[experts, N, K * bits // 32]", params)
    _check_product(op, x, _inner(w_q, transpose, bits), params)
    return _check_experts(op, x, rhs_indices, params)


@_cached
def matmul(x: Operand, w: Operand) -> int:
    """A float matrix `[N, K]`, and an x whose last axis is K."""
    _check_float("matmul", "w", w, f"; w.shape == {w.shape}")
    _check_axes("matmul", "w", w, 2, "[N, K]", f"; w.shape == {w.shape}")
    return _check_product("matmul", x, w.shape[-1], f", w.shape == {w.shape}")


@_cached
def gather_matmul(x: Operand, w: Operand, rhs_indices: Operand) -> int:
    """A stack of float matrices, x `[*batch, M, K]`, and integers whose shape broadcasts with `batch`."""
    op, params = "gather_matmul", f", w.shape == {w.shape}"
    _check_float(op, "w", w, f"; w.shape == {w.shape}")
    _check_axes(op, "w", w, 3, "[experts, N, K]", f"; w.shape == {w.shape}")
    _check_product(op, x, w.shape[-1], params)
    return _check_experts(op, x, rhs_indices, params)


@_cached
def block_dequantize(blocks: Operand, type_name: str, dtype: str) -> int:
    """Rows of whole blocks of a known ggml type; a known dtype."""
    _check_blocks("block_dequantize", blocks, type_name)
    if dtype not in tuple(FLOAT_BYTES):
        raise FormatError(f"block_dequantize: dtype must be one of {', '.join(FLOAT_BYTES)}, got {dtype!r}")
    return 0


@_cached
def block_matmul(x: Operand, blocks: Operand, type_name: str) -> int:
    """One matrix of blocks `[N, row_bytes]`, and an x whose last axis is K."""
    op, params = "block_matmul", _block_params(blocks, type_name)
    K = _check_blocks(op, blocks, type_name)
    _check_axes(op, "blocks", blocks, 2, "[N, row_bytes]", params)
    return _check_product(op, x, K, params)


@_cached
def gather_block_matmul(x: Operand, blocks: Operand, rhs_indices: Operand, type_name: str) -> int:
    """A stack of matrices of blocks, x `[*batch, M, K]`, and integers whose shape broadcasts with `batch`."""
    op, params = "gather_block_matmul", _block_params(blocks, type_name)
    K = _check_blocks(op, blocks, type_name)
    _check_axes(op, "blocks", blocks, 3, "[experts, N, row_bytes]", params)
    _check_product(op, x, K, params)
    return _check_experts(op, x, rhs_indices, params)


def _check_blocks(op: str, blocks: Operand, type_name: str) -> int:
    """The weights in a row, K."""
    params = _block_params(blocks, type_name)
    if not isinstance(type_name, str):
        raise FormatError(f"{op}: type_name must be the name of a ggml type, got {type_name!r}{params}")
    try:
        geometry = block_format(type_name)
    except FormatError as error:
        raise FormatError(f"{op}: {error}{params}") from None
    if blocks.dtype != "uint8":
        raise FormatError(f"{op}: blocks must be uint8 bytes, got {blocks.dtype}{params}")
    n_blocks, rest = divmod(blocks.shape[-1] if blocks.shape else 1, geometry.type_size)
    if rest:
        raise FormatError(f"{op}: a row must be whole blocks of {geometry.type_size} bytes{params}")
    return n_blocks * geometry.block_size


def _block_params(blocks: Operand, type_name: str) -> str:
    return f", blocks.shape == {blocks.shape}, type_name={type_name!r}"


def _check_packed(
    op: str, w_q: Operand, scales: Operand, biases: Operand, bits: int, group_size: int, mode: str
) -> None:
    params = (
        f"; w_q.shape == {w_q.shape}, scales.shape == {scales.shape}, biases.shape == {biases.shape}, "
        f"bits={bits}, group_size={group_size}, mode={mode!r}"
    )
    _check_mode(op, mode, params)
    try:
        validate_affine(bits, group_size, OPS_GROUP_SIZES)
    except FormatError as error:
        raise FormatError(f"{op}: {error}{params}") from None
    if w_q.dtype != "uint32":
        raise FormatError(f"{op}: w_q must be uint32 words, got {w_q.dtype}{params}")
    _check_float(op, "scales", scales, params)
    if biases.dtype != scales.dtype:
        raise FormatError(f"{op}: scales and biases must have one dtype, got {scales.dtype} and {biases.dtype}{params}")
    if w_q.ndim < 2:
        raise FormatError(f"{op}: w_q must have at least 2 dimensions, but it has {w_q.ndim}{params}")
    if scales.shape != biases.shape or scales.shape[:-1] != w_q.shape[:-1]:
        raise FormatError(f"{op}: w_q, scales and biases must agree in all axes but the last{params}")
    held, described = w_q.shape[-1] * 32, scales.shape[-1] * group_size
    if described % PACKED_CODES:
        raise FormatError(f"{op}: groups of {group_size} come in pairs, but a row has {scales.shape[-1]}{params}")
    if held != described * bits:
        raise FormatError(
            f"{op}: the words of a row hold {held / bits:g} codes, but its scales are for {described}{params}"
        )


def _check_product(op: str, x: Operand, inner: int, params: str) -> int:
    params = f"; x.shape == {x.shape}{params}"
    _check_float(op, "x", x, params)
    if not x.shape or x.shape[-1] != inner:
        columns = x.shape[-1] if x.shape else "no"
        raise FormatError(f"{op}: x has {columns} columns, but the weights multiply {inner}{params}")
    return prod(x.shape[:-1])


def _check_experts(op: str, x: Operand, rhs_indices: Operand, params: str) -> int:
    params = f"; x.shape == {x.shape}, rhs_indices.shape == {rhs_indices.shape}{params}"
    if x.ndim < 2:
        raise FormatError(f"{op}: x must be [*batch, M, K], but it has {x.ndim} axes{params}")
    # A NumPy uint16 array is an index type here, although among floats it means bfloat16.
    is_uint16 = (rhs_indices.kind, rhs_indices.dtype) == ("numpy", "BF16")
    if not (is_uint16 or rhs_indices.dtype.startswith(("int", "uint"))):
        raise FormatError(f"{op}: rhs_indices must be integers, got {rhs_indices.dtype}{params}")
    for a, b in zip(reversed(x.shape[:-2]), reversed(rhs_indices.shape), strict=False):
        if a != b and 1 not in (a, b):
            raise FormatError(f"{op}: the batch axes of x do not broadcast with rhs_indices{params}")
    return max(prod(x.shape[:-1]), x.shape[-2] * prod(rhs_indices.shape))


def _inner(w_q: Operand, transpose: bool, bits: int) -> int:
    return w_q.shape[-1] * 32 // bits if transpose else w_q.shape[-2]


def _packed_params(w_q: Operand, scales: Operand, transpose: bool, bits: int, group_size: int) -> str:
    return (
        f", w_q.shape == {w_q.shape}, scales.shape == {scales.shape}, "
        f"transpose={transpose}, bits={bits}, group_size={group_size}"
    )


def _check_axes(op: str, name: str, a: Operand, ndim: int, layout: str, params: str) -> None:
    if a.ndim != ndim:
        raise FormatError(f"{op}: {name} must be {layout}, but it has {a.ndim} axes{params}")


def _check_mode(op: str, mode: str, params: str) -> None:
    if mode != "affine":
        raise FormatError(f"{op}: mode must be 'affine', got {mode!r}{params}")


def _check_float(op: str, name: str, a: Operand, params: str) -> None:
    if a.dtype not in FLOAT_BYTES:
        raise FormatError(
            f"{op}: {name} must be float32, float16 or bfloat16 (uint16 bits in NumPy), got {a.dtype}{params}"
        )
