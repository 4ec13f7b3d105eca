"""Searches for the scales and offsets of groups: what the encoders with both (`asymmetric`) share.

A group of 16 or 32 weights is `x ~ s q + o` with codes `q` in 0 ... top. In Q4_1 and Q5_1 `s` and `o` are float16; in
the K types `s = d sc` and `o = -dmin m` with small integers `sc`, `m` and one `d`, `dmin` for 256 weights, so offsets
are never above 0. What is made small is the sum of `w (x - s q - o)^2`, with `w` the importance of the column or 1.

1. Each group alone. The lowest weight (or 0) is put at `shift` and the highest at `shift + level` before all are
   rounded to codes, for some levels around `top` and one shift to either side; so either end may be clipped. The best
   `s`, `o` for these codes are a least-squares line, and its error is a closed form of three sums. The best line is
   refined: codes for it, the line for these codes.
2. Each block, its codes kept. Some values of `d` and `dmin` near the largest scale and offset divided by the largest
   integer are tried. For each, `sc` is rounded, then `m` to the best offset that goes with `d sc`; the error is again a
   closed form of the sums.
3. In turn: codes for the integers; `d` and `dmin` by least squares over the block; `sc` among its neighbours, with
   the `m` that goes with each; and codes for these.

Steps 2 and 3 cost little, since they work on groups, not on weights. ggml's own encoders (`ggml-quants.c`) try more
levels without shifts, and then round scales and offsets one by one. Every function is written once
for NumPy and mlx (`tiles`); the latter has not run on a Mac.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

_TINY = 1e-30
#: The smallest positive float16.
_LEAST_FLOAT16 = 2.0**-24
#: Steps of fewer bits are so few that least squares do not help.
COARSE = 4


@dataclass(frozen=True)
class LineSearch:
    """How far to look: all pairs of `levels` and `shifts`, the factors of `d` and `dmin`, the rounds of step 3.

    `step_bits` are the significant bits of what is stored as float16, at most the 11 that it has.
    """

    levels: tuple[float, ...]
    shifts: tuple[float, ...]
    refinements: int = 1
    factors: tuple[float, ...] = (0.91, 0.94, 0.96, 0.98, 0.99, 1.0, 1.01)
    rounds: int = 1
    step_bits: int = 11


class _Sums(NamedTuple):
    """What is known of the groups of a tile whatever the codes: arrays `[n_groups, n]`.

    The tile's weights are counted from `low`, so an offset `b` here is `low + b` of the weights; `limit` is the
    largest `b` that the type can store, or None. `total` and `x` are the sums of `w` and `w x`.
    """

    low: Any
    total: Any
    x: Any
    limit: Any | None


class Block(NamedTuple):
    """The integers and steps of K blocks as floats: `d`, `dmin` `[n]`, `sc`, `m` `[n_groups, n]`."""

    d: Any
    dmin: Any
    sc: Any
    m: Any


def _optimum(xp: Any, sums: _Sums, moments: Any) -> tuple[Any, Any]:
    """Scale and offset `b` of the least-squares line through the codes that `moments` `[..., 3, n_groups, n]` sum."""
    q, qq, qx = moments[..., 0, :, :], moments[..., 1, :, :], moments[..., 2, :, :]
    # Where all codes are equal the determinant is 0: then any line through the mean will do.
    total_qq = sums.total * qq
    s = (sums.total * qx - q * sums.x) / xp.maximum(total_qq - q * q, 1e-6 * total_qq + _TINY)
    return s, (sums.x - s * q) / sums.total


def _line(xp: Any, sums: _Sums, moments: Any) -> tuple[Any, Any]:
    """`_optimum` among the offsets that can be stored and scales that are not negative."""
    s, b = _optimum(xp, sums, moments)
    if sums.limit is not None:
        q, qq, qx = moments[..., 0, :, :], moments[..., 1, :, :], moments[..., 2, :, :]
        b = xp.minimum(b, sums.limit)
        s = (qx - b * q) / xp.maximum(qq, _TINY)
    return xp.maximum(s, 0), b


def _error(sums: _Sums, moments: Any, s: Any, b: Any) -> Any:
    """Weighted squared error of each group, less the sum of `w x^2`, which no choice changes."""
    q, qq, qx = moments[..., 0, :, :], moments[..., 1, :, :], moments[..., 2, :, :]
    return s * (s * qq + 2 * (b * q - qx)) + b * (b * sums.total - 2 * sums.x)


def _excess(sums: _Sums, moments: Any, ds: Any, db: Any) -> Any:
    """`_error` of lines `ds`, `db` from the optimum, less its own: for given codes, without cancellation."""
    return ds * (ds * moments[1] + 2 * db * moments[0]) + db * db * sums.total


def _best(xp: Any, error: Any, *arrays: Any) -> list[Any]:
    """Of each array `[n_choices, ..., n]` the choice of least error; `error` has the axes of the choice first."""
    # A comparison and a maximum of bytes: NumPy's argmin along the first axis takes ten times as long.
    order = xp.arange(len(error)).astype(xp.uint8).reshape(-1, *[1] * (error.ndim - 1))
    at = ((error == error.min(axis=0)).astype(xp.uint8) * order).max(axis=0)[None].astype(xp.int32)
    while at.ndim < arrays[0].ndim:
        at = at[:, None]
    return [xp.take_along_axis(a, xp.broadcast_to(at, (1, *a.shape[1:])), axis=0)[0] for a in arrays]


def _inverse(xp: Any, s: Any) -> Any:
    return xp.where(s > 0, 1 / xp.maximum(s, _TINY), 0)


def _float16(xp: Any, a: Any, bits: int) -> Any:
    """The nearest float16 numbers of `bits` significant bits, as float32."""
    a = a.astype(xp.float16).astype(xp.float32)
    if bits >= 11:
        return a
    # Veltkamp's splitting: the high part of a product that is rounded to 24 bits.
    high = a * (2.0 ** (24 - bits) + 1)
    return high - (high - a)


def _start(tile: Any, signed_offsets: bool) -> tuple[_Sums, Any]:
    """Count the weights of each group from its lowest (or 0): the sums, and the highest weight so counted."""
    xp = tile.xp
    low = tile.x.min(axis=0)
    if not signed_offsets:
        low = xp.minimum(low, 0)
    high = tile.x.max(axis=0) - low
    tile.shift(low)
    return _Sums(low, *tile.weight_sums(), None if signed_offsets else -low), high


def _fit_groups(tile: Any, sums: _Sums, high: Any, top: int, search: LineSearch) -> tuple[Any, Any, Any]:
    """Step 1: scale and offset `b` of each group, and the moments of the codes that they give."""
    xp = tile.xp
    inverse = _inverse(xp, high)
    tried = [(inverse * level, shift) for level in search.levels for shift in search.shifts]
    moments = xp.stack([tile.moments(tile.round(scale, shift, 0, top)) for scale, shift in tried])
    s, b = _line(xp, sums, moments)
    s, b = _best(xp, _error(sums, moments, s, b), s, b)
    for _ in range(search.refinements):
        moments = _moments(tile, s, b, top)
        s, b = _line(xp, sums, moments)
    return s, b, moments


def _codes(tile: Any, s: Any, b: Any, top: int) -> Any:
    inverse = _inverse(tile.xp, s)
    return tile.round(inverse, -b * inverse, 0, top)


def _moments(tile: Any, s: Any, b: Any, top: int) -> Any:
    return tile.moments(_codes(tile, s, b, top))


def _min_for(xp: Any, sums: _Sums, moments: Any, s: Any, dmin: Any, largest: int) -> Any:
    """The integer `m` that goes best with scales `s`."""
    m = -(sums.low + (sums.x - s * moments[0]) / sums.total)
    return xp.clip(xp.round(m * _inverse(xp, dmin)), 0, largest)


def _step(xp: Any, values: Any, search: LineSearch, largest: int) -> Any:
    """Float16 steps `[n_factors, 1, n]` near the one of which the largest of `values` `[n_groups, n]` is `largest`."""
    full = values.max(axis=0) / largest
    steps = _float16(xp, xp.stack([full * f for f in search.factors]), search.step_bits)
    return xp.where(full > 0, xp.maximum(steps, _LEAST_FLOAT16), 0)[:, None]


def _fit_blocks(xp: Any, sums: _Sums, fit: tuple[Any, Any, Any], largest: int, search: LineSearch) -> Block:
    """Step 2: steps and integers of each block for the codes of step 1."""
    s, b, moments = fit
    best_s, best_b = _optimum(xp, sums, moments)
    d = _step(xp, s, search, largest)
    sc = xp.minimum(xp.round(s * _inverse(xp, d)), largest)
    # Each d is judged with the offset that goes best with its scales, as yet unrounded.
    b = xp.minimum((sums.x - d * sc * moments[0]) / sums.total, sums.limit)
    d, sc, b = _best(xp, _excess(sums, moments, d * sc - best_s, b - best_b).sum(axis=1), d, sc, b)
    dmin = _step(xp, -(sums.low + b), search, largest)
    m = _min_for(xp, sums, moments, d * sc, dmin, largest)
    db = -sums.low - dmin * m - best_b
    dmin, m = _best(xp, _excess(sums, moments, d * sc - best_s, db).sum(axis=1), dmin, m)
    return Block(d[0], dmin[0], sc, m)


def _solve_steps(xp: Any, sums: _Sums, moments: Any, block: Block, bits: int) -> Block:
    """`d` and `dmin` by least squares over the block for given integers and codes: a step from the present ones."""
    q, qq, qx = moments
    sc, m = block.sc, block.m
    s, b = block.d * sc, -sums.low - block.dmin * m
    a = (sc * sc * qq).sum(axis=0)
    c = (m * m * sums.total).sum(axis=0)
    ac = -(sc * m * q).sum(axis=0)
    u = (sc * (qx - b * q - s * qq)).sum(axis=0)
    v = -(m * (sums.x - b * sums.total - s * q)).sum(axis=0)
    determinant = a * c - ac * ac
    regular = determinant > 1e-6 * a * c
    determinant = xp.where(regular, determinant, 1)
    d = block.d + xp.where(regular, (c * u - ac * v) / determinant, u / xp.maximum(a, _TINY))
    dmin = block.dmin + xp.where(regular, (a * v - ac * u) / determinant, 0)
    return block._replace(d=_float16(xp, xp.maximum(d, 0), bits), dmin=_float16(xp, xp.maximum(dmin, 0), bits))


def _solve_integers(xp: Any, sums: _Sums, moments: Any, block: Block, largest: int) -> Block:
    """`sc` among its neighbours, each with the `m` that goes with it, for given steps and codes."""
    sc = xp.clip(xp.stack([block.sc - 1, block.sc, block.sc + 1]), 0, largest)
    s = block.d * sc
    m = _min_for(xp, sums, moments, s, block.dmin, largest)
    best_s, best_b = _optimum(xp, sums, moments)
    sc, m = _best(xp, _excess(sums, moments, s - best_s, -sums.low - block.dmin * m - best_b), sc, m)
    return block._replace(sc=sc, m=m)


def search_blocks(tile: Any, top: int, largest: int, search: LineSearch) -> tuple[Block, Any]:
    """The parts of the tile's K blocks and their codes `[sub_block, n_groups, n]`, all as floats."""
    xp = tile.xp
    sums, high = _start(tile, signed_offsets=False)
    block = _fit_blocks(xp, sums, _fit_groups(tile, sums, high, top, search), largest, search)
    for _ in range(search.rounds):
        moments = _moments(tile, block.d * block.sc, -sums.low - block.dmin * block.m, top)
        if search.step_bits >= COARSE:
            block = _solve_steps(xp, sums, moments, block, search.step_bits)
        block = _solve_integers(xp, sums, moments, block, largest)
    return block, _codes(tile, block.d * block.sc, -sums.low - block.dmin * block.m, top)


def search_groups(tile: Any, top: int, search: LineSearch) -> tuple[Any, Any, Any]:
    """Scale and offset of the tile's Q4_1 or Q5_1 blocks as float16 numbers, and their codes, all as float32."""
    xp = tile.xp
    sums, high = _start(tile, signed_offsets=True)
    s, _, moments = _fit_groups(tile, sums, high, top, search)
    # The offset is rounded second: it makes up for what the scale lost.
    s = _float16(xp, s, search.step_bits)
    offset = _float16(xp, sums.low + (sums.x - s * moments[0]) / sums.total, search.step_bits)
    return s, offset, _codes(tile, s, offset - sums.low, top)
