"""Estimates over tokens that come in sequences, with standard errors that take the sequences as the sample.

Means: the error of a ratio estimator (`divergence.ratio_standard_error`). Quantiles: the bootstrap over whole sequences
(Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 6; resampling clusters: Davison and Hinkley,
Bootstrap Methods and their Application, 1997, section 3.8). It is seeded, so equal inputs give equal errors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxq.evaluate.divergence import ratio_standard_error

#: Resamples of a bootstrap. The error's own error is then 1 / sqrt(2 * 1000), about 2 %.
_RESAMPLES = 1000
_SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error, which a single sequence cannot tell: then it is None."""

    value: float
    se: float | None

    def to_dict(self) -> dict[str, float | None]:
        """For JSON: six significant digits; null for what is not finite."""
        return {"value": rounded(self.value), "standard_error": rounded(self.se)}


def mean(values: np.ndarray, sequence: np.ndarray) -> Estimate:
    """Mean over tokens.

    Args:
        values: `[n]`.
        sequence: `[n]`, the index of the sequence of each token.
    """
    counts = np.bincount(sequence)
    sums = np.bincount(sequence, weights=values)
    used = counts > 0
    return Estimate(float(values.mean()), ratio_standard_error(sums[used], counts[used]))


def perplexity(nll: np.ndarray, sequence: np.ndarray) -> Estimate:
    """`exp` of the mean negative log likelihood; its error by the delta method, `exp(m) * se(m)`."""
    m = mean(nll, sequence)
    with np.errstate(over="ignore"):
        value = float(np.exp(m.value))
    return Estimate(value, None if m.se is None else value * m.se)


def quantile(values: np.ndarray, sequence: np.ndarray, share: float) -> Estimate:
    """The smallest value that at least `share` of the tokens do not exceed.

    Args:
        values, sequence: as in `mean`.
        share: in (0, 1].
    """
    order = np.argsort(values, kind="stable")
    ordered, of = values[order], sequence[order]
    n = int(sequence.max()) + 1
    value = _quantile(ordered, np.ones(len(values), np.int64), share)
    present = np.unique(sequence)
    if len(present) < 2:
        return Estimate(value, None)
    rng = np.random.default_rng(_SEED)
    found = np.empty(_RESAMPLES)
    for i in range(_RESAMPLES):
        drawn = np.bincount(rng.choice(present, len(present)), minlength=n)
        found[i] = _quantile(ordered, drawn[of], share)
    # Where the tail is infinite no spread can be told.
    return Estimate(value, float(found.std(ddof=1)) if np.isfinite(found).all() else None)


def _quantile(ordered: np.ndarray, weights: np.ndarray, share: float) -> float:
    """Of ascending values, each counted `weights` times."""
    total = np.cumsum(weights)
    return float(ordered[np.searchsorted(total, math.ceil(share * total[-1]))])


def rounded(x: Any) -> float | None:
    """Six significant digits; None for what JSON cannot hold."""
    return float(f"{x:.6g}") if x is not None and math.isfinite(x) else None
