"""What error feedback has to know of each ggml type: its geometry, its grid of values, how its scales are chosen.

All types are written as one. A block has steps `d`, and `dmin` where it has offsets; a sub-block has integers `sc` and
`m`; a weight is `d sc v - dmin m`, with `v` a value of the grid. Types of 32 weights a block have one sub-block, whose
integers are 1: there `d` and `-dmin` are scale and offset themselves.

Arrays are laid out by column: `[K, n]` weights of `n` rows, `[n_sub_blocks, n]` integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mlxq.errors import FormatError
from mlxq.formats import crossings, iq4, kquants
from mlxq.formats.geometry import block_format
from mlxq.formats.superblocks import K_TYPES, SuperBlocks
from mlxq.quantizers.ggml import asymmetric, line_search, scale_search, symmetric
from mlxq.quantizers.ggml import iq4 as iq4_encoder
from mlxq.quantizers.ggml.tiles import NumpyTile

#: Weights that an order of columns has to keep together so that it serves every type.
SIZES = (16, 32, 256)


class Scales(NamedTuple):
    """Of some blocks of `n` rows, float32: `d`, `dmin` `[n_blocks, n]`, `sc`, `m` `[n_sub_blocks, n]`.

    `d`, `dmin` are float16 numbers, `sc`, `m` integers; `dmin` and `m` are None where the type has no offsets.
    """

    d: np.ndarray
    sc: np.ndarray
    dmin: np.ndarray | None = None
    m: np.ndarray | None = None


@dataclass(frozen=True)
class BlockType:
    """A ggml type.

    Attributes:
        sub_block: weights that share a scale.
        grid: of the values, a `scale_search.Uniform` or one like it.
        search: scales of one block from its tile of weights.
        least, largest: of `sc`; both 1 where there are no integers. `m` goes from 0 to `largest`.
        has_mins: whether there are offsets.
    """

    name: str
    sub_block: int
    grid: Any
    search: Callable[[NumpyTile], Scales]
    least: int = 1
    largest: int = 1
    has_mins: bool = False

    @property
    def block(self) -> int:
        return block_format(self.name).block_size

    @property
    def n_sub_blocks(self) -> int:
        return self.block // self.sub_block

    def choose(self, x: np.ndarray, importance: np.ndarray) -> Scales:
        """Scales of one block `x` `[block, n]` that lose least, columns weighted by `importance` `[block]`.

        Raises:
            FormatError: weights so large that a step is beyond float16.
        """
        n = x.shape[1]
        # A copy even of one sub-block, which lies as it is wanted: a tile counts its weights from the lowest.
        columns = np.array(x.reshape(self.n_sub_blocks, self.sub_block, n).transpose(1, 0, 2), order="C")
        weights = (importance / importance.mean()).reshape(self.n_sub_blocks, self.sub_block).T[:, :, None]
        weights = np.ascontiguousarray(np.broadcast_to(weights, columns.shape), np.float32)
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            scales = self.search(NumpyTile(columns, weights, np.empty_like(columns), np.empty_like(columns)))
        for steps in (scales.d, scales.dmin):
            if steps is not None and not np.isfinite(steps).all():
                raise FormatError(
                    f"{self.name}: its float16 steps cannot hold weights as large as {np.abs(x).max():g}; choose F32 "
                    "or BF16"
                )
        return scales

    def pack(self, values: np.ndarray, scales: Scales) -> np.ndarray:
        """Blocks uint8 `[n, row_bytes]` of values `[K, n]` and scales in the order of the weights."""
        n = values.shape[1]
        steps = [None if a is None else a.T.reshape(-1).astype(np.float16) for a in (scales.d, scales.dmin)]
        codes = np.ascontiguousarray(self.grid.codes(values).T).reshape(-1, self.block)
        if self.name in K_TYPES:
            kind = np.uint8 if self.has_mins else np.int8
            sc, m = (None if a is None else self._integers(a, kind) for a in (scales.sc, scales.m))
            blocks = kquants.pack(SuperBlocks(steps[0], sc, codes, steps[1], m), self.name)
        elif self.name in iq4.IQ4_TYPES:
            sc = self._integers(scales.sc, np.int8) if self.largest > 1 else None
            blocks = iq4.pack(iq4.IQ4Blocks(steps[0], codes, sc), self.name)
        else:
            offsets = steps[0] if steps[1] is None else -steps[1]
            if self.name == "Q8_0":
                # Its lowest code is not used, so that both signs reach as far.
                codes += 1
            blocks = crossings.blocks_of_32(codes, steps[0], offsets, self.name)
        return blocks.reshape(n, -1)

    def _integers(self, a: np.ndarray, kind: type) -> np.ndarray:
        return np.ascontiguousarray(a.T).reshape(-1, self.n_sub_blocks).astype(kind)


def _lines(name: str) -> BlockType:
    """Super-blocks with offsets."""
    g, search = K_TYPES[name], asymmetric.SEARCHES[name]
    top, largest = 2**g.bits - 1, 2**g.scale_bits - 1

    def found(tile: NumpyTile) -> Scales:
        block, _ = line_search.search_blocks(tile, top, largest, search)
        return Scales(block.d[None], block.sc, block.dmin[None], block.m)

    return BlockType(name, g.sub_block, scale_search.Uniform(0, top), found, 0, largest, True)


def _scales(name: str, sub_block: int, grid: Any, search: scale_search.BlockSearch) -> BlockType:
    """Super-blocks without offsets."""

    def found(tile: NumpyTile) -> Scales:
        d, sc, _ = scale_search.search_blocks(tile, grid, search)
        return Scales(d[None], sc)

    return BlockType(name, sub_block, grid, found, -search.top - 1, search.top)


def _line(name: str) -> BlockType:
    """Blocks of 32 with an offset."""
    top = 31 if name == "Q5_1" else 15

    def found(tile: NumpyTile) -> Scales:
        s, offset, _ = line_search.search_groups(tile, top, asymmetric.SEARCHES[name])
        return Scales(s, np.ones_like(s), -offset, np.ones_like(s))

    return BlockType(name, 32, scale_search.Uniform(0, top), found, has_mins=True)


def _scale(name: str, grid: Any, factors: tuple[float, ...]) -> BlockType:
    """Blocks of 32 without an offset."""

    def found(tile: NumpyTile) -> Scales:
        d, _ = scale_search.search_groups(tile, grid, factors)
        return Scales(d, np.ones_like(d))

    return BlockType(name, 32, grid, found)


def _table() -> dict[str, BlockType]:
    types = [_lines(name) for name in ("Q2_K", "Q4_K", "Q5_K")]
    for name in ("Q3_K", "Q6_K"):
        types.append(_scales(name, 16, symmetric.GRIDS[name], symmetric.SEARCHES[name, True]))
    types.append(_scales("IQ4_XS", 32, iq4_encoder.GRID, iq4_encoder.SEARCHES[True]))
    types += [_line(name) for name in ("Q4_1", "Q5_1")]
    types += [_scale(name, symmetric.GRIDS[name], symmetric.FACTORS) for name in ("Q4_0", "Q5_0")]
    types.append(_scale("Q8_0", symmetric.GRIDS["Q8_0"], (1.0,)))
    types.append(_scale("IQ4_NL", iq4_encoder.GRID, iq4_encoder.FACTORS))
    return {t.name: t for t in types}


#: By name, every type that error feedback can write.
TYPES = _table()
