"""The scale and bias of a group that lose least, by a search: importance-weighted, for codes of any width.

For a few ranges between the lowest and the highest weight, each shifted a little to either side, the weights are
rounded to codes; the best line through weights and codes is a weighted least-squares fit, and its error a closed form
of three sums. The best line is refined: codes for it, the line for these codes. Last, scale and bias are rounded to
the float type that stores them, the bias after the scale, so that it makes up for what that lost.

Arrays are laid out by column, `[group_size, N]`: what belongs to one group of one row is a column, and every step a
long loop over rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np

from mlxq.formats import floats
from mlxq.quantizers.ggml.asymmetric import SEARCHES
from mlxq.quantizers.ggml.line_search import LineSearch

#: By bits: ranges as multiples of a step, and shifts of the lowest weight.
_SEARCHES = {
    2: SEARCHES["Q2_K"],
    3: LineSearch((5.8, 6.3, 6.8, 7.3), (-0.25, 0.25)),
    4: SEARCHES["Q4_K"],
    5: SEARCHES["Q5_K"],
    6: LineSearch((60.0, 61.5, 63.0), (0.0,)),
    8: LineSearch((254.5,), (0.0,)),
}
_REFINEMENTS = 2
_TINY = 1e-30

#: Rounds float32 to a storage dtype and back.
Rounding = Callable[[np.ndarray], np.ndarray]


class Grids(NamedTuple):
    """Which scales and biases may be stored, and how they are chosen for a group.

    `search(x, importance)` as `search` below; `scales(s)` and `biases(b, s)` are the nearest that can be stored, biases
    beside scales that already can. A scale may come out as 0, which is none.
    """

    search: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
    scales: Callable[[np.ndarray], np.ndarray]
    biases: Callable[[np.ndarray, np.ndarray], np.ndarray]


def float_grids(bits: int, dtype: str) -> Grids:
    """Any scale and bias of a float type."""
    to = rounding(dtype)
    return Grids(lambda x, importance: search(x, importance, bits, dtype), to, lambda b, s: to(b))


@cache
def rounding(dtype: str) -> Rounding:
    """To `F32`, `F16` or `BF16` and back to float32."""
    return lambda a: floats.to_float32(floats.from_float32(np.ascontiguousarray(a, np.float32), dtype), dtype)


def search(x: np.ndarray, importance: np.ndarray, bits: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Scales and biases of one group of columns.

    Args:
        x: float32 `[group_size, N]`, finite.
        importance: float32 `[group_size]`, positive: weights of the squared errors.
        bits: 2, 3, 4, 5, 6 or 8.
        dtype: `F32`, `F16` or `BF16`, what stores them.

    Returns:
        scales (never 0), biases: float32 `[N]`, numbers of `dtype`.
    """
    group = _Group(x, importance, (1 << bits) - 1)
    (first, *others) = product(_SEARCHES[bits].levels, _SEARCHES[bits].shifts)
    best = group.fit(*first)
    for level, shift in others:
        tried = group.fit(level, shift)
        better = tried[0] < best[0]
        best = [np.where(better, a, b) for a, b in zip(tried, best, strict=True)]
    s, b = best[1:]
    for _ in range(_REFINEMENTS):
        moments = group.moments(group.codes(s, b))
        s, b = group.line(moments)
    to = rounding(dtype)
    scales = to(s)
    # A step of 0 would make one code of all weights, and no step out of it.
    scales = np.where(scales == 0, to(np.float32(2.0**-14)), scales)
    return scales, to(group.low + (group.sum_x - scales * moments[0]) / group.total)


class _Group:
    """The weights of one group, counted from the lowest of each row, and their weighted sums."""

    def __init__(self, x: np.ndarray, importance: np.ndarray, top: int):
        self.top = np.float32(top)
        self.low = x.min(axis=0)
        self.x = x - self.low
        w = (importance / importance.mean()).astype(np.float32)
        self.w = w
        self.wx = w[:, None] * self.x
        self.total = w.sum()
        self.sum_x = w @ self.x
        high = self.x.max(axis=0)
        self.inverse = np.where(high > 0, 1 / np.maximum(high, _TINY), 0).astype(np.float32)
        self._q = np.empty_like(self.x)

    def fit(self, level: float, shift: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Error, scale and offset of the line for the codes of one range."""
        moments = self.moments(self._round(self.inverse * np.float32(level), np.float32(shift)))
        s, b = self.line(moments)
        return self._error(moments, s, b), s, b

    def codes(self, s: np.ndarray, b: np.ndarray) -> np.ndarray:
        inverse = np.where(s != 0, 1 / np.where(s != 0, s, 1), 0)
        return self._round(inverse, -b * inverse)

    def moments(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The sums of `w q`, `w q^2` and `w q x`."""
        return self.w @ q, self.w @ (q * q), np.einsum("gn,gn->n", self.wx, q)

    def line(self, moments: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
        q, qq, qx = moments
        total_qq = self.total * qq
        # Where all codes are equal the determinant is 0: then any line through the mean will do.
        s = (self.total * qx - q * self.sum_x) / np.maximum(total_qq - q * q, 1e-6 * total_qq + _TINY)
        return s, (self.sum_x - s * q) / self.total

    def _error(self, moments: tuple[np.ndarray, ...], s: np.ndarray, b: np.ndarray) -> np.ndarray:
        q, qq, qx = moments
        return s * (s * qq + 2 * (b * q - qx)) + b * (b * self.total - 2 * self.sum_x)

    def _round(self, inverse: np.ndarray, offset: np.ndarray | np.float32) -> np.ndarray:
        q = self._q
        np.multiply(self.x, inverse, out=q)
        q += offset
        np.rint(q, out=q)
        np.clip(q, 0, self.top, out=q)
        return q
