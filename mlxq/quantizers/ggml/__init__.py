"""Encoding weights as ggml blocks: one validated signature for every type that we write."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from mlxq.errors import BackendError, FormatError
from mlxq.formats import floats
from mlxq.formats.geometry import block_format
from mlxq.ops.arrays import Operand, describe, to_kind, to_numpy
from mlxq.ops.dispatch import Call, asked, choose, device_of, metal_available

_ASYMMETRIC = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")
_SYMMETRIC = ("Q4_0", "Q5_0", "Q8_0", "Q3_K", "Q6_K")
_IQ4 = ("IQ4_NL", "IQ4_XS")
_FLOATS = ("F32", "F16", "BF16")
#: The ggml types that `quantize` writes.
ENCODABLE = _FLOATS + _ASYMMETRIC + _SYMMETRIC + _IQ4

#: Columns of less importance than this part of the mean count for this much: their codes stay close to the weights.
_LEAST_IMPORTANCE = 1e-6


def quantize(w: Any, name: str, importance: Any | None = None, *, backend: str | None = None) -> Any:
    """Encode weights as blocks of a ggml type.

    Float types are rounded to nearest even. The others are searched: for the least sum of squared errors, each
    weighted by the importance of its column when there is one (`asymmetric`, `symmetric`,
    `iq4` say how). Rows are encoded independently, so rows may be passed in parts, from several threads.

    Args:
        w: NumPy or mlx array, float32 `[..., K]`, finite; `K` a multiple of the type's block.
        name: one of `ENCODABLE`.
        importance: float `[K]`, or `[E, K]` for `w` `[E, ..., K]`: how much the squared error of each input column
            counts, as in an importance matrix; not negative. None, or all zero, is all alike.
        backend: `numpy`, `mlx` or `metal`, as in `mlxq.ops`; None lets the device decide. `metal` has kernels for the K
            types, and leaves the others to mlx.

    Returns:
        uint8 `[..., K // block_size * type_size]`, of the kind of `w`.

    Raises:
        FormatError: a type that cannot be encoded, rows that are not whole blocks, a weight that is not finite or
            too large for the type, importance of another length, negative or not finite.
        BackendError: a back end that is unknown or not installed.
    """
    described = describe(str(name), "w", w)
    _validate(described, name)
    w = to_numpy(w)
    if not floats.all_finite(w):
        raise FormatError(f"{name}: a weight is NaN or infinite in an array of shape {list(w.shape)}")
    return to_kind(_quantize(w, name, importance, backend), described.kind)


def _quantize(w: np.ndarray, name: str, importance: Any | None, backend: str | None) -> np.ndarray:
    format = block_format(name)
    row_bytes = w.shape[-1] // format.block_size * format.type_size
    if name in _FLOATS:
        return _cast(w, name).view(np.uint8).reshape(*w.shape[:-1], row_bytes)
    w = np.ascontiguousarray(w)
    if importance is not None and np.ndim(importance) == 2:
        return _quantize_experts(w, name, np.asarray(importance), backend)
    column_importance = None if importance is None else _normalized(importance, w.shape[-1], name)
    rows = w.reshape(-1, w.shape[-1])
    return _encode(rows, name, column_importance, backend).reshape(*w.shape[:-1], row_bytes)


def _quantize_experts(w: np.ndarray, name: str, importance: np.ndarray, backend: str | None) -> np.ndarray:
    if w.ndim < 3 or importance.shape[0] != w.shape[0]:
        raise FormatError(
            f"{name}: importance of shape {list(importance.shape)} is one row for each expert, but the weights are "
            f"{list(w.shape)}"
        )
    return np.stack([_quantize(part, name, row, backend) for part, row in zip(w, importance, strict=True)])


def _validate(w: Operand, name: str) -> None:
    if name not in ENCODABLE:
        raise FormatError(f"ggml type {name!r} cannot be encoded: the types that can are {', '.join(ENCODABLE)}")
    if w.dtype != "F32" or w.ndim < 1:
        raise FormatError(f"{name}: weights are float32 [..., K], got {w.dtype} {list(w.shape)}")
    block_size = block_format(name).block_size
    if w.shape[-1] % block_size:
        raise FormatError(
            f"{name}: a row is whole blocks of {block_size} weights, got {w.shape[-1]}; choose a type of smaller blocks"
        )


def _cast(w: np.ndarray, name: str) -> np.ndarray:
    out = np.ascontiguousarray(floats.from_float32(w, name))
    if name == "F32":
        return out
    if not floats.all_finite(out):
        raise FormatError(f"{name}: the weight {_largest(w):g} is beyond the type's range; store it as F32")
    return out


def _largest(w: np.ndarray) -> float:
    return float(w.flat[np.abs(w).argmax()])


def _normalized(importance: np.ndarray, K: int, name: str) -> np.ndarray | None:
    """Importance with mean 1 and no zeros, float32 `[K]`; None where it says nothing."""
    importance = np.asarray(importance)
    if importance.shape != (K,):
        raise FormatError(f"{name}: importance has one value for each of {K} columns, got {list(importance.shape)}")
    if not np.isfinite(importance).all() or (importance < 0).any():
        raise FormatError(f"{name}: importance is finite and not negative, got {_unfit(importance):g}")
    mean = importance.mean(dtype=np.float64)
    if mean == 0:
        return None
    return np.maximum(importance / mean, _LEAST_IMPORTANCE).astype(np.float32)


def _unfit(importance: np.ndarray) -> float:
    return float(importance[~np.isfinite(importance) | (importance < 0)][0])


def _encode(rows: np.ndarray, name: str, importance: np.ndarray | None, backend: str | None) -> np.ndarray:
    if name in _ASYMMETRIC:
        from mlxq.quantizers.ggml import asymmetric as encoder
    elif name in _SYMMETRIC:
        from mlxq.quantizers.ggml import symmetric as encoder
    else:
        from mlxq.quantizers.ggml import iq4 as encoder
    chosen = _backend(name, importance is not None, encoder.quantize, backend)
    if rows.size == block_format(name).block_size:
        # NumPy adds the weights of a single block in another order than among others: its bytes would differ.
        return encoder.quantize(np.concatenate([rows, rows]), name, importance, chosen)[:1]
    return encoder.quantize(rows, name, importance, chosen)


def _backend(name: str, weighted: bool, encode: Callable[..., np.ndarray], backend: str | None) -> str:
    """What computes a search; a Metal kernel that the table chose is checked when it is first used."""
    device = _device()
    chosen = choose(Call("encode", device, format=name, metal=device == "gpu" and metal_available()), backend)
    if chosen == "metal" and not asked(backend):
        from mlxq.quantizers.ggml import metal_check

        return "metal" if metal_check.passes(name, weighted, encode) else "numpy"
    return chosen


def _device() -> str:
    """`gpu` where mlx has one, else `host`: NumPy's search is faster than mlx's on a CPU."""
    if sys.platform != "darwin" and "mlx.core" not in sys.modules:
        return "host"
    try:
        return "gpu" if device_of("mlx") == "gpu" else "host"
    except BackendError:
        return "host"
