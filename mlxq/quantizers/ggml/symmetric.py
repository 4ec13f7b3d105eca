"""Encoders of the ggml types whose groups have a scale and no offset: Q4_0, Q5_0, Q8_0, Q3_K, Q6_K.

How scales are searched is in `scale_search`. Q4_0 and Q5_0 without importance, and Q8_0 always, follow the rule of
ggml's reference (`ggml-quants.c`, quantize_row_q4_0_ref and its siblings) and have its bytes: the weight of largest
magnitude takes the lowest code, or 127.
"""

from __future__ import annotations

import numpy as np

from mlxq.formats.geometry import block_format
from mlxq.formats.kquants import pack
from mlxq.formats.superblocks import K_TYPES, SUPER_BLOCK, SuperBlocks
from mlxq.quantizers.ggml import on_grid
from mlxq.quantizers.ggml.scale_search import BlockSearch, Uniform, check_range, encoded_blocks, encoded_groups
from mlxq.quantizers.ggml.tiles import metal_parts

#: Groups of 32 worked on at a time where nothing is searched.
_CHUNK = 1 << 12
#: The largest float32 below one half. Added to a magnitude that is then cut off, it rounds halves away from zero.
_BELOW_HALF = np.float32(0.49999997)

GRIDS = {
    "Q4_0": Uniform(-8, 7),
    "Q5_0": Uniform(-16, 15),
    "Q8_0": Uniform(-127, 127),
    "Q3_K": Uniform(-4, 3),
    "Q6_K": Uniform(-32, 31),
}
#: By type, and whether there is importance: with it ggml's own search is the closer one.
SEARCHES = {
    ("Q3_K", False): BlockSearch(31, 1.2, (-3, 0, 3), rounds=1),
    ("Q3_K", True): BlockSearch(31, 1.3, (-8, -6, -4, -2, 0, 2, 4, 6, 8), (0.75, 0.9, 1.05), rounds=2),
    ("Q6_K", False): BlockSearch(127, 1.2, tuple(range(-1, 9))),
    ("Q6_K", True): BlockSearch(127, 1.2, (-7, -5, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 10), rounds=1),
}
#: Q4_0, Q5_0: what the weight of largest magnitude becomes, as part of the lowest code; below 0 of the other sign.
FACTORS = (1.0, 1.07, 1.14, 0.94, 0.88, 0.83, -1.1, -1.02, -0.94, -0.86, -0.78)


def quantize(w: np.ndarray, name: str, importance: np.ndarray | None = None, backend: str = "numpy") -> np.ndarray:
    """Encode rows of weights.

    Args:
        w: float32 `[N, K]`, contiguous, `K` a multiple of the type's block.
        name: `Q4_0`, `Q5_0`, `Q8_0`, `Q3_K` or `Q6_K`.
        importance: float32 `[K]`, positive, its mean about 1; or None.
        backend: `numpy`, `mlx` for its default device, or `metal` for the K types. What is not searched is always
            computed by NumPy.

    Returns:
        uint8 `[N, row_bytes]`.

    Raises:
        FormatError: a weight that is NaN, or too large for the type.
    """
    format = block_format(name)
    blocks = np.empty((w.size // format.block_size, format.type_size), np.uint8)
    grid, search = GRIDS[name], SEARCHES.get((name, importance is not None))
    check_range(w, name, grid, search.top if search else 1)
    if search and backend == "metal":
        _encode_on_metal(w, name, importance, grid, search, blocks)
    elif search:
        for part, d, scales, codes in encoded_blocks(w, importance, grid, search, K_TYPES[name].n_sub_blocks, backend):
            blocks[part] = pack(SuperBlocks(d, scales, codes), name)
    elif name == "Q8_0" or importance is None:
        for start in range(0, len(blocks), _CHUNK):
            _reference(w.reshape(-1, 32)[start : start + _CHUNK], name, blocks[start : start + _CHUNK])
    else:
        for part, d, codes in encoded_groups(w, importance, grid, FACTORS, backend):
            _store(d, codes.T, name, blocks[part])
    return blocks.reshape(w.shape[0], w.shape[1] // format.block_size * format.type_size)


def _encode_on_metal(
    w: np.ndarray, name: str, importance: np.ndarray | None, grid: Uniform, search: BlockSearch, blocks: np.ndarray
) -> None:
    from mlxq.ops.metal_block_quantize import quantize_scales

    how = {"room": search.room, "steps": search.steps, "opposite": search.opposite, "rounds": search.rounds}
    for part, encoded in metal_parts(w, importance, lambda x, v: quantize_scales(x, name, v, **how)):
        x = w.reshape(-1, SUPER_BLOCK)[part]
        at, d, sc, values = on_grid.encode(x, grid, K_TYPES[name].n_sub_blocks, search.top)
        encoded[at] = pack(SuperBlocks(d, sc.astype(np.int8), grid.codes(values)), name)
        blocks[part] = encoded


def _reference(x: np.ndarray, name: str, blocks: np.ndarray) -> None:
    """Encode groups `[n, 32]` by ggml's reference rule into blocks `[n, type_size]`."""
    # A copy even of a single group, whose transpose is contiguous as it is: the caller's weights stay.
    x = np.array(x.T, order="C")
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
        d /= np.float32(GRIDS[name].low)
    inverse = np.zeros_like(d)
    # The inverse of a subnormal number may be infinite; as float16 it is zero anyway.
    np.divide(np.float32(1), d, out=inverse, where=np.abs(d) >= np.finfo(np.float32).tiny)
    x *= inverse
    if name == "Q8_0":
        x += np.copysign(_BELOW_HALF, x)
        codes = x.astype(np.int8).view(np.uint8)
    else:
        x += np.float32(0.5 - GRIDS[name].low)
        codes = np.minimum(x, np.float32(GRIDS[name].high - GRIDS[name].low), out=x).astype(np.uint8)
    _store(d.astype(np.float16), codes, name, blocks)


def _store(d: np.ndarray, codes: np.ndarray, name: str, blocks: np.ndarray) -> None:
    """Write `d` float16 `[n]` and codes uint8 `[32, n]` as blocks (the layout is drawn in `formats.ggml`)."""
    blocks[:, :2] = d.astype("<f2").view(np.uint8).reshape(-1, 2)
    if name == "Q8_0":
        blocks[:, 2:] = codes.T
        return
    qs = codes[16:] << 4
    qs |= codes[:16] & 0x0F
    blocks[:, -16:] = qs.T
    if name == "Q5_0":
        # np.packbits along the first axis takes longer.
        fifth = (codes >> 4).reshape(4, 8, -1)
        packed = fifth[:, 0].copy()
        for bit in range(1, 8):
            packed |= fifth[:, bit] << bit
        blocks[:, 2:6] = packed.T
