"""Super-blocks whose weights already lie on a type's grid: found, and encoded without any error.

A search for the least error does not find such a grid: its scales are all `d sc` of one `d`, and another `d` gives
none of them exactly. Here the scale of each group follows from what its weights have in common: the weight of largest
magnitude is one of the grid's values, and only some of these make all others values too. Then `d` is the largest scale
divided by an integer, one for which `d` is a float16 and every scale an integer. What decodes to the very same
float32 numbers is taken, and nothing else: weights that were rounded on the way (to bfloat16, say) are searched.
"""

from __future__ import annotations

from typing import Any

import numpy as np

#: Weights of a block that are looked at first; few blocks that are not on a grid pass.
_PROBED = 4
#: How far, in steps, float32 arithmetic may put a weight from its code.
_TOLERANCE = 1e-3
#: Scales may be multiples of `d` beyond the largest integer, where codes have a common factor.
_LARGEST_FACTOR = 4


def encode(x: np.ndarray, grid: Any, n_groups: int, top: int) -> tuple[np.ndarray, ...]:
    """Find the blocks that lie on the grid.

    Args:
        x: float32 `[n, 256]`.
        grid: a `scale_search.Uniform` or one like it.
        n_groups: groups of a block.
        top: integers `sc` lie between `-top - 1` and `top`.

    Returns:
        indices `[m]` of the blocks found (none of zeros alone), `d` float16 `[m]`, `sc` float32 `[m, n_groups]`, and
        values of the grid float32 `[m, 256]`; `d * sc * values` is `x`, but for the sign of zeros.
    """
    at = np.flatnonzero(_probe(x[:, : 256 // n_groups], grid))
    at = at[x[at].any(axis=1)]
    if not at.size:
        return at, np.empty(0, np.float16), np.empty((0, n_groups), np.float32), np.empty((0, 256), np.float32)
    groups = x[at].reshape(len(at), n_groups, 256 // n_groups)
    s, multiples = _scales(groups, grid)
    d = _common_step(s, top)
    known = ~np.isnan(d)
    at, groups, s, multiples, d = at[known], groups[known], s[known], multiples[known], d[known]
    sc = _within(np.rint(_parts(s, d[:, None])), multiples, top)
    sc, values, exact = _verified(groups, d, sc, grid, top)
    turned, turned_values, turned_exact = _verified(groups, -d, -sc, grid, top)
    # The integers reach one further below zero than above: the other way round may fit where this does not.
    turn = turned_exact & ~exact
    d[turn], sc[turn], values[turn] = -d[turn], turned[turn], turned_values[turn]
    exact |= turned_exact
    return at[exact], d[exact].astype(np.float16), sc[exact], values[exact].reshape(-1, 256)


def _verified(
    groups: np.ndarray, d: np.ndarray, sc: np.ndarray, grid: Any, top: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers with the sign that can be stored, the grid's values, and which blocks they give exactly."""
    sc = np.where(sc > top, -sc, sc)
    steps = (d[:, None] * sc)[:, :, None]
    values = grid.values_of(_parts(groups, steps))
    return sc, values, (steps * values == groups).all(axis=(1, 2)) & (sc >= -top - 1).all(axis=1)


def _parts(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`a / b`, and 0 where b is."""
    shape = np.broadcast_shapes(a.shape, b.shape)
    return np.divide(a, b, out=np.zeros(shape, np.float32), where=np.broadcast_to(b != 0, shape))


def _probe(x: np.ndarray, grid: Any) -> np.ndarray:
    """Whether the first weights of groups `[n, group]` can lie on the grid; so does a group of zeros."""
    x = np.ascontiguousarray(x.T)
    extreme = _extreme(x, 0)
    probed = _parts(x[:_PROBED], extreme)
    possible = extreme == 0
    for value in _extremes(grid):
        scaled = probed * np.float32(value)
        scaled -= grid.values_of(scaled)
        possible |= np.abs(scaled).max(axis=0) < _TOLERANCE
    return possible


def _extreme(groups: np.ndarray, axis: int) -> np.ndarray:
    high, low = groups.max(axis=axis), groups.min(axis=axis)
    return np.where(high > -low, high, low)


def _extremes(grid: Any) -> list[int]:
    """What the weight of largest magnitude may be, those of ggml's encoders first.

    On a grid of integers the values up to half the lowest are left out: twice the codes are on the grid as well.
    """
    extremes = sorted(grid.extremes, key=abs, reverse=True)
    return [v for v in extremes if not grid.divisible or 2 * v <= grid.low]


def _scales(groups: np.ndarray, grid: Any) -> tuple[np.ndarray, np.ndarray]:
    """The largest scale of each group, `[n, n_groups]`, NaN where there is none, and by how much it can be divided."""
    lead = groups.shape[:2]
    groups = groups.reshape(-1, groups.shape[2])
    extreme = _extreme(groups, 1)
    s = np.where(extreme == 0, np.float32(0), np.float32(np.nan))
    multiples = np.ones_like(s)
    left = np.flatnonzero(extreme)
    parts = groups[left] / extreme[left, None]
    for value in _extremes(grid):
        if not left.size:
            break
        scaled = parts * np.float32(value)
        values = grid.values_of(scaled)
        fits = (np.abs(scaled - values) < _TOLERANCE).all(axis=1)
        at = left[fits]
        common = np.gcd.reduce(values[fits].astype(np.int16), axis=1) if grid.divisible else 1
        s[at] = extreme[at] / np.float32(value) * common
        multiples[at] = grid.low * common // value if grid.divisible else 1
        left, parts = left[~fits], parts[~fits]
    return s.reshape(lead), multiples.reshape(lead)


def _common_step(s: np.ndarray, top: int) -> np.ndarray:
    """`d` of each block: the largest float16 of which all scales are multiples, float32 `[n]`; NaN where none is."""
    d = np.where((s == 0).all(axis=1), np.float32(0), np.float32(np.nan))
    largest = np.abs(s).max(axis=1)
    left = np.flatnonzero(largest > 0)
    for divisor in range(1, (top + 1) * _LARGEST_FACTOR + 1):
        if not left.size:
            break
        step = largest[left] / np.float32(divisor)
        with np.errstate(over="ignore", under="ignore"):
            half = step.astype(np.float16).astype(np.float32)
        tried = np.flatnonzero((np.abs(half - step) <= 1e-6 * step) & (half > 0))
        parts = s[left[tried]] / half[tried, None]
        found = tried[(np.abs(parts - np.rint(parts)) < _TOLERANCE).all(axis=1)]
        d[left[found]] = half[found]
        left = np.delete(left, found)
    return d


def _within(sc: np.ndarray, multiples: np.ndarray, top: int) -> np.ndarray:
    """Integers beyond `top` divided by the smallest number that brings them within, where the codes allow it."""
    for factor in range(2, 2 * _LARGEST_FACTOR + 1):
        beyond = (
            (np.abs(sc) > top + 1) & (sc % factor == 0) & (np.abs(sc) <= (top + 1) * factor) & (multiples >= factor)
        )
        sc = np.where(beyond, sc / factor, sc)
    return sc
