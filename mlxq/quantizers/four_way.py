"""Codes whose weights MLX, GGUF's Q4_1, GPTQ and AWQ all decode to the same numbers: scales and integer zero points.

`w = s * (q - z)` and `w = s * q + b` with `b = -z * s` are the same number, in whatever order and in float16, if no
step of either is rounded: `q`, `z` and `q - z` are integers of `bits` bits, so a scale of `11 - bits` significant bits
leaves each product within the 11 of a float16. Below its normal numbers all are multiples of the smallest.

The search of a group: for a few ranges, the scale that they give, rounded so; both zero points beside the lowest
weight; codes; then the scale of least squares for these codes, rounded, and codes once more. Arrays are laid out by
column, as in `grid_search`.
"""

from __future__ import annotations

import numpy as np

from mlxq.errors import FormatError
from mlxq.quantizers.grid_search import Grids

#: Significant bits of a float16, and the exponent of its smallest number.
_PRECISION, _LEAST_EXPONENT = 11, -24
#: Ranges from the lowest to the highest weight that are tried, as multiples of the largest code.
_RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.72)
_LARGEST = np.float32(65504)


def grids(bits: int) -> Grids:
    """How such grids of `bits` bits, up to 5, are searched and stored; as float16 only."""
    top = np.float32((1 << bits) - 1)
    return Grids(
        search=lambda x, importance: _search(x, importance, bits),
        scales=lambda s: rounded_scales(s, bits),
        biases=lambda b, s: -_zero_points(b, s, top) * s,
    )


def rounded_scales(s: np.ndarray, bits: int) -> np.ndarray:
    """The nearest scales of `11 - bits` significant bits, float32; 0 where there is none beside it.

    Raises:
        FormatError: a scale whose weights are beyond float16.
    """
    mantissa, exponent = np.frexp(s.astype(np.float32))
    kept = np.minimum(_PRECISION - bits, exponent - _LEAST_EXPONENT)
    out = np.ldexp(np.rint(np.ldexp(mantissa, kept)), exponent - kept).astype(np.float32)
    if out.size and np.abs(out).max() * ((1 << bits) - 1) > _LARGEST:
        raise FormatError(f"a step of {np.abs(s).max():g} has weights beyond float16")
    return out


def _zero_points(b: np.ndarray, s: np.ndarray, top: np.float32) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        z = np.where(s != 0, -b / s, 0)
    return np.clip(np.rint(z), 0, top)


def _search(x: np.ndarray, importance: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales (never 0) and biases of one group of columns `[group_size, N]`, as `grid_search.search` gives them."""
    group = _Group(x, importance, bits)
    best = None
    for share in _RANGES:
        s = group.scales_of(share)
        lowest = -group.low / s
        for z in (np.floor(lowest), np.ceil(lowest)):
            tried = group.fit(s, np.clip(z, 0, group.top))
            if best is None:
                best = tried
                continue
            better = tried[0] < best[0]
            best = tuple(np.where(better, a, b) for a, b in zip(tried, best, strict=True))
    _, s, z = best
    return s, -z * s


class _Group:
    def __init__(self, x: np.ndarray, importance: np.ndarray, bits: int):
        self.x, self.bits = x, bits
        self.w = (importance / importance.mean()).astype(np.float32)
        self.top = np.float32((1 << bits) - 1)
        self.low, self.high = np.minimum(x.min(axis=0), 0), np.maximum(x.max(axis=0), 0)
        self._wx = self.w[:, None] * x

    def scales_of(self, share: float) -> np.ndarray:
        return self._nonzero((self.high - self.low) * np.float32(share) / self.top)

    def fit(self, s: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Error, scale and zero point, the scale fitted to the codes of `s`."""
        steps = self._steps(s, z)
        along, square = np.einsum("gn,gn->n", self._wx, steps), self.w @ (steps * steps)
        fitted = self._nonzero(np.where(square > 0, along / np.where(square > 0, square, 1), s))
        steps = self._steps(fitted, z)
        along, square = np.einsum("gn,gn->n", self._wx, steps), self.w @ (steps * steps)
        return fitted * (fitted * square - 2 * along), fitted, z

    def _steps(self, s: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Codes less their zero point."""
        steps = np.rint(self.x * (1 / s))
        return np.clip(steps, -z, self.top - z, out=steps)

    def _nonzero(self, s: np.ndarray) -> np.ndarray:
        rounded = rounded_scales(s, self.bits)
        # A step of 0 would make one code of all weights.
        return np.where(rounded == 0, np.float32(2.0**_LEAST_EXPONENT), rounded)
