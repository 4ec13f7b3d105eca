"""Encoders of the ggml types whose groups have a scale and no offset: Q4_0, Q5_0, Q8_0, Q3_K, Q6_K.

A group of 16 or 32 weights is `x ~ s q`, with codes `q` from a grid that reaches further below zero than above, so `s`
has the sign that puts the weight of largest magnitude on the longer side, or the other one. What is made small is the
sum of `w (x - s q)^2`, with `w` the importance of the column or 1. For given codes it is `s^2 qq - 2 s qx` and what no
choice changes, with `qq` the sum of `w q^2` and `qx` that of `w q x`; the best scale is `qx / qq`.

K types, where `s = d sc` with one float16 `d` for 256 weights: `d` is set so that the largest scale has room to grow,
and then only scales that can be stored are tried: `sc` steps through integers around the one that reaches the weight
of largest magnitude (and, at 3 bits, of the other sign). Then `d` by least squares over the block, for Q3_K in turn
with the neighbours of `sc`; at last the codes for both. ggml's encoders (`ggml-quants.c`, make_qx_quants,
make_q3_quants) try scales that are then rounded to integers, and without importance weigh errors by `x^2`.

Q4_0 and Q5_0 with importance: some scales around the one that reaches the largest weight, the best of them refined.
Without importance, and Q8_0 always, the rule of ggml's reference (`quantize_row_q4_0_ref` and its siblings) with the
same bytes: the weight of largest magnitude takes the lowest code, or 127.

The searches are written once for NumPy and mlx (`tiles`); the latter has not run on a Mac.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mlxq.errors import FormatError
from mlxq.formats.geometry import block_format
from mlxq.formats.kquants import pack
from mlxq.formats.superblocks import K_TYPES, SuperBlocks
from mlxq.quantizers.tiles import mlx_tiles, numpy_tiles

_LEAST_FLOAT16, _LARGEST_FLOAT16 = 2.0**-24, 65504.0
_TINY = 1e-30
#: Groups of 32 worked on at a time where nothing is searched: the weights of a tile.
_CHUNK = 1 << 11
#: The largest float32 below one half. Added to a magnitude that is then cut off, it rounds halves away from zero.
_BELOW_HALF = np.float32(0.49999997)


@dataclass(frozen=True)
class Uniform:
    """The grid of integers from `low` to `high`."""

    low: int
    high: int

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


_GRIDS = {
    "Q4_0": Uniform(-8, 7),
    "Q5_0": Uniform(-16, 15),
    "Q8_0": Uniform(-127, 127),
    "Q3_K": Uniform(-4, 3),
    "Q6_K": Uniform(-32, 31),
}
#: By type, and whether there is importance: with it ggml's own search is the closer one.
_SEARCHES = {
    ("Q3_K", False): BlockSearch(31, 1.2, (-4, -2, 0, 2, 4), rounds=1),
    ("Q3_K", True): BlockSearch(31, 1.3, (-8, -6, -4, -2, 0, 2, 4, 6, 8), (0.75, 0.9, 1.05), rounds=2),
    ("Q6_K", False): BlockSearch(127, 1.2, tuple(range(-1, 9))),
    ("Q6_K", True): BlockSearch(127, 1.2, (-7, -5, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 10), rounds=1),
}
#: Q4_0, Q5_0: what the weight of largest magnitude becomes, as part of the lowest code; below 0 of the other sign.
_FACTORS = (1.0, 1.07, 1.14, 0.94, 0.88, 0.83, -1.1, -1.02, -0.94, -0.86, -0.78)


def quantize(w: np.ndarray, name: str, importance: np.ndarray | None = None, backend: str = "numpy") -> np.ndarray:
    """Encode rows of weights.

    Args:
        w: float32 `[N, K]`, contiguous, `K` a multiple of the type's block.
        name: `Q4_0`, `Q5_0`, `Q8_0`, `Q3_K` or `Q6_K`.
        importance: float32 `[K]`, positive, its mean about 1; or None.
        backend: `numpy`, or `mlx` for its default device. What is not searched is always computed by NumPy.

    Returns:
        uint8 `[N, row_bytes]`.

    Raises:
        FormatError: a weight that is NaN, or too large for the type.
    """
    format = block_format(name)
    blocks = np.empty((w.size // format.block_size, format.type_size), np.uint8)
    grid, search = _GRIDS[name], _SEARCHES.get((name, importance is not None))
    check_range(w, name, grid, search.top if search else 1)
    if search:
        for part, d, scales, codes in encoded_blocks(w, importance, grid, search, K_TYPES[name].n_sub_blocks, backend):
            blocks[part] = pack(SuperBlocks(d, scales, codes), name)
    elif name == "Q8_0" or importance is None:
        for start in range(0, len(blocks), _CHUNK):
            _reference(w.reshape(-1, 32)[start : start + _CHUNK], name, blocks[start : start + _CHUNK])
    else:
        for part, d, codes in encoded_groups(w, importance, grid, _FACTORS, backend):
            _store(d, codes, name, blocks[part])
    return blocks.reshape(w.shape[0], w.shape[1] // format.block_size * format.type_size)


def check_range(w: np.ndarray, name: str, grid: Any, top: int) -> None:
    """Refuse weights that no float16 `d` reaches.

    Raises:
        FormatError: a weight beyond the largest float16 times `top` and the grid's longer side, or NaN.
    """
    limit = _LARGEST_FLOAT16 * top * -grid.low
    flat = w.reshape(-1)
    step = 32 * _CHUNK
    for start in range(0, flat.size, step):
        part = flat[start : start + step]
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
    for part, outputs in _searched(w, importance, 256 // n_groups, n_groups, backend, _search_blocks, grid, search):
        d, sc, values = outputs
        yield part, d.astype(np.float16), sc.T.astype(np.int8, order="C"), _in_order(grid.codes(values))


def encoded_groups(
    w: np.ndarray, importance: np.ndarray | None, grid: Any, factors: tuple[float, ...], backend: str
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Search groups of 32 that have a `d` each: their range, `d` float16 `[n]`, codes uint8 `[n, 32]`."""
    for part, outputs in _searched(w, importance, 32, 1, backend, _search_groups, grid, factors):
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
    qq: Any
    qx: Any


def _sums(tile: Any, values: Any) -> tuple[Any, Any]:
    """The sums `qq` of `w q^2` and `qx` of `w q x` over each group, `[n_groups, n]`."""
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


def _search_blocks(tile: Any, grid: Any, search: BlockSearch) -> tuple[Any, Any, Any]:
    """`d` `[n]`, `sc` `[n_groups, n]` and the grid's values `[group, n_groups, n]` of each super-block."""
    xp = tile.xp
    extreme = _extreme(tile)
    ideal = abs(extreme) * (1 / -grid.low)
    sign = xp.where(extreme > 0, -1.0, 1.0).astype(xp.float32)
    largest = ideal.max(axis=0)
    d = _to_float16(xp, largest * (search.room / search.top))

    def tried(sc: Any) -> _Choice:
        s = d * sc
        qq, qx = _sums(tile, grid.nearest(tile, 1 / s))
        return _Choice(sc, s * (s * qq - 2 * qx), qq, qx)

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
    return xp.where(largest > 0, d, 0.0), best.sc, values


def _least(xp: Any, choices: Iterator[_Choice]) -> _Choice:
    """Of each group the choice of least error, the first of equals."""
    best = next(choices)
    for choice in choices:
        better = choice.error < best.error
        best = _Choice(*(xp.where(better, new, old) for new, old in zip(choice, best, strict=True)))
    return best


def _fit(xp: Any, best: _Choice, d: Any) -> Any:
    """The `d` of least error for given codes and `sc`; as it was where all codes are zero."""
    qq = (best.sc * best.sc * best.qq).sum(axis=0)
    qx = (best.sc * best.qx).sum(axis=0)
    return _to_float16(xp, xp.where(qq > _TINY, qx / xp.maximum(qq, _TINY), d))


def _search_groups(tile: Any, grid: Any, factors: tuple[float, ...]) -> tuple[Any, Any]:
    """`d` `[1, n]` and the grid's values `[group, 1, n]` of each group."""
    xp = tile.xp
    extreme = _extreme(tile)
    inverse = xp.where(abs(extreme) > _TINY, grid.low / extreme, 0.0) if xp is not np else _quotient(grid.low, extreme)
    best = d = None
    for factor in factors:
        qq, qx = _sums(tile, grid.nearest(tile, inverse * factor))
        fitted = qx / xp.maximum(qq, _TINY)
        gain = fitted * qx
        if best is None:
            best, d = gain, fitted
        else:
            better = gain > best
            best, d = xp.where(better, gain, best), xp.where(better, fitted, d)
    for _ in range(2):
        d = _signed_float16(xp, d)
        qq, qx = _sums(tile, grid.nearest(tile, 1 / d))
        d = xp.where(qq > _TINY, qx / xp.maximum(qq, _TINY), d)
    d = _signed_float16(xp, d)
    return xp.where(abs(extreme) > 0, d, 0.0), grid.nearest(tile, 1 / d)


def _to_float16(xp: Any, d: Any) -> Any:
    """The nearest positive float16, as float32: never 0, since every scale is divided by."""
    return xp.clip(d, _LEAST_FLOAT16, _LARGEST_FLOAT16).astype(xp.float16).astype(xp.float32)


def _signed_float16(xp: Any, d: Any) -> Any:
    return xp.where(d < 0, -1.0, 1.0).astype(xp.float32) * _to_float16(xp, abs(d))


def _quotient(a: float, b: np.ndarray) -> np.ndarray:
    """`a / b` where b is not too small to be divided by, else 0."""
    return np.divide(np.float32(a), b, out=np.zeros_like(b), where=np.abs(b) > _TINY)


def _reference(x: np.ndarray, name: str, blocks: np.ndarray) -> None:
    """Encode groups `[n, 32]` by ggml's reference rule into blocks `[n, type_size]`."""
    x = np.ascontiguousarray(x.T)
    high, low = x.max(axis=0), x.min(axis=0)
    if name == "Q8_0":
        d = np.maximum(np.abs(high), np.abs(low)) / np.float32(127)
    else:
        d = np.where(high > -low, high, low)
        ties = np.flatnonzero((high == -low) & (high > 0))
        if ties.size:
            # Of two weights of one magnitude the first gives its sign.
            both = x[:, ties]
            d[ties] = np.take_along_axis(both, np.abs(both).argmax(axis=0)[None], axis=0)[0]
        d /= np.float32(_GRIDS[name].low)
    if not (np.abs(d) <= _LARGEST_FLOAT16).all():
        raise FormatError(
            f"{name}: a scale would be {d.flat[np.abs(d).argmax()]:g}, beyond the largest float16 (65504)"
        )
    inverse = np.zeros_like(d)
    np.divide(np.float32(1), d, out=inverse, where=d != 0)
    x *= inverse
    if name == "Q8_0":
        x += np.copysign(_BELOW_HALF, x)
        codes = x.astype(np.int8).view(np.uint8)
    else:
        x += np.float32(0.5 - _GRIDS[name].low)
        codes = np.minimum(x, np.float32(_GRIDS[name].high - _GRIDS[name].low), out=x).astype(np.uint8)
    _store_tile(d.astype(np.float16), codes, name, blocks)


def _store(d: np.ndarray, codes: np.ndarray, name: str, blocks: np.ndarray) -> None:
    """Write `d` `[n]` and codes `[n, 32]`."""
    _store_tile(d, codes.T, name, blocks)


def _store_tile(d: np.ndarray, codes: np.ndarray, name: str, blocks: np.ndarray) -> None:
    """Write `d` float16 `[n]` and codes uint8 `[32, n]` as blocks (the layout is drawn in `formats.ggml`)."""
    blocks[:, :2] = d.astype("<f2").view(np.uint8).reshape(-1, 2)
    if name == "Q8_0":
        blocks[:, 2:] = codes.T
        return
    qs = codes[16:] << 4
    qs |= codes[:16] & 0x0F
    blocks[:, -16:] = qs.T
    if name == "Q5_0":
        blocks[:, 2:6] = np.packbits(codes >> 4, axis=0, bitorder="little").T
