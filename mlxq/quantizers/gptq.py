"""Error feedback into affine codes: GPTQ with searched grids, then descent on codes, scales and biases.

`quantize` goes through the columns in the order of their curvature. When it comes to a group, it chooses the group's
scale and bias by `grid_search` on the weights as they are then, earlier errors fed back into them, with the inverse
Hessian's curvature as importance; those are the scale and bias that the codes are packed with. Each column is rounded,
and its error spread over the columns that follow (Frantar et al. 2022, "GPTQ").

What that leaves is made smaller by descent: group by group, scale and bias are moved to the minimum of the output
error for the codes as they are, then each code to the best one with all others kept (coordinate descent, as in Behdin
et al. 2023, "QuantEase"). Both only ever lower the error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlxq.formats import affine, floats
from mlxq.quantizers.curvature import Curvature
from mlxq.quantizers.grid_search import Grids, float_grids
from mlxq.types import QuantizedTensor, QuantSpec

#: Rows worked on at a time: what a group touches stays in the cache.
_ROWS = 4096


@dataclass
class _Rows:
    """Some rows of a matrix, laid out by column: codes and reconstruction float32 `[K, n]`, grid `[K // group, n]`."""

    q: np.ndarray
    w_hat: np.ndarray
    scales: np.ndarray
    biases: np.ndarray


def quantize(
    w: np.ndarray, curvature: Curvature, spec: QuantSpec, dtype: str, *, sweeps: int = 1, grids: Grids | None = None
) -> tuple[QuantizedTensor, np.ndarray]:
    """Quantize a matrix so that its output error on the calibration text is small.

    Args:
        w: float32 `[N, K]`, finite.
        curvature: of the layer's inputs.
        spec: bits and group size.
        dtype: of scales and biases, `F32`, `F16` or `BF16`.
        sweeps: rounds of descent after the feedback.
        grids: scales and biases that may be stored, all of them numbers of `dtype`; None: any number of it.

    Returns:
        The codes and grid, and the decoded weights float32 `[N, K]`.
    """
    N, K = w.shape
    n_groups = K // spec.group_size
    grids = grids or float_grids(spec.bits, dtype)
    codes = np.empty((N, K), np.uint8)
    w_hat = np.empty((N, K), np.float32)
    scales, biases = (np.empty((N, n_groups), np.float32) for _ in range(2))
    back = curvature.inverse_order
    groups_back = back[:: spec.group_size] // spec.group_size
    for start in range(0, N, _ROWS):
        part = slice(start, start + _ROWS)
        columns = np.ascontiguousarray(w[part].T[curvature.order])
        rows = _feed_back(columns.copy(), curvature.upper, spec, grids)
        if sweeps:
            _descend(columns, rows, curvature.hessian, spec, grids, sweeps)
        codes[part] = rows.q[back].T
        w_hat[part] = rows.w_hat[back].T
        scales[part], biases[part] = rows.scales[groups_back].T, rows.biases[groups_back].T
    stored = [floats.from_float32(a, dtype) for a in (scales, biases)]
    return QuantizedTensor(affine.pack(codes, spec.bits), *stored, spec, w.shape, dtype), w_hat


def _feed_back(w: np.ndarray, upper: np.ndarray, spec: QuantSpec, grids: Grids) -> _Rows:
    """Quantize columns `w` `[K, n]`, which are overwritten, one after another."""
    K, n = w.shape
    size, top = spec.group_size, np.float32((1 << spec.bits) - 1)
    rows = _Rows(*(np.empty((length, n), np.float32) for length in (K, K, K // size, K // size)))
    errors = np.empty((size, n), np.float32)
    for i in range(0, K, size):
        j = i + size
        local = upper[i:j, i:j]
        diagonal = np.diagonal(local)
        s, b = grids.search(w[i:j], 1 / diagonal**2)
        rows.scales[i // size], rows.biases[i // size] = s, b
        inverse = 1 / s
        for k in range(size):
            x = w[i + k]
            if k:
                # The errors of this group's columns so far, all at once: reading them beats updating what follows.
                x = x - local[:k, k] @ errors[:k]
            q = np.clip(np.rint((x - b) * inverse), 0, top)
            rows.q[i + k] = q
            rows.w_hat[i + k] = q * s + b
            errors[k] = (x - rows.w_hat[i + k]) / diagonal[k]
        if j < K:
            w[j:] -= upper[i:j, j:].T @ errors
    return rows


def _descend(w: np.ndarray, rows: _Rows, hessian: np.ndarray, spec: QuantSpec, grids: Grids, sweeps: int) -> None:
    """Lower the error `e H e` of `e = w - w_hat`, in place."""
    size, top = spec.group_size, np.float32((1 << spec.bits) - 1)
    gradient = hessian @ (w - rows.w_hat)
    for _ in range(sweeps):
        for i in range(0, len(w), size):
            part = slice(i, i + size)
            local = np.ascontiguousarray(hessian[part, part])
            g, q, old = gradient[part], rows.q[part], rows.w_hat[part].copy()
            s, b = _solve_grid(local, g, q, rows.scales[i // size], rows.biases[i // size], grids)
            rows.scales[i // size], rows.biases[i // size] = s, b
            new = q * s + b
            g = g - local @ (new - old)
            inverse, moved = 1 / s, np.empty_like(new)
            for k in range(size):
                slope = g[k] - local[k, :k] @ moved[:k] if k else g[k]
                best = np.clip(np.rint((new[k] + slope / local[k, k] - b) * inverse), 0, top)
                at = best * s + b
                moved[k] = at - new[k]
                q[k], new[k] = best, at
            rows.w_hat[part] = new
            gradient -= hessian[:, part] @ (new - old)


def _solve_grid(
    local: np.ndarray, g: np.ndarray, q: np.ndarray, s: np.ndarray, b: np.ndarray, grids: Grids
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and bias of least error for the codes as they are; the old ones where rounding spoils the gain."""
    hq, ones = local @ q, local.sum(axis=1)
    a, c, d = np.einsum("gn,gn->n", q, hq), ones @ q, ones.sum()
    along_q, along_1 = np.einsum("gn,gn->n", q, g), g.sum(axis=0)
    determinant = a * d - c * c
    regular = determinant > 1e-6 * a * d
    step = np.where(regular, (d * along_q - c * along_1) / np.where(regular, determinant, 1), 0)
    new_s = grids.scales(s + step)
    new_s = np.where(new_s == 0, s, new_s)
    u = new_s - s
    new_b = grids.biases(b + (along_1 - u * c) / d, new_s)
    v = new_b - b
    better = 2 * (u * along_q + v * along_1) > u * u * a + 2 * u * v * c + v * v * d
    return np.where(better, new_s, s), np.where(better, new_b, b)
