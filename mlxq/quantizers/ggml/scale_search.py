"""Searches for the scales of groups on a grid of values: what the encoders with one scale and no offset share.

A group of 16 or 32 weights is `x ~ s v`, with values `v` from a grid that reaches further below zero than above, so `s`
has the sign that puts the weight of largest magnitude on the longer side, or the other one. What is made small is the
sum of `w (x - s v)^2`, with `w` the importance of the column or 1. For given values it is `s^2 vv - 2 s vx` and what no
choice changes, with `vv` the sum of `w v^2` and `vx` that of `w v x`; the best scale is `vx / vv`.

Super-blocks, where `s = d sc` with one float16 `d` for 256 weights: `d` is set so that the largest scale has room to
grow, and then only scales that can be stored are tried: `sc` steps through integers around the one that reaches the
weight of largest magnitude, and around the one of the other sign. Then `d` by least squares over the block, in turn
with the neighbours of `sc`; at last the codes for both. ggml's encoders (`ggml-quants.c`, make_qx_quants,
make_q3_quants) try scales that are then rounded to integers, and without importance weigh errors by `x^2`. Blocks that
lie on a grid already keep their weights (`on_grid`).

Groups with a `d` of their own: some scales around the one that reaches the largest weight, the best of them refined.

Everything is written once for NumPy and mlx (`tiles`); the latter has not run on a Mac.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mlxq.errors import FormatError
from mlxq.quantizers.ggml import on_grid
from mlxq.quantizers.ggml.tiles import mlx_tiles, numpy_tiles

_LEAST_FLOAT16, _LARGEST_FLOAT16 = 2.0**-24, 65504.0
_TINY = 1e-30
#: Weights up to here are closer to 0 than to the smallest scale that there is: then `d` is 0.
_ALL_ZERO = _LEAST_FLOAT16 / 2
#: Weights checked at a time.
_CHECKED = 1 << 16


@dataclass(frozen=True)
class Uniform:
    """The grid of integers from `low` to `high`."""

    low: int
    high: int
    #: Whether codes with a common factor can be divided by it.
    divisible = True

    @property
    def extremes(self) -> range:
        """The values that the weight of largest magnitude may have, with the sign of `low`."""
        return range(self.low, 0)

    def values_of(self, scaled: np.ndarray) -> np.ndarray:
        """The grid's values nearest to scaled weights of any shape."""
        return np.clip(np.rint(scaled), self.low, self.high)

    def nearest(self, tile: Any, inverse: Any) -> Any:
        """The grid's value nearest to each weight times `inverse` `[n_groups, n]`, good until the next call."""
        return tile.round(inverse, None, self.low, self.high)

    def codes(self, values: np.ndarray) -> np.ndarray:
        """Values of the grid as codes counted from 0, uint8."""
        return (values - np.float32(self.low)).astype(np.uint8)


@dataclass(frozen=True)
class BlockSearch:
    """How far to look for the integers `sc`, at most `top`, of a super-block's groups.

    `room`: how much larger than the ideal one the largest scale can be. `steps`: added to the magnitude that is ideal.
    `opposite`: factors of it, with the other sign. `rounds`: how often `d` is fitted and the neighbours tried.
    """

    top: int
    room: float
    steps: tuple[int, ...]
    opposite: tuple[float, ...] = ()
    rounds: int = 0


def check_range(w: np.ndarray, name: str, grid: Any, top: int) -> None:
    """Refuse weights that no float16 `d` reaches.

    Raises:
        FormatError: a weight beyond the largest float16 times `top` and the grid's longer side, or NaN.
    """
    limit = _LARGEST_FLOAT16 * top * -grid.low
    flat = w.reshape(-1)
    for start in range(0, flat.size, _CHECKED):
        part = flat[start : start + _CHECKED]
        high, low = part.max(), part.min()
        # NaN fails every comparison.
        if not (high <= limit and low >= -limit):
            largest = high if not abs(low) > abs(high) else low
            raise FormatError(
                f"{name}: a weight is {largest:g}, but with a float16 scale the type reaches {limit:g}; "
                "keep the tensor float"
            )


def encoded_blocks(
    w: np.ndarray, importance: np.ndarray | None, grid: Any, search: BlockSearch, n_groups: int, backend: str
) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
    """Search super-blocks of 256: their range, `d` float16 `[n]`, `sc` int8 `[n, n_groups]`, codes uint8 `[n, 256]`."""
    for part, outputs in _searched(w, importance, 256 // n_groups, n_groups, backend, search_blocks, grid, search):
        d, sc, values = outputs
        d, sc, codes = d.astype(np.float16), sc.T.astype(np.int8, order="C"), _in_order(grid.codes(values))
        at, *exact = on_grid.encode(w.reshape(-1, 256)[part], grid, n_groups, search.top)
        d[at], sc[at], codes[at] = exact[0], exact[1], grid.codes(exact[2])
        yield part, d, sc, codes


def encoded_groups(
    w: np.ndarray, importance: np.ndarray | None, grid: Any, factors: tuple[float, ...], backend: str
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Search groups of 32 that have a `d` each: their range, `d` float16 `[n]`, codes uint8 `[n, 32]`."""
    for part, outputs in _searched(w, importance, 32, 1, backend, search_groups, grid, factors):
        d, values = outputs
        yield part, d[0].astype(np.float16), _in_order(grid.codes(values))


def _searched(
    w: np.ndarray, importance: np.ndarray | None, group: int, n_groups: int, backend: str, search: Any, *args: Any
) -> Iterator[tuple[slice, list[np.ndarray]]]:
    """What `search(tile, *args)` finds for each tile, as NumPy arrays."""
    tiles = mlx_tiles if backend == "mlx" else numpy_tiles
    for part, tile in tiles(w, group, n_groups, importance):
        with np.errstate(under="ignore"):
            outputs = search(tile, *args)
        yield part, [np.asarray(a) for a in outputs]


def _in_order(codes: np.ndarray) -> np.ndarray:
    """Codes of a tile `[group, n_groups, n]` in the order of the weights, `[n, n_groups * group]`."""
    return np.ascontiguousarray(codes.transpose(2, 1, 0)).reshape(codes.shape[2], -1)


class _Choice(NamedTuple):
    """Integers `sc` for each group, the error that goes with them, and the sums of its codes: `[n_groups, n]`."""

    sc: Any
    error: Any
    vv: Any
    vx: Any


def _sums(tile: Any, values: Any) -> tuple[Any, Any]:
    """The sums `vv` of `w v^2` and `vx` of `w v x` over each group, `[n_groups, n]`."""
    x, w = tile.x, tile.w
    if tile.xp is not np:
        wq = values if w is None else w * values
        return (wq * values).sum(axis=0), (wq * x).sum(axis=0)
    flat = (len(x), -1)
    operands = () if w is None else (w.reshape(flat),)
    q, x = values.reshape(flat), x.reshape(flat)
    products = ",".join(["ij"] * (len(operands) + 2)) + "->j"
    return tuple(np.einsum(products, *operands, q, other).reshape(tile.x.shape[1:]) for other in (q, x))


def _extreme(tile: Any) -> Any:
    """The weight of largest magnitude of each group, with its sign."""
    high, low = tile.x.max(axis=0), tile.x.min(axis=0)
    return tile.xp.where(high > -low, high, low)


def search_blocks(tile: Any, grid: Any, search: BlockSearch) -> tuple[Any, Any, Any]:
    """`d` `[n]`, `sc` `[n_groups, n]` and the grid's values `[group, n_groups, n]` of each super-block."""
    xp = tile.xp
    extreme = _extreme(tile)
    ideal = abs(extreme) * (1 / -grid.low)
    sign = xp.where(extreme > 0, -1.0, 1.0).astype(xp.float32)
    largest = ideal.max(axis=0)
    d = _to_float16(xp, largest * (search.room / search.top))

    def tried(sc: Any) -> _Choice:
        s = d * sc
        vv, vx = _sums(tile, grid.nearest(tile, 1 / s))
        return _Choice(sc, s * (s * vv - 2 * vx), vv, vx)

    base = xp.clip(xp.round(ideal / d), 1, search.top)
    candidates = [xp.clip(base + step, 1, search.top) * sign for step in search.steps]
    candidates += [xp.clip(xp.round(base * factor), 1, search.top) * -sign for factor in search.opposite]
    best = _least(xp, map(tried, candidates))
    for _ in range(search.rounds):
        d = _fit(xp, best, d)
        sign = xp.where(best.sc < 0, -1.0, 1.0).astype(xp.float32)
        best = _least(xp, (tried(sign * xp.clip(sign * best.sc + k, 1, search.top)) for k in (0, -1, 1)))
    d = _fit(xp, best, d)
    values = grid.nearest(tile, 1 / (d * best.sc))
    return xp.where(abs(extreme).max(axis=0) > _ALL_ZERO, d, 0.0), best.sc, values


def _least(xp: Any, choices: Iterator[_Choice]) -> _Choice:
    """Of each group the choice of least error, the first of equals."""
    best = next(choices)
    for choice in choices:
        better = choice.error < best.error
        best = _Choice(*(xp.where(better, new, old) for new, old in zip(choice, best, strict=True)))
    return best


def _fit(xp: Any, best: _Choice, d: Any) -> Any:
    """The `d` of least error for given codes and `sc`; as it was where all codes are zero."""
    vv = (best.sc * best.sc * best.vv).sum(axis=0)
    vx = (best.sc * best.vx).sum(axis=0)
    return _to_float16(xp, xp.where(vv > _TINY, vx / xp.maximum(vv, _TINY), d))


def search_groups(tile: Any, grid: Any, factors: tuple[float, ...]) -> tuple[Any, Any]:
    """`d` `[1, n]` and the grid's values `[group, 1, n]` of each group."""
    xp = tile.xp
    extreme = _extreme(tile)
    tiny = abs(extreme) <= _TINY
    inverse = xp.where(tiny, 0.0, grid.low / xp.where(tiny, 1.0, extreme))
    best = d = None
    for factor in factors:
        vv, vx = _sums(tile, grid.nearest(tile, inverse * factor))
        fitted = vx / xp.maximum(vv, _TINY)
        gain = fitted * vx
        if best is None:
            best, d = gain, fitted
        else:
            better = gain > best
            best, d = xp.where(better, gain, best), xp.where(better, fitted, d)
    for _ in range(2):
        d = _signed_float16(xp, d)
        vv, vx = _sums(tile, grid.nearest(tile, 1 / d))
        d = xp.where(vv > _TINY, vx / xp.maximum(vv, _TINY), d)
    d = _signed_float16(xp, d)
    return xp.where(abs(extreme) > _ALL_ZERO, d, 0.0), grid.nearest(tile, 1 / d)


def _to_float16(xp: Any, d: Any) -> Any:
    """The nearest positive float16, as float32: never 0, since every scale is divided by."""
    return xp.clip(d, _LEAST_FLOAT16, _LARGEST_FLOAT16).astype(xp.float16).astype(xp.float32)


def _signed_float16(xp: Any, d: Any) -> Any:
    return xp.where(d < 0, -1.0, 1.0).astype(xp.float32) * _to_float16(xp, abs(d))
