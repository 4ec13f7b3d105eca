"""The operations on quantized weights: one validated signature each, computed by one of several back ends.

Every function takes NumPy arrays (uint16 holds bfloat16 bits) or mlx arrays, and returns the kind of its first
argument. `backend` is `numpy`, `mlx`, `metal`, or None: then `MLXQ_BACKEND` decides, or the table in
`mlxq.ops.dispatch`. Products of mlx arrays are differentiable with respect to x, whatever computes them. With NumPy
arrays and the NumPy back end mlx is not imported.

All of them raise `FormatError` when bits, group size, shapes or dtypes break a rule, and `BackendError` for a back
end that is unknown, not installed, or cannot do what it was asked for (`metal` off a Mac, or for a ggml type without
kernels).
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any

from mlxq.api import public
from mlxq.errors import FormatError
from mlxq.formats.floats import all_finite
from mlxq.ops import float_modes, kernel_check, validation
from mlxq.ops.arrays import Kind, Operand, describe, import_mlx, indices_to_kind, to_kind
from mlxq.ops.choices import Product
from mlxq.ops.dispatch import Backend, Call, asked, call_on, choose
from mlxq.ops.fused import BlockWeights, PackedWeights, gated_projection, projections
from mlxq.ops.kernel_cases import Affine, Blocks
from mlxq.types import QuantSpec

__all__ = [
    "BlockWeights",
    "PackedWeights",
    "block_dequantize",
    "block_matmul",
    "dequantize",
    "gated_projection",
    "gather_block_matmul",
    "gather_matmul",
    "gather_quantized_matmul",
    "matmul",
    "projections",
    "quantize",
    "quantized_matmul",
]


@public
def quantize(w: Any, *, bits: int, group_size: int, mode: str = "affine", backend: str | None = None) -> tuple:
    """Quantize to the min/max grid of `mx.quantize`.

    Args:
        w: float `[..., N, K]`, `K` a multiple of `group_size`, finite; that NumPy arrays are is checked.
        bits: 2, 3, 4, 5, 6 or 8.
        group_size: 16, 32, 64 or 128; `K` is a multiple of 32. mlx has no groups of 16: NumPy or Metal compute them.
        mode: `affine`.

    Returns:
        `w_q` uint32 `[..., N, K * bits // 32]`; `scales`, `biases` `[..., N, K // group_size]` in the dtype of `w`.
    """
    described = describe("quantize", "w", w)
    validation.quantize(described, bits, group_size, mode)
    if described.kind == "numpy" and not all_finite(w):
        raise FormatError(f"quantize: a weight is NaN or infinite; w.shape == {w.shape}")
    how = Affine(bits, group_size, "", described.dtype, described.shape[-1])
    run, kind = _affine_backend("quantize", described.kind, 0, backend, how)
    # NumPy arrays get the same codes on every machine, unless the Metal kernel is asked for.
    on_cpu = described.kind == "numpy" and getattr(run, "quantize_on_cpu", None)
    compute = on_cpu or run.quantize
    return tuple(to_kind(a, described.kind) for a in compute(to_kind(w, kind), bits, group_size))


@public
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
        scales, biases: `[..., N, K // group_size]`, one float dtype; in a float mode scales uint8 and biases None.
        mode: `affine`, or `mxfp4`, `mxfp8`, `nvfp4`, whose bits and group size follow from it.
        dtype: `F32`, `F16` or `BF16`, what the result is converted to; the dtype of `scales` by default, float32 in a
            float mode.

    Returns:
        `[..., N, K]`.
    """
    if mode != "affine" and biases is None:
        return float_modes.dequantize(w_q, scales, QuantSpec(bits, group_size, mode), dtype, backend)
    op = "dequantize"
    described = [describe(op, name, a) for name, a in (("w_q", w_q), ("scales", scales), ("biases", biases))]
    validation.dequantize(*described, bits, group_size, mode, dtype)
    own = described[0].kind
    run, kind = _affine_backend(op, own, 0, backend, _affine("", described[1], bits, group_size))
    packed = [to_kind(a, kind) for a in (w_q, scales, biases)]
    return to_kind(run.dequantize(*packed, bits, group_size, dtype), own)


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
        scales, biases: `[N, K // group_size]`, one float dtype; in a float mode as in `dequantize`.

    Returns:
        `[..., N]` (`[..., K]`), in the dtype of x and scales when they are the same, else float32; in a float mode in
        the dtype of x.
    """
    if mode != "affine" and biases is None:
        return float_modes.quantized_matmul(x, w_q, scales, QuantSpec(bits, group_size, mode), transpose, backend)
    op = "quantized_matmul"
    named = (("x", x), ("w_q", w_q), ("scales", scales), ("biases", biases))
    described = [describe(op, name, a) for name, a in named]
    rows = validation.quantized_matmul(*described, transpose, bits, group_size, mode)
    own = described[0].kind
    how = _affine(described[0].dtype, described[2], bits, group_size, transpose)
    run, kind = _affine_backend(op, own, rows, backend, how)
    arrays = [to_kind(a, kind) for _, a in named]
    return to_kind(run.quantized_matmul(*arrays, transpose, bits, group_size), own)


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
        scales, biases: `[experts, N, K // group_size]`, one float dtype; in a float mode as in `dequantize`.
        rhs_indices: integers whose shape broadcasts with `batch`: the expert of each `[M, K]` matrix.
        sorted_indices: the indices are in ascending order; the mlx back end may use it.

    Returns:
        `[*(batch broadcast with rhs_indices), M, N]` (`[..., M, K]`), dtype as in `quantized_matmul`.
    """
    op = "gather_quantized_matmul"
    if mode != "affine" and biases is None:
        spec = QuantSpec(bits, group_size, mode)
        return float_modes.gather_quantized_matmul(
            x, w_q, scales, rhs_indices, spec, transpose, sorted_indices, backend
        )
    named = (("x", x), ("w_q", w_q), ("scales", scales), ("biases", biases))
    described = [describe(op, name, a) for name, a in (*named, ("rhs_indices", rhs_indices))]
    rows = validation.gather_quantized_matmul(*described, transpose, bits, group_size, mode)
    own = described[0].kind
    how = _affine(described[0].dtype, described[2], bits, group_size, transpose)
    run, kind = _affine_backend(op, own, rows, backend, how, experts=w_q.shape[0])
    arrays = [to_kind(a, kind) for _, a in named]
    indices = indices_to_kind(rhs_indices, kind)
    return to_kind(run.gather_quantized_matmul(*arrays, indices, transpose, bits, group_size, sorted_indices), own)


def matmul(x: Any, w: Any, *, backend: str | None = None) -> Any:
    """`x @ w.T` with float weights.

    Args:
        x: float `[..., K]`.
        w: float `[N, K]`.

    Returns:
        `[..., N]`, in the dtype of x and w when they are the same, else float32.
    """
    described = describe("matmul", "x", x)
    rows = validation.matmul(described, describe("matmul", "w", w))
    run, kind = _backend("matmul", described.kind, rows, backend)
    return to_kind(run.matmul(to_kind(x, kind), to_kind(w, kind)), described.kind)


def gather_matmul(x: Any, w: Any, rhs_indices: Any, *, sorted_indices: bool = False, backend: str | None = None) -> Any:
    """`matmul` with chosen matrices of a stack `w` `[experts, N, K]`; the rest as in `gather_quantized_matmul`."""
    op = "gather_matmul"
    named = (("x", x), ("w", w), ("rhs_indices", rhs_indices))
    described = [describe(op, name, a) for name, a in named]
    own = described[0].kind
    run, kind = _backend(op, own, validation.gather_matmul(*described), backend)
    indices = indices_to_kind(rhs_indices, kind)
    return to_kind(run.gather_matmul(to_kind(x, kind), to_kind(w, kind), indices, sorted_indices), own)


def block_dequantize(blocks: Any, *, type_name: str, dtype: str = "F32", backend: str | None = None) -> Any:
    """Weights of rows of ggml blocks, as `formats.ggml.dequantize` computes them.

    Args:
        blocks: uint8 `[..., row_bytes]`, whole blocks.
        type_name: their ggml type, such as `Q6_K`.
        dtype: `F32`, `F16` or `BF16`, what the result is converted to.

    Returns:
        `[..., K]`.
    """
    op = "block_dequantize"
    described = describe(op, "blocks", blocks)
    validation.block_dequantize(described, type_name, dtype)
    run, kind = _block_backend(op, described.kind, 0, backend, Blocks(type_name, dtype, blocks.shape[-1]))
    return to_kind(run.block_dequantize(to_kind(blocks, kind), type_name, dtype), described.kind)


def block_matmul(x: Any, blocks: Any, *, type_name: str, backend: str | None = None) -> Any:
    """`x @ w.T` with weights that stay in their ggml blocks.

    Args:
        x: float `[..., K]`.
        blocks: uint8 `[N, row_bytes]`, rows of whole blocks.
        type_name: their ggml type, such as `Q6_K`.

    Returns:
        `[..., N]`, in the dtype of x.
    """
    op = "block_matmul"
    described = describe(op, "x", x)
    rows = validation.block_matmul(described, describe(op, "blocks", blocks), type_name)
    how = Blocks(type_name, described.dtype, blocks.shape[-1])
    run, kind = _block_backend(op, described.kind, rows, backend, how)
    return to_kind(run.block_matmul(to_kind(x, kind), to_kind(blocks, kind), type_name), described.kind)


def gather_block_matmul(
    x: Any,
    blocks: Any,
    rhs_indices: Any,
    *,
    type_name: str,
    sorted_indices: bool = False,
    backend: str | None = None,
) -> Any:
    """`block_matmul` with chosen matrices of a stack `blocks` `[experts, N, row_bytes]`; the rest as in
    `gather_quantized_matmul`."""
    op = "gather_block_matmul"
    described = [describe(op, name, a) for name, a in (("x", x), ("blocks", blocks), ("rhs_indices", rhs_indices))]
    own = described[0].kind
    rows = validation.gather_block_matmul(*described, type_name)
    how = Blocks(type_name, described[0].dtype, blocks.shape[-1])
    run, kind = _block_backend(op, own, rows, backend, how)
    arrays = to_kind(x, kind), to_kind(blocks, kind), indices_to_kind(rhs_indices, kind)
    return to_kind(run.gather_block_matmul(*arrays, type_name, sorted_indices), own)


def _backend(op: str, own: Kind, rows: int, backend: str | None) -> tuple[ModuleType, Kind]:
    """The module that computes a call on float weights, and the kind of arrays it takes."""
    name = choose(call_on(own, op, rows), backend)
    return _computing(f"{name}_backend", own, op, backend)


def _affine_backend(
    op: str, own: Kind, rows: int, backend: str | None, how: Affine, experts: int = 0
) -> tuple[ModuleType, Kind]:
    """The same for affine weights."""
    # What `mlxq bench --kernels` measures: products with the transposed weights, in one dtype.
    product = None
    if own == "mlx" and how.transpose and how.dtype == how.scales_dtype:
        product = Product(how.bits, how.group_size, how.dtype, how.N, how.K, experts)
    name = _checked(call_on(own, op, rows, group_size=how.group_size, product=product), backend, how)
    return _computing(f"{name}_backend", own, op, backend)


def _block_backend(op: str, own: Kind, rows: int, backend: str | None, blocks: Blocks) -> tuple[ModuleType, Kind]:
    """The same for ggml blocks."""
    name = _checked(call_on(own, op, rows, blocks.type_name), backend, blocks)
    return _computing("metal_blocks" if name == "metal" else f"{name}_backend", own, op, backend)


def _checked(call: Call, backend: str | None, weights: Affine | Blocks) -> Backend:
    """The back end of a call; a Metal kernel that the table chose is checked when it is first used."""
    name = choose(call, backend)
    if name == "metal" and not asked(backend) and not kernel_check.passes(call.op, weights, call.rows):
        return choose(call, without_metal=True)
    return name


def _affine(dtype: str, scales: Operand, bits: int, group_size: int, transpose: bool = True) -> Affine:
    """What a kernel on affine weights is made for; `dtype` is that of x."""
    N = scales.shape[-2] if dtype else 0
    return Affine(bits, group_size, dtype, scales.dtype, scales.shape[-1] * group_size, N, transpose)


def _computing(module: str, own: Kind, op: str, backend: str | None) -> tuple[ModuleType | Any, Kind]:
    """A back end for arrays of a kind: of products with mlx arrays one that has gradients."""
    kind: Kind = "numpy" if module == "numpy_backend" else "mlx"
    if own == "mlx" and module != "mlx_backend" and op.endswith("matmul"):
        return _differentiable(module, kind, backend), own
    return _module(module), kind


@cache
def _differentiable(module: str, kind: Kind, backend: str | None) -> Any:
    from mlxq.ops.gradients import Differentiable

    def decode(blocks: Any, type_name: str) -> Any:
        return block_dequantize(blocks, type_name=type_name, backend=backend)

    return Differentiable(_module(module), kind, decode)


@cache
def _module(name: str) -> ModuleType:
    if name != "numpy_backend":
        import_mlx()
    return importlib.import_module(f"mlxq.ops.{name}")
