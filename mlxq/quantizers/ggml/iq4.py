"""Encoders of IQ4_NL and IQ4_XS: the searches of `scale_search` on the grid of sixteen unevenly spaced values.

The nearest value is looked up: the borders between neighbouring values are whole or half integers, so the half-open
interval of length 1/2 that a scaled weight lies in decides.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxq.formats.geometry import block_format
from mlxq.formats.iq4 import SUB_BLOCK, VALUES, IQ4Blocks, pack
from mlxq.quantizers.ggml.scale_search import BlockSearch, check_range, encoded_blocks, encoded_groups

#: Intervals [k / 2, k / 2 + 1/2) of scaled weights, from -128 on; what lies outside has the value at that end.
_N_INTERVALS = 512
_MIDDLES = (np.arange(_N_INTERVALS) + 0.5) / 2 - 128
#: The code, and the value, of each interval.
_NEAREST = np.abs(_MIDDLES[:, None] - VALUES).argmin(axis=1)
_NEAREST_VALUES = VALUES[_NEAREST].astype(np.float32)
#: The code of each value, counted from the lowest value.
_CODES = _NEAREST[2 * np.arange(-128, 128) + 256].astype(np.uint8)


class _Values:
    """The grid of sixteen values."""

    low, high = int(VALUES[0]), int(VALUES[-1])
    divisible = False
    #: The values that the weight of largest magnitude may have.
    extremes = tuple(VALUES.tolist())

    def values_of(self, scaled: np.ndarray) -> np.ndarray:
        """The grid's values nearest to scaled weights of any shape."""
        intervals = np.clip(np.floor(2 * scaled) + _N_INTERVALS // 2, 0, _N_INTERVALS - 1)
        return np.take(_NEAREST_VALUES, intervals.astype(np.uint16))

    def nearest(self, tile: Any, inverse: Any) -> Any:
        """The grid's value nearest to each weight times `inverse` `[n_groups, n]`, good until the next call."""
        # Rounding 2 x - 1/2, counted from the first interval, is cutting off 2 x.
        intervals = tile.round(2 * inverse, _N_INTERVALS / 2 - 0.5, 0, _N_INTERVALS - 1)
        if tile.xp is np:
            return np.take(_NEAREST_VALUES, intervals.astype(np.uint16), out=intervals, mode="clip")
        return tile.xp.take(tile.xp.array(_NEAREST_VALUES), intervals.astype(tile.xp.uint32))

    def codes(self, values: np.ndarray) -> np.ndarray:
        """Values of the grid as codes, uint8."""
        return np.take(_CODES, (values + np.float32(128)).astype(np.uint8), mode="clip")


GRID = _Values()
#: IQ4_XS, by whether there is importance: uneven importance asks for scales further away.
SEARCHES = {
    False: BlockSearch(31, 1.2, (-4, -2, 0, 2, 4), (0.8, 0.88, 0.96, 1.02, 1.1), rounds=1),
    True: BlockSearch(31, 1.3, (-8, -6, -4, -2, 0, 2, 4, 6), (0.7, 0.8, 0.88, 0.96, 1.02, 1.1), rounds=2),
}
#: IQ4_NL: what the weight of largest magnitude becomes, as part of the lowest value; below 0 of the other sign.
FACTORS = (1.0, 1.06, 1.12, 0.93, 0.86, -1.05, -0.99, -0.93, -0.87, -0.8)


def quantize(w: np.ndarray, name: str, importance: np.ndarray | None = None, backend: str = "numpy") -> np.ndarray:
    """Encode rows of weights.

    Args:
        w: float32 `[N, K]`, contiguous, `K` a multiple of the type's block.
        name: `IQ4_NL` or `IQ4_XS`.
        importance: float32 `[K]`, positive, its mean about 1; or None.
        backend: `numpy`, or `mlx` for its default device.

    Returns:
        uint8 `[N, row_bytes]`.

    Raises:
        FormatError: a weight that is NaN, or too large for the type.
    """
    format = block_format(name)
    blocks = np.empty((w.size // format.block_size, format.type_size), np.uint8)
    search = SEARCHES[importance is not None]
    check_range(w, name, GRID, 1 if name == "IQ4_NL" else search.top)
    if name == "IQ4_NL":
        for part, d, codes in encoded_groups(w, importance, GRID, FACTORS, backend):
            blocks[part] = pack(IQ4Blocks(d, codes), name)
    else:
        for part, d, scales, codes in encoded_blocks(w, importance, GRID, search, 256 // SUB_BLOCK, backend):
            blocks[part] = pack(IQ4Blocks(d, codes, scales), name)
    return blocks.reshape(w.shape[0], w.shape[1] // format.block_size * format.type_size)
