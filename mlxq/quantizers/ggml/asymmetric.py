"""Encoders of the ggml types whose groups have a scale and an offset: Q4_1, Q5_1, Q2_K, Q4_K, Q5_K.

How both are searched is in `line_search`; here it is told how far to look, and what is found becomes blocks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from mlxq.errors import BackendError, FormatError
from mlxq.formats.geometry import block_format
from mlxq.formats.kquants import LAYOUTS, pack
from mlxq.formats.superblocks import K_TYPES, SuperBlocks
from mlxq.quantizers.ggml.line_search import COARSE, Block, LineSearch, search_blocks, search_groups
from mlxq.quantizers.ggml.tiles import metal_parts, mlx_tiles, numpy_tiles

# The best of some dozens by error at equal time, with and without importance, of normal, long-tailed, trained weights.
_SEARCH_2 = LineSearch(levels=(2.5, 2.9, 3.3, 3.7), shifts=(-0.25, 0.25))
_SEARCH_4 = LineSearch(levels=(13.4, 14.0, 14.6, 15.2, 15.8), shifts=(-0.25, 0.25))
_SEARCH_5 = LineSearch(levels=(28.0, 28.95, 29.9, 30.85, 31.8), shifts=(-0.2, 0.2))
SEARCHES = {"Q4_1": _SEARCH_4, "Q5_1": _SEARCH_5, "Q2_K": _SEARCH_2, "Q4_K": _SEARCH_4, "Q5_K": _SEARCH_5}
#: Factors of `d` and `dmin` where these have so few bits that the next step may be a third larger.
_COARSE_FACTORS = (0.75, 0.9, 1.0, 1.15, 1.33)


def quantize(
    w: np.ndarray, name: str, importance: np.ndarray | None = None, backend: str = "numpy", *, step_bits: int = 11
) -> np.ndarray:
    """Encode rows of weights.

    Args:
        w: float32 `[n, K]`, contiguous, finite, `K` a multiple of the type's block.
        name: `Q4_1`, `Q5_1`, `Q2_K`, `Q4_K` or `Q5_K`.
        importance: float32 `[K]`, positive, or None.
        backend: `numpy`, `mlx` (its default device), or `metal` for K types whose steps have 11 bits.
        step_bits: significant bits of `d` and `dmin`, or of scale and offset; fewer than float16's 11 leave room for
            products with small integers that are exact in a short float type.

    Returns:
        uint8 `[n, K // block_size * type_size]`.

    Raises:
        FormatError: another type, or weights so large that a step is beyond float16.
        BackendError: `metal` and steps of fewer bits.
    """
    if name not in SEARCHES:
        raise FormatError(f"{name!r} has no encoder here: the types that have one are {', '.join(SEARCHES)}")
    search = replace(SEARCHES[name], step_bits=step_bits)
    if step_bits < COARSE:
        search = replace(search, factors=_COARSE_FACTORS)
    if backend == "metal" and name in K_TYPES:
        blocks = _encode_on_metal(w, name, importance, search)
    else:
        encode = _encode_k if name in K_TYPES else _encode_1
        blocks = encode(w, name, importance, mlx_tiles if backend == "mlx" else numpy_tiles, search)
    return blocks.reshape(w.shape[0], w.shape[1] // block_format(name).block_size * blocks.shape[1])


def _encode_k(w: np.ndarray, name: str, importance: np.ndarray | None, tiles: Any, search: LineSearch) -> np.ndarray:
    geometry = K_TYPES[name]
    format = block_format(name)
    blocks = np.empty((w.size // format.block_size, format.type_size), np.uint8)
    for part, tile in tiles(w, geometry.sub_block, geometry.n_sub_blocks, importance):
        with np.errstate(over="ignore", invalid="ignore"):
            block, q = search_blocks(tile, 2**geometry.bits - 1, 2**geometry.scale_bits - 1, search)
            parts = _parts(tile.xp, block, q)
        _check_finite(name, w, parts.d, parts.dmin)
        blocks[part] = pack(parts, name)
    return blocks


def _encode_on_metal(w: np.ndarray, name: str, importance: np.ndarray | None, search: LineSearch) -> np.ndarray:
    from mlxq.ops.metal_block_quantize import quantize_lines

    if search.step_bits < 11:
        raise BackendError(f"{name}: the Metal encoder's steps have 11 bits, not {search.step_bits}; use numpy or mlx")
    format, layout = block_format(name), LAYOUTS[name]
    how = {"levels": search.levels, "shifts": search.shifts, "factors": search.factors}
    blocks = np.empty((w.size // format.block_size, format.type_size), np.uint8)
    for part, encoded in metal_parts(w, importance, lambda x, v: quantize_lines(x, name, v, **how)):
        blocks[part] = encoded
        steps = (encoded[:, at : at + 2].copy().view("<f2") for at in (layout.d, layout.dmin))
        _check_finite(name, w, *steps)
    return blocks


def _parts(xp: Any, block: Block, q: Any) -> SuperBlocks:
    codes = np.asarray(q.astype(xp.uint8))
    n = codes.shape[-1]
    return SuperBlocks(
        np.asarray(block.d.astype(xp.float16)),
        np.ascontiguousarray(np.asarray(block.sc.astype(xp.uint8)).T),
        np.ascontiguousarray(codes.transpose(2, 1, 0)).reshape(n, -1),
        np.asarray(block.dmin.astype(xp.float16)),
        np.ascontiguousarray(np.asarray(block.m.astype(xp.uint8)).T),
    )


def _encode_1(w: np.ndarray, name: str, importance: np.ndarray | None, tiles: Any, search: LineSearch) -> np.ndarray:
    format = block_format(name)
    blocks = np.empty((w.size // format.block_size, format.type_size), np.uint8)
    top = 31 if name == "Q5_1" else 15
    for part, tile in tiles(w, format.block_size, 1, importance):
        with np.errstate(over="ignore", invalid="ignore"):
            s, offset, q = search_groups(tile, top, search)
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
