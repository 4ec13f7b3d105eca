"""Encoders of the ggml types whose groups have a scale and an offset: Q4_1, Q5_1, Q2_K, Q4_K, Q5_K.

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

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from mlxq.errors import FormatError
from mlxq.formats.geometry import block_format
from mlxq.formats.kquants import pack
from mlxq.formats.superblocks import K_TYPES, SuperBlocks
from mlxq.quantizers.ggml.tiles import mlx_tiles, numpy_tiles

_TINY = 1e-30
#: The smallest positive float16.
_LEAST_FLOAT16 = 2.0**-24
#: Steps of fewer bits lie so far apart that the next one may be a third larger, and least squares do not help.
_COARSE = 4
_COARSE_FACTORS = (0.75, 0.9, 1.0, 1.15, 1.33)


@dataclass(frozen=True)
class _Search:
    """How far to look: all pairs of `levels` and `shifts`, the factors of `d` and `dmin`, the rounds of step 3.

    `step_bits` are the significant bits of what is stored as float16, at most the 11 that it has.
    """

    levels: tuple[float, ...]
    shifts: tuple[float, ...]
    refinements: int = 1
    factors: tuple[float, ...] = (0.91, 0.94, 0.96, 0.98, 0.99, 1.0, 1.01)
    rounds: int = 1
    step_bits: int = 11


# The best of some dozens by error at equal time, with and without importance, of normal, long-tailed, trained weights.
_SEARCH_2 = _Search(levels=(2.5, 2.9, 3.3, 3.7), shifts=(-0.25, 0.25))
_SEARCH_4 = _Search(levels=(13.4, 14.0, 14.6, 15.2, 15.8), shifts=(-0.25, 0.25))
_SEARCH_5 = _Search(levels=(28.0, 28.95, 29.9, 30.85, 31.8), shifts=(-0.2, 0.2))
_SEARCHES = {"Q4_1": _SEARCH_4, "Q5_1": _SEARCH_5, "Q2_K": _SEARCH_2, "Q4_K": _SEARCH_4, "Q5_K": _SEARCH_5}


class _Sums(NamedTuple):
    """What is known of the groups of a tile whatever the codes: arrays `[n_groups, n]`.

    The tile's weights are counted from `low`, so an offset `b` here is `low + b` of the weights; `limit` is the
    largest `b` that the type can store, or None. `total` and `x` are the sums of `w` and `w x`.
    """

    low: Any
    total: Any
    x: Any
    limit: Any | None


class _Block(NamedTuple):
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


def _fit_groups(tile: Any, sums: _Sums, high: Any, top: int, search: _Search) -> tuple[Any, Any, Any]:
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


def _step(xp: Any, values: Any, search: _Search, largest: int) -> Any:
    """Float16 steps `[n_factors, 1, n]` near the one of which the largest of `values` `[n_groups, n]` is `largest`."""
    full = values.max(axis=0) / largest
    steps = _float16(xp, xp.stack([full * f for f in search.factors]), search.step_bits)
    return xp.where(full > 0, xp.maximum(steps, _LEAST_FLOAT16), 0)[:, None]


def _fit_blocks(xp: Any, sums: _Sums, fit: tuple[Any, Any, Any], largest: int, search: _Search) -> _Block:
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
    return _Block(d[0], dmin[0], sc, m)


def _solve_steps(xp: Any, sums: _Sums, moments: Any, block: _Block, bits: int) -> _Block:
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


def _solve_integers(xp: Any, sums: _Sums, moments: Any, block: _Block, largest: int) -> _Block:
    """`sc` among its neighbours, each with the `m` that goes with it, for given steps and codes."""
    sc = xp.clip(xp.stack([block.sc - 1, block.sc, block.sc + 1]), 0, largest)
    s = block.d * sc
    m = _min_for(xp, sums, moments, s, block.dmin, largest)
    best_s, best_b = _optimum(xp, sums, moments)
    sc, m = _best(xp, _excess(sums, moments, s - best_s, -sums.low - block.dmin * m - best_b), sc, m)
    return block._replace(sc=sc, m=m)


def _search_blocks(tile: Any, top: int, largest: int, search: _Search) -> tuple[_Block, Any]:
    """The parts of the tile's K blocks and their codes `[sub_block, n_groups, n]`, all as floats."""
    xp = tile.xp
    sums, high = _start(tile, signed_offsets=False)
    block = _fit_blocks(xp, sums, _fit_groups(tile, sums, high, top, search), largest, search)
    for _ in range(search.rounds):
        moments = _moments(tile, block.d * block.sc, -sums.low - block.dmin * block.m, top)
        if search.step_bits >= _COARSE:
            block = _solve_steps(xp, sums, moments, block, search.step_bits)
        block = _solve_integers(xp, sums, moments, block, largest)
    return block, _codes(tile, block.d * block.sc, -sums.low - block.dmin * block.m, top)


def _search_groups(tile: Any, top: int, search: _Search) -> tuple[Any, Any, Any]:
    """Scale and offset of the tile's Q4_1 or Q5_1 blocks as float16 numbers, and their codes, all as float32."""
    xp = tile.xp
    sums, high = _start(tile, signed_offsets=True)
    s, _, moments = _fit_groups(tile, sums, high, top, search)
    # The offset is rounded second: it makes up for what the scale lost.
    s = _float16(xp, s, search.step_bits)
    offset = _float16(xp, sums.low + (sums.x - s * moments[0]) / sums.total, search.step_bits)
    return s, offset, _codes(tile, s, offset - sums.low, top)


def quantize(
    w: np.ndarray, name: str, importance: np.ndarray | None = None, backend: str = "numpy", *, step_bits: int = 11
) -> np.ndarray:
    """Encode rows of weights.

    Args:
        w: float32 `[n, K]`, contiguous, finite, `K` a multiple of the type's block.
        name: `Q4_1`, `Q5_1`, `Q2_K`, `Q4_K` or `Q5_K`.
        importance: float32 `[K]`, positive, or None.
        backend: `numpy` or `mlx` (its default device).
        step_bits: significant bits of `d` and `dmin`, or of scale and offset; fewer than float16's 11 leave room for
            products with small integers that are exact in a short float type.

    Returns:
        uint8 `[n, K // block_size * type_size]`.

    Raises:
        FormatError: another type, or weights so large that a step is beyond float16.
    """
    if name not in _SEARCHES:
        raise FormatError(f"{name!r} has no encoder here: the types that have one are {', '.join(_SEARCHES)}")
    encode = _encode_k if name in K_TYPES else _encode_1
    search = replace(_SEARCHES[name], step_bits=step_bits)
    if step_bits < _COARSE:
        search = replace(search, factors=_COARSE_FACTORS)
    blocks = encode(w, name, importance, mlx_tiles if backend == "mlx" else numpy_tiles, search)
    return blocks.reshape(w.shape[0], w.shape[1] // block_format(name).block_size * blocks.shape[1])


def _encode_k(w: np.ndarray, name: str, importance: np.ndarray | None, tiles: Any, search: _Search) -> np.ndarray:
    geometry = K_TYPES[name]
    format = block_format(name)
    blocks = np.empty((w.size // format.block_size, format.type_size), np.uint8)
    for part, tile in tiles(w, geometry.sub_block, geometry.n_sub_blocks, importance):
        with np.errstate(over="ignore", invalid="ignore"):
            block, q = _search_blocks(tile, 2**geometry.bits - 1, 2**geometry.scale_bits - 1, search)
            parts = _parts(tile.xp, block, q)
        _check_finite(name, w, parts.d, parts.dmin)
        blocks[part] = pack(parts, name)
    return blocks


def _parts(xp: Any, block: _Block, q: Any) -> SuperBlocks:
    codes = np.asarray(q.astype(xp.uint8))
    n = codes.shape[-1]
    return SuperBlocks(
        np.asarray(block.d.astype(xp.float16)),
        np.ascontiguousarray(np.asarray(block.sc.astype(xp.uint8)).T),
        np.ascontiguousarray(codes.transpose(2, 1, 0)).reshape(n, -1),
        np.asarray(block.dmin.astype(xp.float16)),
        np.ascontiguousarray(np.asarray(block.m.astype(xp.uint8)).T),
    )


def _encode_1(w: np.ndarray, name: str, importance: np.ndarray | None, tiles: Any, search: _Search) -> np.ndarray:
    format = block_format(name)
    blocks = np.empty((w.size // format.block_size, format.type_size), np.uint8)
    top = 31 if name == "Q5_1" else 15
    for part, tile in tiles(w, format.block_size, 1, importance):
        with np.errstate(over="ignore", invalid="ignore"):
            s, offset, q = _search_groups(tile, top, search)
            codes = np.asarray(q.astype(tile.xp.uint8))[:, 0]
            s, offset = (np.asarray(a[0]).astype("<f2") for a in (s, offset))
        _check_finite(name, w, s, offset)
        out = blocks[part]
        for at, values in ((0, s), (2, offset)):
            out[:, at : at + 2] = values.view(np.uint8).reshape(-1, 2)
        out[:, -16:] = (codes[:16] & 15 | codes[16:] << 4).T
        if name == "Q5_1":
            out[:, 4:8] = np.packbits(codes >> 4, axis=0, bitorder="little").T
    return blocks


def _check_finite(name: str, w: np.ndarray, *steps: np.ndarray) -> None:
    if not all(np.isfinite(a).all() for a in steps):
        raise FormatError(
            f"{name}: its float16 steps cannot hold weights as large as {np.abs(w).max():g}; choose F32 or BF16"
        )
