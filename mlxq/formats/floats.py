"""Float storage in NumPy: float32, float16, and bfloat16 kept as the uint16 array of its bits.

NumPy has no bfloat16. Its bits are the upper half of a float32's, so widening is a shift and narrowing rounds the
lower half away, to nearest, ties to even (IEEE 754 roundTiesToEven, the rounding of `mlx/types/bf16.h`).
"""

from __future__ import annotations

import numpy as np

from mlxq.errors import FormatError

_STORAGE = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(np.uint16)}
_DTYPES = {storage: name for name, storage in _STORAGE.items()}
#: Elements converted at a time: every temporary stays in the second-level cache.
_CHUNK = 1 << 16
#: The one NaN that narrowing produces, as in mlx.
_BF16_NAN = 0x7FC0


def storage_dtype(dtype: str) -> np.dtype:
    """NumPy dtype that stores `F32`, `F16` or `BF16` (uint16 bits).

    Raises:
        FormatError: another name.
    """
    try:
        return _STORAGE[dtype]
    except KeyError:
        raise FormatError(f"float dtype {dtype!r} is not known: the float dtypes are {', '.join(_STORAGE)}") from None


def dtype_of(array: np.ndarray) -> str:
    """`F32`, `F16` or `BF16`, by the array's storage dtype (uint16 is bfloat16).

    Raises:
        FormatError: an array of another dtype.
    """
    try:
        return _DTYPES[array.dtype]
    except KeyError:
        raise FormatError(
            f"an array of dtype {array.dtype} stores no float format: expected float32 (F32), float16 (F16) or "
            "uint16 holding bfloat16 bits (BF16)"
        ) from None


def bf16_bits_to_float32(a: np.ndarray) -> np.ndarray:
    """Widen bfloat16 bits, uint16 of any shape, to float32 of the same shape. Exact."""
    bits = np.asarray(a, np.uint16).astype(np.uint32, order="C")
    np.left_shift(bits, 16, out=bits)
    return bits.view(np.float32)


def float32_to_bf16_bits(a: np.ndarray) -> np.ndarray:
    """Round float32 of any shape to bfloat16 bits, uint16 of the same shape.

    To nearest, ties to even; beyond the largest bfloat16 it is infinity; every NaN becomes 0x7FC0.
    """
    a = np.ascontiguousarray(a, np.float32)
    out = np.empty(a.shape, np.uint16)
    flat, flat_out = a.reshape(-1), out.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        target = flat_out[start : start + _CHUNK]
        bits = part.view(np.uint32)
        rounded = bits >> 16
        rounded &= 1
        rounded += 0x7FFF
        rounded += bits
        # The upper half of each word, whichever byte order the machine has.
        np.right_shift(rounded, 16, out=rounded)
        target[...] = rounded
        nan = np.isnan(part)
        if nan.any():
            target[nan] = _BF16_NAN
    return out


def to_float32(a: np.ndarray, dtype: str) -> np.ndarray:
    """Values of a storage array as float32, exact. `F32` returns `a` itself, not a copy.

    Args:
        a: float32, float16 or uint16 (bfloat16 bits), any shape; its dtype must be `storage_dtype(dtype)`.
        dtype: `F32`, `F16` or `BF16`.

    Raises:
        FormatError: unknown dtype, or an array that is not its storage.
    """
    _check_storage(a, dtype)
    if dtype == "BF16":
        return bf16_bits_to_float32(a)
    return a.astype(np.float32, copy=False)


def from_float32(a: np.ndarray, dtype: str) -> np.ndarray:
    """Round float32 values to the storage of `dtype`, to nearest even; too large becomes infinity.

    `F32` returns `a` itself, not a copy.

    Raises:
        FormatError: unknown dtype, or `a` is not float32.
    """
    _check_storage(a, "F32")
    if storage_dtype(dtype) == np.uint16:
        return float32_to_bf16_bits(a)
    with np.errstate(over="ignore", under="ignore"):
        return a.astype(storage_dtype(dtype), copy=False)


def _check_storage(a: np.ndarray, dtype: str) -> None:
    expected = storage_dtype(dtype)
    if a.dtype != expected:
        raise FormatError(f"{dtype} is stored as {expected}, but the array is {a.dtype}")


def all_finite(a: np.ndarray) -> bool:
    """Whether no value of a storage array (F32, F16 or BF16 bits) is NaN or infinite.

    Works on the bits, a cache-sized piece at a time: the exponent is all ones exactly for what is not finite.

    Raises:
        FormatError: an array that stores no float format.
    """
    dtype = dtype_of(a)
    bits = np.ascontiguousarray(a).reshape(-1).view(np.uint32 if dtype == "F32" else np.uint16)
    without_sign, exponent = {"F32": (0x7FFFFFFF, 0x7F800000), "F16": (0x7FFF, 0x7C00), "BF16": (0x7FFF, 0x7F80)}[dtype]
    for start in range(0, bits.size, _CHUNK):
        if (bits[start : start + _CHUNK] & bits.dtype.type(without_sign)).max() >= exponent:
            return False
    return True
