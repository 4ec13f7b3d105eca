"""From MLX's affine grid to one with integer zero points, `w = scales * (q - z)`, as GPTQ and AWQ store it.

`scales * q + biases` is that where `biases = -z * scales`. Scales become float16, `z` one of the codes:

    group                                        becomes
    biases = -z * scales                         the same codes, z; exact
    biases = -z * scales rounded to its dtype    the same: as it was before another tool rounded the biases
    biases nearly that (`mx.quantize`)           the same codes, z rounded, the scale that fits best then
    all codes equal                              one step of the size of the weight; exact where float16 holds that

What `mx.quantize` makes is nearly of this kind: its grid has 0 on it, up to the rounding of the scale. Version 1 of
GPTQ's layout has no zero point 0. A group that needs it is mirrored: codes `top - q`, zero point `top - z` and the
negative scale stand for the same weights.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mlxq.errors import FormatError
from mlxq.formats import affine
from mlxq.formats.floats import all_finite, from_float32, to_float32
from mlxq.types import QuantizedTensor

#: How far a zero point may be rounded, as a share of the steps of a group: an eighth of a step of 4 bits. `mx.quantize`
#: in bfloat16 stays below a quarter of that; grids without a zero on them do not.
_MOST_SHIFT = 1 / 120
#: A scale for groups that need none: their weights are 0.
_ANY_SCALE = np.float32(2.0**-14)


class IntegerGrid(NamedTuple):
    """`codes` uint8 `[N, K]`, `scales` float16 and `zero_points` uint8 `[N, n_groups]`; `exact`: no weight changed."""

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray
    exact: bool


def decoded(grid: IntegerGrid) -> np.ndarray:
    """`scales * (q - z)` in float32 `[N, K]`."""
    N, n_groups = grid.scales.shape
    q = grid.codes.reshape(N, n_groups, -1).astype(np.float32)
    q -= grid.zero_points[..., None]
    q *= grid.scales.astype(np.float32)[..., None]
    return q.reshape(N, -1)


def integer_grid(q: QuantizedTensor, least: int = 0) -> IntegerGrid:
    """The weights of an affine matrix `[N, K]` with integer zero points from `least` (0 or 1) on.

    Raises:
        FormatError: a zero point would have to be rounded far, or is beyond the codes; a scale is beyond float16 or
            not finite.
    """
    if len(q.shape) != 2 or q.spec.mode != "affine":
        raise FormatError(f"{q.spec} weights of {len(q.shape)} axes have no zero points: 2 axes of an affine grid do")
    if not (all_finite(q.scales) and all_finite(q.biases)):
        raise FormatError("a scale or bias is NaN or infinite")
    top = (1 << q.spec.bits) - 1
    own = affine.unpack(q.w_q, q.spec.bits, q.shape[-1]).reshape(*q.scales.shape, q.spec.group_size)
    s, b = (to_float32(a, q.dtype) for a in (q.scales, q.biases))
    z, fits = _zero_points(s, b, top)
    single = (own == own[..., :1]).all(axis=-1)
    if not (fits | single).all():
        raise FormatError(_misfit(s, b, ~(fits | single), top))
    as_rounded = to_float32(from_float32(-z * s, q.dtype), q.dtype) == b
    codes, scales = own, s.copy()
    between = fits & ~as_rounded & ~single
    scales[between] = _fitted(own[between], s[between], b[between], z[between])
    alone = single & ~(fits & as_rounded)
    if alone.any():
        # A step of the size of the weight, one above the zero point 1.
        codes = own.copy()
        value = s[alone] * own[alone][:, 0] + b[alone]
        scales[alone] = np.where(value == 0, _ANY_SCALE, value)
        z[alone], codes[alone] = 1, np.where(value == 0, 1, 2)[:, None]
    stored = from_float32(scales, "F16")
    if not all_finite(stored):
        raise FormatError(f"a scale of {np.abs(scales).max():g} is beyond float16")
    # A group without a step would mean nothing.
    stored = np.where(stored == 0, np.copysign(np.float16(2.0**-24), stored), stored)
    at = (b != -z * s) | (stored != s)
    was = s[at][:, None] * own[at] + b[at][:, None]
    now = stored[at].astype(np.float32)[:, None] * (codes[at] - z[at][:, None])
    grid = IntegerGrid(codes.reshape(q.shape), stored, z.astype(np.uint8), np.array_equal(was, now))
    return _mirrored(grid, top, least)


def _zero_points(s: np.ndarray, b: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Integer zero points, float32, and where they are near enough."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        z = -b / s
        nearest = np.rint(z)
        fits = (np.abs(z - nearest) <= top * _MOST_SHIFT) & (nearest >= 0) & (nearest <= top)
    # 0 for -0, too.
    return np.where(fits, nearest, 0) + np.float32(0), fits


def _misfit(s: np.ndarray, b: np.ndarray, where: np.ndarray, top: int) -> str:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        example = (-b[where] / s[where])[0]
    return (
        f"{where.sum()} of {where.size} groups have no integer zero point from 0 to {top} (one would be {example:.4g}),"
        " and rounding it would cost about as much as quantizing did; mlxq convert --recipe four-way makes codes that"
        " fit"
    )


def _fitted(codes: np.ndarray, s: np.ndarray, b: np.ndarray, z: np.ndarray) -> np.ndarray:
    """The scales `[n]` of least squares for codes `[n, group_size]` and these zero points."""
    steps = codes.astype(np.float64) - z[:, None]
    w = s[:, None] * codes.astype(np.float64) + b[:, None]
    size = (steps * steps).sum(axis=1)
    return np.where(size > 0, (steps * w).sum(axis=1) / np.where(size > 0, size, 1), s)


def _mirrored(grid: IntegerGrid, top: int, least: int) -> IntegerGrid:
    """Groups whose zero point is too low, from the other end."""
    low = grid.zero_points < least
    if not low.any():
        return grid
    codes = grid.codes.reshape(*low.shape, -1).copy()
    codes[low] = top - codes[low]
    zero_points = np.where(low, top - grid.zero_points, grid.zero_points).astype(np.uint8)
    scales = np.where(low, -grid.scales, grid.scales)
    return grid._replace(codes=codes.reshape(grid.codes.shape), scales=scales, zero_points=zero_points)
