"""What a layer's inputs say about errors in its weights: the Hessian of its squared output error, ready for use.

The output error of a row of weights that are off by `e` is `e H e`, with `H = mean(x x^T)` over the rows of x that the
layer sees. Error feedback (`gptq`) needs the upper Cholesky factor `U` of its inverse, `H^-1 = U^T U` (Frantar et al.
2022, "GPTQ", section 3.3), in the order in which columns are quantized. Directions that the calibration text hardly
touches are given `damp` times the mean of the diagonal, more where the factorization fails otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlxq.errors import FormatError
from mlxq.formats.geometry import AFFINE_GROUP_SIZES

#: Share of the mean of the diagonal that is added to it.
DAMP = 0.01
#: The most that is tried before a Hessian is refused.
_MOST = 10.0


@dataclass(frozen=True)
class Curvature:
    """Of one layer's inputs, in the order in which columns are quantized.

    Attributes:
        order: int `[K]`, the columns of the weights in that order; groups stay together.
        hessian: float32 `[K, K]`, a little damped so that no direction is free.
        upper: float32 `[K, K]`, `U` of the damped Hessian.
        damp: what was added, as a share of the mean of the diagonal.
    """

    order: np.ndarray
    hessian: np.ndarray
    upper: np.ndarray
    damp: float

    @classmethod
    def of(cls, hessian: np.ndarray, damp: float = DAMP, *, sizes: Sequence[int] = AFFINE_GROUP_SIZES) -> Curvature:
        """Factorize a Hessian float32 `[K, K]`.

        Groups of columns with much input come first, and so do the columns within a group: what they lose is made up
        for by those that follow, while the last have none (the activation order of GPTQ's code, by whole groups, so
        that a group's codes share scale and bias on disk). Groups of all `sizes` that divide K stay together.

        Raises:
            FormatError: the Hessian is not finite, or cannot be factorized with any damping.
        """
        if not np.isfinite(hessian).all():
            raise FormatError("the inputs of the layer are not finite: activations overflow on the calibration text")
        diagonal = np.diagonal(hessian).astype(np.float64)
        order = _order(diagonal, sizes)
        h = hessian[np.ix_(order, order)].astype(np.float64)
        mean = float(diagonal.mean()) or 1.0
        while damp <= _MOST:
            upper = _factor(h, damp * mean)
            if upper is not None:
                h[np.diag_indices_from(h)] += min(damp, DAMP) * 0.01 * mean
                return cls(order, np.ascontiguousarray(h, np.float32), upper, damp)
            damp *= 10
        raise FormatError(f"the Hessian of {len(h)} inputs cannot be factorized, even with a damping of {_MOST:g}")

    def scaled(self, s: np.ndarray) -> Curvature:
        """Of the same inputs divided by `s` `[K]`, in the same order: `H -> H / s s^T`, `U -> U s`."""
        s = s[self.order].astype(np.float32)
        return Curvature(self.order, self.hessian / (s[:, None] * s), self.upper * s, self.damp)

    @property
    def inverse_order(self) -> np.ndarray:
        inverse = np.empty_like(self.order)
        inverse[self.order] = np.arange(len(self.order))
        return inverse


def output_errors(errors: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """Mean squared output error `e H e`, float64 `[N]`, of each row of weights that are off by `errors` `[N, K]`.

    `hessian` is float32 `[K, K]`, the mean of `x x^T`.
    """
    return np.einsum("nk,nk->n", errors @ hessian, errors, dtype=np.float64)


def _order(diagonal: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Columns, first by the sums of the largest groups, within them by those of the next smaller, last by their own."""
    keys = [-diagonal]
    for size in sorted(sizes):
        if len(diagonal) % size == 0:
            keys.append(np.repeat(np.arange(len(diagonal) // size), size))
            keys.append(np.repeat(-diagonal.reshape(-1, size).sum(axis=1), size))
    return np.lexsort(keys)


def _factor(h: np.ndarray, added: float) -> np.ndarray | None:
    """`U` float32 of `h + added * I`, or None where that is not positive definite.

    With columns reversed, the inverse of the lower factor is `U` reversed: one factorization and one triangular
    inverse, instead of two factorizations and an inverse.
    """
    reversed_h = h[::-1, ::-1].copy()
    reversed_h[np.diag_indices_from(reversed_h)] += added
    try:
        lower = np.linalg.cholesky(reversed_h)
    except np.linalg.LinAlgError:
        return None
    upper = _inverse_of_lower(lower)[::-1, ::-1]
    if not np.isfinite(upper).all() or not (np.diagonal(upper) > 0).all():
        return None
    return np.ascontiguousarray(upper, np.float32)


def _inverse_of_lower(a: np.ndarray, least: int = 64) -> np.ndarray:
    """Inverse of a lower triangular matrix, by halves: NumPy has no triangular solver, and products are fast."""
    n = len(a)
    if n <= least:
        return np.tril(np.linalg.inv(a))
    m = n // 2
    out = np.zeros_like(a)
    out[:m, :m] = _inverse_of_lower(a[:m, :m], least)
    out[m:, m:] = _inverse_of_lower(a[m:, m:], least)
    out[m:, :m] = -out[m:, m:] @ (a[m:, :m] @ out[:m, :m])
    return out
