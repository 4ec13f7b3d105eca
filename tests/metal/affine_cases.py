"""Packed weights, and what products with them should be, for the tests of the affine kernels."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxq.formats import affine
from mlxq.formats.floats import dtype_of, to_float32
from mlxq.ops.arrays import to_numpy

DTYPES = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}
#: Largest error of a product by the largest result: float32 sums of a few thousand terms; the other two are half a
#: unit in the last place of the output (2**-11 and 2**-9) with little to spare for the sum itself.
TOLERANCES = {mx.float32: 1e-6, mx.float16: 5e-4, mx.bfloat16: 4e-3}


class Packed(NamedTuple):
    """Random codes on random grids; bias near the middle of the codes' range, so that weights are near 0."""

    w_q: mx.array
    scales: mx.array
    biases: mx.array

    def decoded(self, bits: int, group_size: int) -> np.ndarray:
        """`scales * q + biases` in float64, not rounded."""
        codes = affine.unpack(np.asarray(self.w_q), bits, self.scales.shape[-1] * group_size)
        scale, bias = (np.repeat(doubles(p), group_size, -1) for p in (self.scales, self.biases))
        return codes * scale + bias


def packed(shape: tuple[int, ...], bits: int, group_size: int, dtype: mx.Dtype, seed: int = 0) -> Packed:
    """Packed weights `[..., N, K]`."""
    rng = np.random.default_rng(seed)
    *lead, K = shape
    w_q = rng.integers(0, 1 << 32, (*lead, K * bits // 32), np.uint64).astype(np.uint32)
    scales = rng.normal(size=(*lead, K // group_size)) / 2**bits
    biases = -scales * (2**bits - 1) * rng.uniform(0.4, 0.6, scales.shape)
    return Packed(mx.array(w_q), *(mx.array(p.astype(np.float32)).astype(dtype) for p in (scales, biases)))


def normal(shape: tuple[int, ...], dtype: mx.Dtype, seed: int = 1) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype(dtype)


def doubles(a: mx.array) -> np.ndarray:
    stored = to_numpy(a)
    return to_float32(stored, dtype_of(stored)).astype(np.float64)


def error(y: mx.array, expected: np.ndarray) -> float:
    """Largest deviation, by the largest value expected."""
    assert y.shape == expected.shape
    return float(np.abs(doubles(y) - expected).max() / np.abs(expected).max())
