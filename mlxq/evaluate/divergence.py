"""How far one model's predictions are from another's, from logits that arrive in chunks. Pure NumPy.

For every token: KL divergence `sum_v p_v (log p_v - log q_v)` in nats, with p the source's distribution and q the
result's (Kullback and Leibler 1951); whether both put the same token first; the negative log likelihood of the token
that follows, under each.

Tokens of one sequence are not independent, so the standard error takes the sequences as the sample. The mean over
all tokens is a ratio of two sums over sequences, and its error is that of a ratio estimator (Cochran, Sampling
Techniques, 1977, section 6): `se^2 = S / (S - 1) * sum_s (K_s - m n_s)^2 / N^2`, with K_s the sum of a sequence of n_s
tokens, m the mean, N the number of tokens and S of sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Logits worked on at a time, so that float64 temporaries stay in the cache.
_CHUNK = 1 << 17


@dataclass(frozen=True)
class TokenScores:
    """Per token, float64 `[n]`: `kl` in nats, `agree` (1.0 where both put the same token first), and the negative
    log likelihood of the next token under source and result. A logit of negative infinity is a probability of 0; NaN
    where one is NaN or positive infinity."""

    kl: np.ndarray
    agree: np.ndarray
    nll_source: np.ndarray
    nll_result: np.ndarray


@dataclass(frozen=True)
class Divergence:
    """Means over all tokens. `kl_se` is None for a single sequence, which cannot tell an error."""

    kl: float
    kl_se: float | None
    agreement: float
    nll_source: float
    nll_result: float
    n_tokens: int
    n_sequences: int

    @property
    def perplexity_source(self) -> float:
        return _exp(self.nll_source)

    @property
    def perplexity_result(self) -> float:
        return _exp(self.nll_result)


def score_tokens(source: np.ndarray, result: np.ndarray, targets: np.ndarray) -> TokenScores:
    """Compare two models' logits token by token.

    Args:
        source, result: logits `[n, vocabulary]`, any float dtype; computed with in float64.
        targets: `[n]`, the token that follows each position.

    Raises:
        ValueError: shapes that disagree.
    """
    if source.shape != result.shape or source.ndim != 2 or targets.shape != source.shape[:1]:
        raise ValueError(
            f"logits {source.shape} and {result.shape} with targets {targets.shape} do not belong together"
        )
    n, vocabulary = source.shape
    scores = TokenScores(*(np.empty(n) for _ in range(4)))
    step = max(_CHUNK // max(vocabulary, 1), 1)
    for start in range(0, n, step):
        part = slice(start, start + step)
        _score(source[part], result[part], targets[part], scores, part)
    return scores


def _score(source: np.ndarray, result: np.ndarray, targets: np.ndarray, scores: TokenScores, part: slice) -> None:
    rows = np.arange(len(targets))
    with np.errstate(invalid="ignore", over="ignore"):
        a, b = _shifted(source), _shifted(result)
        p = np.exp(a)
        total = p.sum(axis=1)
        log_a, log_b = np.log(total), np.log(np.exp(b).sum(axis=1))
        scores.nll_source[part] = log_a - a[rows, targets]
        scores.nll_result[part] = log_b - b[rows, targets]
        # sum_v p_v (log p_v - log q_v) with log p = a - log_a and log q = b - log_b; never below 0 but for rounding.
        difference = np.subtract(a, b, out=b)
        if not a.min() > -np.inf:
            # What the source rules out adds p log(p / q) = 0, whatever the result says.
            difference[np.isneginf(a)] = 0.0
        kl = np.einsum("ij,ij->i", p, difference) / total - log_a + log_b
    scores.kl[part] = np.maximum(kl, 0.0)
    scores.agree[part] = source.argmax(axis=1) == result.argmax(axis=1)


def _shifted(logits: np.ndarray) -> np.ndarray:
    """Logits in float64, less their largest in each row; all NaN where one is NaN or positive infinity."""
    a = logits.astype(np.float64)
    a -= a.max(axis=1, keepdims=True)
    return a


class Accumulator:
    """Adds up token scores by sequence and gives their means."""

    def __init__(self, n_sequences: int):
        self._sums = np.zeros((4, n_sequences))
        self._counts = np.zeros(n_sequences)

    def add(self, scores: TokenScores, sequence: np.ndarray) -> None:
        """Add the scores of tokens `[n]`, `sequence[i]` being the index of the sequence that token i belongs to."""
        n = len(self._counts)
        self._counts += np.bincount(sequence, minlength=n)
        for total, values in zip(
            self._sums, (scores.kl, scores.agree, scores.nll_source, scores.nll_result), strict=True
        ):
            total += np.bincount(sequence, weights=values, minlength=n)

    def result(self) -> Divergence:
        """Means over everything added.

        Raises:
            ValueError: nothing was added.
        """
        used = self._counts > 0
        n = int(self._counts.sum())
        if n == 0:
            raise ValueError("no tokens were scored")
        kl, agreement, nll_source, nll_result = (float(s) / n for s in self._sums.sum(axis=1))
        error = ratio_standard_error(self._sums[0][used], self._counts[used])
        return Divergence(kl, error, agreement, nll_source, nll_result, n, int(used.sum()))


def ratio_standard_error(sums: np.ndarray, counts: np.ndarray) -> float | None:
    """Standard error of `sums.sum() / counts.sum()` when the sequences are the sample; None for fewer than two.

    Args:
        sums, counts: `[S]`, sum of the values and number of tokens of each sequence.
    """
    n = len(counts)
    if n < 2:
        return None
    mean = sums.sum() / counts.sum()
    residuals = sums - mean * counts
    return float(np.sqrt(n / (n - 1) * (residuals**2).sum()) / counts.sum())


def _exp(x: float) -> float:
    """exp, infinite where it overflows."""
    with np.errstate(over="ignore"):
        return float(np.exp(x))
