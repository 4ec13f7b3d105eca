"""Estimates and their errors against what many samples show."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlxq.evaluate.quality.statistics import Estimate, mean, perplexity, quantile

RNG = np.random.default_rng(3)


def sampled(n_sequences: int = 24, n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Positive values whose sequences share a factor."""
    values = np.exp(RNG.normal(0, 0.5, (n_sequences, 1)) + RNG.normal(0, 0.5, (n_sequences, n)))
    return values.reshape(-1), np.repeat(np.arange(n_sequences), n)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_bootstrap_error_predicts_the_spread_of_a_quantile(share: float) -> None:
    found = [quantile(*sampled(), share) for _ in range(60)]
    spread = np.std([e.value for e in found], ddof=1)
    # 60 samples tell a deviation to 1/sqrt(120) = 9 %; three of these.
    assert np.sqrt(np.mean([e.se**2 for e in found])) == pytest.approx(spread, rel=0.3)


def test_tokens_of_a_sequence_are_not_taken_for_independent() -> None:
    values, of = sampled()
    assert quantile(values, of, 0.5).se > 1.5 * quantile(values, np.arange(len(values)), 0.5).se
    assert mean(values, of).se > 1.5 * values.std(ddof=1) / math.sqrt(len(values))


def test_quantiles_of_known_values() -> None:
    values, of = np.array([5.0, 1.0, 4.0, 2.0, 3.0]), np.zeros(5, np.int64)
    assert [quantile(values, of, q).value for q in (0.2, 0.5, 0.6, 0.61, 1.0)] == [1, 3, 3, 4, 5]
    assert quantile(values, of, 0.5).se is None


def test_errors_are_the_same_every_time() -> None:
    values, of = sampled()
    assert quantile(values, of, 0.99) == quantile(values, of, 0.99)


def test_perplexity_and_its_error() -> None:
    values, of = sampled()
    m, p = mean(values, of), perplexity(values, of)
    assert p.value == pytest.approx(math.exp(values.mean()))
    assert p.se == pytest.approx(p.value * m.se)
    assert perplexity(np.full(4, 1e4), np.arange(4)).value == math.inf


def test_values_that_are_not_finite_are_null_in_json() -> None:
    assert Estimate(math.inf, None).to_dict() == {"value": None, "standard_error": None}
    values = np.array([1.0, math.inf, 2.0, 3.0])
    assert quantile(values, np.array([0, 0, 1, 1]), 0.99) == Estimate(math.inf, None)
