"""Descent on the output error of ggml blocks, all else kept: steps, then integers, then codes, block by block.

Each part moves to the minimum of `e H e`, with `e = w - w_hat`, of what can be stored: the two steps of a block by
least squares over its 256 columns, then rounded to float16; the integers of a sub-block among their neighbours, each
with the `m` that goes with it; each code to the best one (coordinate descent, as in Behdin et al. 2023, "QuantEase").
None ever raises the error.
"""

from __future__ import annotations

import numpy as np

from mlxq.quantizers.ggml.block_types import BlockType
from mlxq.quantizers.ggml.feedback_rows import Rows, inverse

_LEAST_FLOAT16, _LARGEST_FLOAT16 = 2.0**-24, 65504.0
_STEPS = (-1, 0, 1)


def descend(w: np.ndarray, rows: Rows, hessian: np.ndarray, type_: BlockType, sweeps: int) -> None:
    """Lower the error of `rows` against the columns `w` `[K, n]`, in place, in `sweeps` rounds."""
    if not sweeps:
        return
    gradient = hessian @ (w - rows.w_hat)
    for number in range(sweeps):
        for i in range(0, len(w), type_.block):
            part = slice(i, i + type_.block)
            old = rows.w_hat[part].copy()
            _descend_block(rows, i, np.ascontiguousarray(hessian[part, part]), gradient[part].copy(), type_)
            if number + 1 < sweeps or i + type_.block < len(w):
                gradient -= hessian[:, part] @ (rows.w_hat[part] - old)


def _descend_block(rows: Rows, i: int, local: np.ndarray, g: np.ndarray, type_: BlockType) -> None:
    """The block at column `i`; `g` `[block, n]` is the gradient there, and is overwritten."""
    size = type_.sub_block
    _solve_steps(rows, i, local, g, type_)
    for at in range(0, type_.block, size):
        here, group = slice(at, at + size), (i + at) // size
        columns = slice(i + at, i + at + size)
        old = rows.w_hat[columns].copy()
        h = np.ascontiguousarray(local[here, here])
        moved = g[here]
        if type_.largest > 1:
            _solve_integers(rows, group, h, moved, type_)
            step, offset = rows.line(group, type_)
            new = rows.values[columns] * step
            rows.w_hat[columns] = new if offset is None else new + offset
            moved = moved - h @ (rows.w_hat[columns] - old)
        _move_codes(rows, group, h, moved, type_)
        if at + size < type_.block:
            g[at + size :] -= local[at + size :, here] @ (rows.w_hat[columns] - old)


def _solve_steps(rows: Rows, i: int, local: np.ndarray, g: np.ndarray, type_: BlockType) -> None:
    """`d` and `dmin` of least error for the values and integers as they are; kept where rounding spoils the gain."""
    size, n_groups = type_.sub_block, type_.n_sub_blocks
    block, groups, columns = i // type_.block, slice(i // size, i // size + n_groups), slice(i, i + type_.block)
    d, sc, dmin, m = rows.scales
    n = g.shape[1]
    along_d = (rows.values[columns].reshape(n_groups, size, n) * sc[groups, None]).reshape(-1, n)
    h_d = local @ along_d
    a, r_d = _dots(along_d, h_d), _dots(along_d, g)
    if dmin is None:
        new_d = _float16(d[block] + r_d / np.where(a > 0, a, 1), signed=type_.largest == 1)
        u = new_d - d[block]
        u[~(2 * u * r_d > u * u * a)] = 0
        d[block] += u
        moved = u * h_d
    else:
        # One number for a sub-block: sums over its columns do.
        by_group = local.reshape(len(local), n_groups, size).sum(axis=2)
        h_m = by_group @ -m[groups]
        b = _dots(-m[groups], h_m.reshape(n_groups, size, n).sum(axis=1))
        c, r_m = _dots(along_d, h_m), _dots(-m[groups], g.reshape(n_groups, size, n).sum(axis=1))
        determinant = a * b - c * c
        regular = determinant > 1e-6 * a * b
        u = np.where(regular, (b * r_d - c * r_m) / np.where(regular, determinant, 1), 0)
        u = _float16(d[block] + u) - d[block]
        t = np.where(b > 0, (r_m - u * c) / np.where(b > 0, b, 1), 0)
        t = _float16(dmin[block] + t, signed=type_.largest == 1) - dmin[block]
        worse = ~(2 * (u * r_d + t * r_m) > u * u * a + 2 * u * t * c + t * t * b)
        u[worse] = t[worse] = 0
        d[block] += u
        dmin[block] += t
        moved = u * h_d + t * h_m
    g -= moved
    for group in range(groups.start, groups.stop):
        at = slice(group * size, (group + 1) * size)
        step, offset = rows.line(group, type_)
        rows.w_hat[at] = rows.values[at] * step
        if offset is not None:
            rows.w_hat[at] += offset


def _dots(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("kn,kn->n", a, b)


def _float16(values: np.ndarray, signed: bool = False) -> np.ndarray:
    least = -_LARGEST_FLOAT16 if signed else 0.0
    return np.clip(values, least, _LARGEST_FLOAT16).astype(np.float16).astype(np.float32)


def _solve_integers(rows: Rows, group: int, h: np.ndarray, g: np.ndarray, type_: BlockType) -> None:
    """`sc` among its neighbours, each with the `m` that goes with it, for given steps and values."""
    d, sc, dmin, m = rows.scales
    block = group // type_.n_sub_blocks
    v = rows.values[group * type_.sub_block : (group + 1) * type_.sub_block]
    a, r_v = _dots(v, h @ v), _dots(v, g)
    if dmin is not None:
        ones = h.sum(axis=1)
        c, b, r_1, scale = ones @ v, ones.sum(), g.sum(axis=0), inverse(dmin[block])
    best, chosen = 0.0, [sc[group], None if m is None else m[group]]
    for step in _STEPS:
        tried = np.clip(sc[group] + step, type_.least, type_.largest)
        u = d[block] * (tried - sc[group])
        change, integers = u * (u * a - 2 * r_v), [tried, None]
        if dmin is not None:
            integers[1] = np.clip(np.rint(m[group] - (r_1 - u * c) / b * scale), 0, type_.largest)
            t = -dmin[block] * (integers[1] - m[group])
            change = change + t * (2 * u * c + t * b - 2 * r_1)
        better = change < best
        best = np.where(better, change, best)
        chosen = [
            None if new is None else np.where(better, new, old) for new, old in zip(integers, chosen, strict=True)
        ]
    sc[group] = chosen[0]
    if m is not None:
        m[group] = chosen[1]


def _move_codes(rows: Rows, group: int, h: np.ndarray, g: np.ndarray, type_: BlockType) -> None:
    """Each value of a sub-block in turn to the best one of the grid."""
    step, offset = rows.line(group, type_)
    scale, first = inverse(step), group * type_.sub_block
    moved = np.empty((len(h), g.shape[1]), np.float32)
    for k in range(len(h)):
        slope = g[k] - h[k, :k] @ moved[:k] if k else g[k]
        wanted = rows.w_hat[first + k] + slope * (1 / h[k, k])
        v = type_.grid.values_of((wanted if offset is None else wanted - offset) * scale)
        at = v * step if offset is None else v * step + offset
        moved[k] = at - rows.w_hat[first + k]
        rows.values[first + k], rows.w_hat[first + k] = v, at
