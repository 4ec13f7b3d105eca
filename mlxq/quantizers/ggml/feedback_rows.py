"""Some rows of a matrix on their way into ggml blocks, laid out by column: values, decoded weights, and scales."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlxq.quantizers.ggml.block_types import BlockType, Scales

#: Steps tried to either side of an integer.
_STEPS = (0, -1, 1, -2, 2)


def inverse(step: np.ndarray) -> np.ndarray:
    """`1 / step`, 0 where that is 0: then all weights have one value."""
    return np.where(step != 0, 1 / np.where(step != 0, step, 1), 0)


@dataclass
class Rows:
    """`n` rows: `values` of the grid and decoded weights `w_hat` float32 `[K, n]`, and `scales`."""

    values: np.ndarray
    w_hat: np.ndarray
    scales: Scales

    @classmethod
    def empty(cls, K: int, n: int, type_: BlockType) -> Rows:
        values, w_hat = (np.empty((K, n), np.float32) for _ in range(2))
        d, dmin = (np.empty((K // type_.block, n), np.float32) for _ in range(2))
        sc, m = (np.empty((K // type_.sub_block, n), np.float32) for _ in range(2))
        return cls(values, w_hat, Scales(d, sc, dmin, m) if type_.has_mins else Scales(d, sc))

    def store(self, block: int, scales: Scales, type_: BlockType) -> None:
        """Take over the scales of one block."""
        groups = slice(block * type_.n_sub_blocks, (block + 1) * type_.n_sub_blocks)
        self.scales.d[block], self.scales.sc[groups] = scales.d[0], scales.sc
        if type_.has_mins:
            self.scales.dmin[block], self.scales.m[groups] = scales.dmin[0], scales.m

    def line(self, group: int, type_: BlockType) -> tuple[np.ndarray, np.ndarray | None]:
        """Step and offset `[n]` of a sub-block; the offset is None where the type has none."""
        d, sc, dmin, m = self.scales
        block = group // type_.n_sub_blocks
        return d[block] * sc[group], None if dmin is None else -(dmin[block] * m[group])

    def scales_in(self, back: np.ndarray, type_: BlockType) -> Scales:
        """The scales in the order of the weights; `back` is the inverse of the order of columns."""
        blocks, groups = (back[::size] // size for size in (type_.block, type_.sub_block))
        d, sc, dmin, m = self.scales
        return Scales(d[blocks], sc[groups], *(() if dmin is None else (dmin[blocks], m[groups])))

    def adjust(self, group: int, x: np.ndarray, importance: np.ndarray, type_: BlockType) -> None:
        """Choose the integers of a sub-block again, for its weights `x` `[sub_block, n]` as they are now."""
        d, sc, dmin, m = self.scales
        d = d[group // type_.n_sub_blocks]
        w = (importance / importance.mean()).astype(np.float32)
        best = None
        if type_.has_mins:
            dmin = dmin[group // type_.n_sub_blocks]
            offset, total, sum_x, scale_m = -(dmin * m[group]), w.sum(), w @ x, inverse(dmin)
            shifted = x - offset
        wx = w[:, None] * x
        for step in _STEPS:
            tried = np.clip(sc[group] + step, type_.least, type_.largest)
            s = d * tried
            v = type_.grid.values_of((shifted if type_.has_mins else x) * inverse(s))
            vv, vx = w @ (v * v), np.einsum("gn,gn->n", wx, v)
            error = s * (s * vv - 2 * vx)
            integers = [tried]
            if type_.has_mins:
                sum_v = w @ v
                integers.append(np.clip(np.rint((s * sum_v - sum_x) * (scale_m / total)), 0, type_.largest))
                b = -(dmin * integers[1])
                error += b * (2 * (s * sum_v - sum_x) + b * total)
            if best is None:
                best, chosen = error, integers
                continue
            better = error < best
            best = np.where(better, error, best)
            chosen = [np.where(better, new, old) for new, old in zip(integers, chosen, strict=True)]
        sc[group] = chosen[0]
        if type_.has_mins:
            m[group] = chosen[1]
