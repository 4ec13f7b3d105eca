"""The operations on weights in MLX's float modes (mxfp4, mxfp8, nvfp4): codes and scales, no biases.

mlx computes them, with gradients; on the CPU NumPy decodes and multiplies where x has more than a few rows, and takes
NumPy arrays. Measured on two Xeon cores with mlx 0.32.4, a matrix of 2048 x 768: 64 rows of x take mlx 37 ms (mxfp4),
50 (nvfp4) and 235 (mxfp8), to which decoding takes 8, 10 and 18; 2 rows take it 2.3, 2.5 and 7.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from mlxq.errors import FormatError
from mlxq.formats import float_modes
from mlxq.formats.floats import dtype_of, from_float32, to_float32
from mlxq.formats.geometry import FLOAT_MODES, PACKED_CODES, validate_spec
from mlxq.ops import numpy_backend
from mlxq.ops.arrays import Operand, describe, import_mlx, indices_to_kind, mlx_dtype, to_kind, to_numpy
from mlxq.ops.dispatch import asked, device_of
from mlxq.types import FLOAT_BYTES, QuantSpec

#: Rows of x from which decoding is faster on the CPU.
_FEW_ROWS = 6
#: Weights decoded for one product: 8 MB of float32.
_PART = 1 << 21


def dequantize(w_q: Any, scales: Any, spec: QuantSpec, dtype: str | None, backend: str | None) -> Any:
    """Weights `[..., N, K]` in `dtype`, float32 where it is None, in the kind of array of `w_q`."""
    op, dtype = "dequantize", dtype or "F32"
    mode, _ = _check(op, w_q, scales, spec)
    if dtype not in FLOAT_BYTES:
        raise FormatError(f"{op}: dtype must be one of {', '.join(FLOAT_BYTES)}, got {dtype!r}")
    kind = describe(op, "w_q", w_q).kind
    if _by_mlx(op, kind, 0, backend) and w_q.size:
        mx = import_mlx()
        w, s = (to_kind(a, "mlx") for a in (w_q, scales))
        # mlx rounds to the dtype that it is asked for.
        return to_kind(mx.dequantize(w, s, mode=mode, dtype=mx.float32).astype(mlx_dtype(dtype)), kind)
    w_hat = float_modes.dequantize(to_numpy(w_q), to_numpy(scales), mode)
    return to_kind(from_float32(w_hat, dtype), kind)


def quantized_matmul(x: Any, w_q: Any, scales: Any, spec: QuantSpec, transpose: bool, backend: str | None) -> Any:
    """`x @ w_hat.T`, or `x @ w_hat` when not `transpose`, in the dtype of x."""
    op = "quantized_matmul"
    mode, weights = _check(op, w_q, scales, spec)
    rows, kind = _check_x(op, x, weights, 2, transpose)
    if _by_mlx(op, kind, rows, backend) and x.size and w_q.size:
        mx = import_mlx()
        xs, w, s = (to_kind(a, "mlx") for a in (x, w_q, scales))
        wide = xs if device_of("mlx") == "gpu" else xs.astype(mx.float32)
        return to_kind(mx.quantized_matmul(wide, w, s, transpose=transpose, mode=mode).astype(xs.dtype), kind)

    def product(x: Any, transpose: bool = transpose) -> Any:
        values = to_numpy(x)
        flat = to_float32(values, dtype_of(values)).reshape(prod(values.shape[:-1]), values.shape[-1])
        y = _product(flat, to_numpy(w_q), to_numpy(scales), mode, transpose)
        return to_kind(from_float32(y, dtype_of(values)).reshape(*values.shape[:-1], -1), kind)

    return _differentiable(product, kind, transpose)(x)


def gather_quantized_matmul(
    x: Any,
    w_q: Any,
    scales: Any,
    rhs_indices: Any,
    spec: QuantSpec,
    transpose: bool,
    sorted_indices: bool,
    backend: str | None,
) -> Any:
    """The same with chosen matrices of a stack, x `[*batch, M, K]`; `rhs_indices` broadcasts with `batch`."""
    op = "gather_quantized_matmul"
    mode, weights = _check(op, w_q, scales, spec)
    rows, kind = _check_x(op, x, weights, 3, transpose)
    if x.ndim < 2:
        raise FormatError(f"{op}: x must be [*batch, M, K], but it has {x.ndim} axes; x.shape == {tuple(x.shape)}")
    rows = max(rows, x.shape[-2] * prod(rhs_indices.shape))
    if _by_mlx(op, kind, rows, backend) and x.size and w_q.size and rhs_indices.size:
        mx = import_mlx()
        xs, w, s = (to_kind(a, "mlx") for a in (x, w_q, scales))
        wide = xs if device_of("mlx") == "gpu" else xs.astype(mx.float32)
        how = {"transpose": transpose, "mode": mode, "sorted_indices": sorted_indices}
        y = mx.gather_qmm(wide, w, s, rhs_indices=indices_to_kind(rhs_indices, "mlx"), **how)
        return to_kind(y.astype(xs.dtype), kind)

    def product(x: Any, transpose: bool = transpose) -> Any:
        w, s, indices = to_numpy(w_q), to_numpy(scales), indices_to_kind(rhs_indices, "numpy")

        def multiply(rows: np.ndarray, expert: int) -> np.ndarray:
            return _product(rows, w[expert], s[expert], mode, transpose)

        columns = w.shape[1] if transpose else weights[-1]
        y = numpy_backend.gather(to_numpy(x), len(w), columns, indices, multiply)
        return to_kind(from_float32(y, dtype_of(to_numpy(x))), kind)

    return _differentiable(product, kind, transpose)(x)


def _differentiable(product: Any, kind: str, transpose: bool) -> Any:
    if kind == "numpy":
        return product
    from mlxq.ops.gradients import with_gradient

    return with_gradient(product, lambda cotangent: product(cotangent, not transpose))


def _product(x: np.ndarray, w_q: np.ndarray, scales: np.ndarray, mode: str, transpose: bool) -> np.ndarray:
    """float32 `[M, N]` of x `[M, K]`, or `[M, K]` of `[M, N]`; weights are decoded some rows at a time."""
    N, K = len(w_q), scales.shape[-1] * FLOAT_MODES[mode].group_size
    y = np.zeros((len(x), N if transpose else K), np.float32)
    step = max(_PART // max(K, 1), 1)
    for start in range(0, N if y.size else 0, step):
        part = slice(start, start + step)
        w_hat = float_modes.dequantize(w_q[part], scales[part], mode)
        if transpose:
            np.matmul(x, w_hat.T, out=y[:, part])
        else:
            y += x[:, part] @ w_hat
    return y


def _by_mlx(op: str, kind: str, rows: int, backend: str | None) -> bool:
    """Whether mlx computes; no kernel of ours does, so whoever asks for `metal` gets mlx."""
    name = asked(backend)
    if name is not None:
        return name != "numpy"
    if kind == "numpy":
        return False
    return device_of("mlx") == "gpu" or rows <= _FEW_ROWS


def _check(op: str, w_q: Any, scales: Any, spec: QuantSpec) -> tuple[str, tuple[int, ...]]:
    """The mode, and the shape of the weights.

    Raises:
        FormatError: an unknown mode, or one without these bits and groups, or parts whose dtypes or shapes disagree.
    """
    try:
        validate_spec(spec)
    except FormatError as error:
        raise FormatError(f"{op}: {error}") from None
    mode, geometry = spec.mode, FLOAT_MODES[spec.mode]
    w, s = describe(op, "w_q", w_q), describe(op, "scales", scales)
    params = f"; w_q.shape == {tuple(w.shape)}, scales.shape == {tuple(s.shape)}, mode={mode!r}"
    for name, operand, dtype in (("w_q", w, "uint32"), ("scales", s, "uint8")):
        if operand.dtype != dtype:
            raise FormatError(f"{op}: {name} must be {dtype} in mode {mode}, got {operand.dtype}{params}")
    if w.ndim < 2 or tuple(w.shape[:-1]) != tuple(s.shape[:-1]):
        raise FormatError(f"{op}: w_q and scales must agree in all axes but the last, one at least{params}")
    K = s.shape[-1] * geometry.group_size
    if w.shape[-1] * 32 != K * geometry.bits or K % PACKED_CODES:
        held = w.shape[-1] * 32 / geometry.bits
        raise FormatError(f"{op}: the words of a row hold {held:g} codes, but its scales are for {K}{params}")
    return mode, (*w.shape[:-1], K)


def _check_x(op: str, x: Any, weights: tuple[int, ...], ndim: int, transpose: bool) -> tuple[int, str]:
    """Rows of x, and the kind of array it is."""
    described: Operand = describe(op, "x", x)
    params = f"; x.shape == {tuple(described.shape)}, weights {weights}, transpose={transpose}"
    if len(weights) != ndim:
        raise FormatError(f"{op}: w_q must have {ndim} axes, but it has {len(weights)}{params}")
    if described.dtype not in FLOAT_BYTES:
        raise FormatError(f"{op}: x must be float32, float16 or bfloat16, got {described.dtype}{params}")
    inner = weights[-1] if transpose else weights[-2]
    if not described.shape or described.shape[-1] != inner:
        columns = described.shape[-1] if described.shape else "no"
        raise FormatError(f"{op}: x has {columns} columns, but the weights multiply {inner}{params}")
    return prod(described.shape[:-1]), described.kind
