"""Weights laid out for searches over many small groups: one column a group, so that every step is a long loop.

A tile holds `n` blocks of `n_groups` groups of `group` weights as `x[group, n_groups, n]`: weight `i` of group `j` of
every block lies in one contiguous row, and what belongs to a group is an array `[n_groups, n]`. A search asks a tile
only for what touches every weight: codes by rounding (`round`) and their sums (`moments`). With the sums, scale, offset
and error of a group are closed forms on small arrays, written once over `tile.xp`, which is `numpy` or `mlx.core`.

NumPy tiles reuse their buffers; mlx tiles are lazy. The mlx tile has not run on a Mac.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np

from mlxq.formats.superblocks import SUPER_BLOCK

#: Weights of a tile. Threads that search small tiles wait for Python's lock more than they compute: a model of 226M
#: weights in Q4_K_M took two of them 7.9 s with tiles of 2^17, 7.6 with 2^18, 6.6 with 2^19 and 5.5 with 2^20, although
#: the arrays of a tile then leave the second-level cache (two Xeon cores, 2 MiB each).
NUMPY_TILE = 1 << 20
#: Weights transposed at a time: what is read, 1 KiB apart, stays in the first-level cache.
_TRANSPOSED = 1 << 13
#: On a GPU the arrays of a tile only have to fit in memory.
MLX_TILE = 1 << 23


class NumpyTile:
    """`x` float32 `[group, n_groups, n]` and its importance `w`, of the same shape or None for all ones."""

    xp = np

    def __init__(self, x: np.ndarray, w: np.ndarray | None, wx: np.ndarray, q: np.ndarray) -> None:
        self.x, self.w = x, w
        self._wx, self._q = wx, q
        if w is not None:
            np.multiply(w, x, out=wx)

    def shift(self, by: np.ndarray) -> None:
        """Subtract `by` `[n_groups, n]` from the weights of each group."""
        self.x -= by
        if self.w is not None:
            np.multiply(self.w, self.x, out=self._wx)

    def round(self, inverse: np.ndarray, offset: np.ndarray | float | None, low: int, high: int) -> np.ndarray:
        """`x * inverse + offset` to the nearest integer (ties to even) between `low` and `high`.

        Args:
            inverse, offset: float32 `[n_groups, n]`; `offset` may be one number, or None for 0.

        Returns:
            float32 `[group, n_groups, n]`, good until the next call.
        """
        q = self._q
        np.multiply(self.x, inverse, out=q)
        if offset is not None:
            q += offset
        np.rint(q, out=q)
        np.clip(q, low, high, out=q)
        return q

    def moments(self, q: np.ndarray) -> np.ndarray:
        """The sums of `w q`, `w q^2` and `w q x` over each group, float32 `[3, n_groups, n]`."""
        flat = (q.shape[0], -1)
        q, w, wx = q.reshape(flat), self.w, self._wx.reshape(flat)
        out = np.empty((3, q.shape[1]), np.float32)
        if w is None:
            np.add.reduce(q, axis=0, out=out[0])
            np.einsum("ij,ij->j", q, q, out=out[1])
        else:
            w = w.reshape(flat)
            np.einsum("ij,ij->j", w, q, out=out[0])
            np.einsum("ij,ij,ij->j", w, q, q, out=out[1])
        np.einsum("ij,ij->j", wx, q, out=out[2])
        return out.reshape(3, *self.x.shape[1:])

    def weight_sums(self) -> tuple[np.ndarray, np.ndarray]:
        """The sums of `w` and `w x` over each group, float32 `[n_groups, n]`."""
        total = np.full(self.x.shape[1:], self.x.shape[0], np.float32) if self.w is None else self.w.sum(axis=0)
        return total, self._wx.sum(axis=0)


class MlxTile:
    """`NumpyTile` in mlx arrays: lazy, nothing computed in place."""

    def __init__(self, x: Any, w: Any | None) -> None:
        import mlx.core as mx

        self.xp = mx
        self._round = _rounded if mx.default_device().type == mx.DeviceType.cpu else _compiled_rounded()
        self.x, self.w = x, w
        self._wx = x if w is None else w * x

    def shift(self, by: Any) -> None:
        self.x = self.x - by
        self._wx = self.x if self.w is None else self.w * self.x

    def round(self, inverse: Any, offset: Any | None, low: int, high: int) -> Any:
        return self._round(self.x, inverse, 0 if offset is None else offset, low, high)

    def moments(self, q: Any) -> Any:
        wq = q if self.w is None else self.w * q
        return self.xp.stack([wq.sum(axis=0), (wq * q).sum(axis=0), (self._wx * q).sum(axis=0)])

    def weight_sums(self) -> tuple[Any, Any]:
        mx = self.xp
        total = mx.full(self.x.shape[1:], self.x.shape[0], mx.float32) if self.w is None else self.w.sum(axis=0)
        return total, self._wx.sum(axis=0)


def _rounded(x: Any, inverse: Any, offset: Any, low: int, high: int) -> Any:
    import mlx.core as mx

    return mx.clip(mx.round(x * inverse + offset), low, high)


@cache
def _compiled_rounded() -> Callable:
    """`_rounded` as one kernel, for a GPU; on a CPU mlx would need a C++ compiler."""
    import mlx.core as mx

    return mx.compile(_rounded)


def numpy_tiles(
    w: np.ndarray, group: int, n_groups: int, importance: np.ndarray | None
) -> Iterator[tuple[slice, NumpyTile]]:
    """Tiles that cover `w`, whole rows each; a tile is good until the next one.

    Args:
        w: float32 `[N, K]`, contiguous, `K` a multiple of `group * n_groups`.
        importance: float32 `[K]`, or None.

    Yields:
        the range of blocks (`group * n_groups` weights each, row after row), and their tile.
    """
    N, K = w.shape
    per_row = K // (group * n_groups)
    # Tiles of one size, so that none is left with a single block, whose sums NumPy adds up in another order.
    n_tiles = -(-N // max(NUMPY_TILE // max(K, 1), 1))
    rows = max(-(-N // max(n_tiles, 1)), 1)
    full = (group, n_groups, rows * per_row)
    x, q = np.empty(full, np.float32), np.empty(full, np.float32)
    weights, wx = None, x
    if importance is not None:
        weights, wx = _spread(importance, group, n_groups, rows), np.empty(full, np.float32)
    for start in range(0, N, rows):
        part = w[start : start + rows]
        n = part.shape[0] * per_row
        if n < x.shape[2]:
            # The last tile is narrower: contiguous views of the same memory.
            x, q, wx = (a.reshape(-1)[: group * n_groups * n].reshape(group, n_groups, n) for a in (x, q, wx))
            wx = x if weights is None else wx
            weights = None if weights is None else np.ascontiguousarray(weights[:, :, :n])
        _transpose(part.reshape(n, n_groups, group), x)
        yield slice(start * per_row, start * per_row + n), NumpyTile(x, weights, wx, q)


def _transpose(blocks: np.ndarray, x: np.ndarray) -> None:
    """Copy `[n, n_groups, group]` to `[group, n_groups, n]`."""
    n, n_groups, group = blocks.shape
    step = max(_TRANSPOSED // (n_groups * group), 1)
    for start in range(0, n, step):
        part = slice(start, start + step)
        np.copyto(x[:, :, part], blocks[part].transpose(2, 1, 0))


def mlx_tiles(w: np.ndarray, group: int, n_groups: int, importance: np.ndarray | None) -> Iterator[tuple[slice, Any]]:
    """`numpy_tiles` for mlx: the same arguments, larger tiles."""
    import mlx.core as mx

    N, K = w.shape
    per_row = K // (group * n_groups)
    rows = max(MLX_TILE // max(K, 1), 1)
    for start in range(0, N, rows):
        part = w[start : start + rows]
        n = part.shape[0] * per_row
        x = mx.array(part).reshape(n, n_groups, group).transpose(2, 1, 0)
        weights = None
        if importance is not None:
            row = mx.array(importance).reshape(1, per_row, n_groups, group).transpose(3, 2, 0, 1)
            weights = mx.broadcast_to(row, (group, n_groups, part.shape[0], per_row)).reshape(group, n_groups, n)
        yield slice(start * per_row, start * per_row + n), MlxTile(x, weights)


def _spread(importance: np.ndarray, group: int, n_groups: int, rows: int) -> np.ndarray:
    """Importance `[K]` of one row as a tile `[group, n_groups, rows * K // (group * n_groups)]`."""
    row = importance.reshape(-1, n_groups, group).transpose(2, 1, 0)[:, :, None]
    spread = np.broadcast_to(row, (group, n_groups, rows, row.shape[3]))
    return np.ascontiguousarray(spread).reshape(group, n_groups, -1)


def metal_parts(
    w: np.ndarray, importance: np.ndarray | None, encode: Callable[[Any, Any], Any]
) -> Iterator[tuple[slice, np.ndarray]]:
    """Super-blocks that a Metal kernel encodes.

    Args:
        w: float32 `[N, K]`, contiguous, `K` a multiple of 256.
        importance: float32 `[K]`, or None.
        encode: some rows and the importance, as mlx arrays, to blocks uint8 `[rows, row_bytes]`.

    Yields:
        a range of super-blocks, row after row, and their blocks uint8 `[n, type_size]`.
    """
    import mlx.core as mx

    N, K = w.shape
    per_row = K // SUPER_BLOCK
    rows = max(MLX_TILE // max(K, 1), 1)
    columns = None if importance is None else mx.array(importance)
    for start in range(0, N, rows):
        part = w[start : start + rows]
        n = part.shape[0] * per_row
        yield slice(start * per_row, start * per_row + n), np.array(encode(mx.array(part), columns)).reshape(n, -1)
