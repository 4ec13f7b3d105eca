"""mlx arrays as the memory that a kernel sees, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class Sparse:
    """An input of a kernel that is zero but for some pieces, and takes no more memory than they: for arrays too large.

    Attributes:
        shape, dtype: those of an mlx array.
        pieces: index of a flat element -> the values from there on, of the same dtype.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype
    pieces: dict[int, mx.array]

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def reshape(self, *shape: int) -> Sparse:
        rest = -self.size // prod(shape) if -1 in shape else 0
        return replace(self, shape=tuple(rest if n == -1 else n for n in shape))

    def storage(self) -> tuple[np.ndarray, list[slice]]:
        """A flat array, of which untouched pages are not there, and where in its bytes the pieces lie."""
        values = {at: numpy_view(a).reshape(-1) for at, a in self.pieces.items()}
        flat = np.zeros(self.size, next(iter(values.values())).dtype)
        for at, a in values.items():
            flat[at : at + a.size] = a
        return flat, [slice(at * a.itemsize, (at + a.size) * a.itemsize) for at, a in values.items()]


def numpy_view(x: mx.array) -> np.ndarray:
    """The array without a copy, strides as they are; bfloat16 as the uint16 of its bits."""
    mx.eval(x)
    bits = mx.view(x, mx.uint16) if x.dtype == mx.bfloat16 else x
    mx.eval(bits)
    return np.array(bits, copy=False)


def storage(x: mx.array, row_contiguous: bool) -> tuple[np.ndarray, int]:
    """The memory that a kernel sees of an input, as a flat array, and the byte where its pointer stands."""
    a = numpy_view(x)
    if row_contiguous or a.flags.c_contiguous or not a.size:
        return np.ascontiguousarray(a).reshape(-1), 0
    reach = [(n - 1) * s for n, s in zip(a.shape, a.strides, strict=True)]
    low, high = sum(r for r in reach if r < 0), sum(r for r in reach if r > 0) + a.itemsize
    first = a[tuple(slice(-1, None) if r < 0 else slice(0, 1) for r in reach)]
    flat = np.lib.stride_tricks.as_strided(first.reshape(-1), ((high - low) // a.itemsize,), (a.itemsize,))
    return np.ascontiguousarray(flat), -low


def about(x: mx.array, what: str, row_contiguous: bool) -> np.ndarray:
    """`x_shape`, `x_strides` (in elements) or `x_ndim`, as mlx passes them."""
    if what == "shape":
        return np.array(x.shape, np.int32)
    if what == "ndim":
        return np.array([x.ndim], np.int32)
    a = numpy_view(x)
    if row_contiguous and not a.flags.c_contiguous:
        a = np.ascontiguousarray(a)
    return np.array(a.strides, np.int64) // a.itemsize


def empty(shape: Sequence[int], dtype: mx.Dtype, init_value: float | None, sparse: bool = False) -> np.ndarray:
    """An output before a run; a `sparse` one holds zeros, which take no memory."""
    one = numpy_view(mx.full((1,), 0 if init_value is None else init_value, dtype))
    if sparse:
        return np.zeros(prod(shape), one.dtype)
    out = np.full(prod(shape), one[0], one.dtype)
    if init_value is None:
        out.view(np.uint8)[...] = 0xCD
    return out


def mlx_array(a: np.ndarray, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    out = mx.array(a)
    return (mx.view(out, mx.bfloat16) if dtype == mx.bfloat16 else out).reshape(shape)
