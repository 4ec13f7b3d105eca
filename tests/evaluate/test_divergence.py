"""KL, agreement, likelihoods and their standard error, against direct formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlxq.evaluate.divergence import Accumulator, ratio_standard_error, score_tokens

RNG = np.random.default_rng(7)


def _direct_kl(a: np.ndarray, b: np.ndarray) -> float:
    """sum p log(p / q), the softmaxes written out in Python floats."""
    p = [math.exp(x) for x in a]
    q = [math.exp(x) for x in b]
    return sum(x / sum(p) * math.log((x / sum(p)) / (y / sum(q))) for x, y in zip(p, q, strict=True))


def test_kl_and_likelihood_equal_the_direct_formula() -> None:
    source, result = RNG.normal(0, 3, (5, 40)), RNG.normal(0, 3, (5, 40))
    targets = RNG.integers(0, 40, 5)
    scores = score_tokens(source, result, targets)
    for i in range(5):
        # Both are float64 sums of 40 terms of order 1: they agree to some 1e-14.
        assert scores.kl[i] == pytest.approx(_direct_kl(source[i], result[i]), rel=1e-12)
        nll = math.log(sum(math.exp(x) for x in source[i])) - source[i][targets[i]]
        assert scores.nll_source[i] == pytest.approx(nll, rel=1e-12)
    swapped = score_tokens(result, source, targets)
    assert np.array_equal(swapped.nll_result, scores.nll_source)
    assert not np.allclose(swapped.kl, scores.kl), "the divergence has a direction"


def test_known_value() -> None:
    """KL((1/2, 1/2) || (1/4, 3/4)) = log 2 - log(3) / 2."""
    source, result = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    scores = score_tokens(source, result, np.array([0]))
    assert scores.kl[0] == pytest.approx(math.log(2) - math.log(3) / 2, rel=1e-13)
    assert scores.nll_source[0] == pytest.approx(math.log(2))
    assert scores.nll_result[0] == pytest.approx(math.log(4))


def test_identical_logits_diverge_by_exactly_zero() -> None:
    logits = RNG.normal(0, 10, (300, 1000)).astype(np.float32)
    scores = score_tokens(logits, logits.copy(), RNG.integers(0, 1000, 300))
    assert not scores.kl.any()
    assert scores.agree.all()
    assert np.array_equal(scores.nll_source, scores.nll_result)


def test_a_constant_added_to_all_logits_changes_nothing() -> None:
    source, result = RNG.normal(0, 3, (4, 50)), RNG.normal(0, 3, (4, 50))
    targets = np.zeros(4, np.int64)
    kl = score_tokens(source, result, targets).kl
    # Adding 1e4 rounds logits by 1e4 * 2^-53, about 1e-12.
    np.testing.assert_allclose(score_tokens(source + 1e4, result - 1e4, targets).kl, kl, atol=1e-10)


def test_extreme_logits_stay_finite() -> None:
    source, result = np.array([[1000.0, 0.0, -1000.0]]), np.array([[-1000.0, 0.0, 1000.0]])
    scores = score_tokens(source, result, np.array([0]))
    assert scores.kl[0] == 2000
    assert scores.nll_result[0] == 2000
    assert scores.agree[0] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_give_nan(bad: float) -> None:
    source, result = np.zeros((2, 3)), np.zeros((2, 3))
    result[1, 2] = bad
    scores = score_tokens(source, result, np.zeros(2, np.int64))
    assert scores.kl[0] == 0
    assert np.isnan(scores.kl[1])


def test_shapes_that_disagree_are_refused() -> None:
    with pytest.raises(ValueError, match="do not belong together"):
        score_tokens(np.zeros((2, 3)), np.zeros((2, 4)), np.zeros(2, np.int64))


def test_accumulating_in_chunks_is_the_mean_over_tokens() -> None:
    source, result = RNG.normal(0, 1, (30, 20)), RNG.normal(0, 1, (30, 20))
    targets, sequence = RNG.integers(0, 20, 30), np.repeat([0, 1, 2], [5, 10, 15])
    scores = score_tokens(source, result, targets)
    accumulator = Accumulator(3)
    for part in (slice(0, 7), slice(7, 21), slice(21, 30)):
        accumulator.add(score_tokens(source[part], result[part], targets[part]), sequence[part])
    divergence = accumulator.result()
    assert divergence.kl == pytest.approx(scores.kl.mean())
    assert divergence.agreement == pytest.approx(scores.agree.mean())
    assert divergence.perplexity_source == pytest.approx(np.exp(scores.nll_source.mean()))
    assert divergence.perplexity_result == pytest.approx(np.exp(scores.nll_result.mean()))
    assert (divergence.n_tokens, divergence.n_sequences) == (30, 3)


def test_standard_error_of_equal_sequences_is_the_textbook_one() -> None:
    """With equal counts the ratio estimator is the mean of sequence means: s / sqrt(S)."""
    sums = RNG.normal(5, 1, 12)
    expected = (sums / 8).std(ddof=1) / math.sqrt(12)
    assert ratio_standard_error(sums, np.full(12, 8.0)) == pytest.approx(expected)


def test_standard_error_predicts_the_spread_of_the_mean() -> None:
    """Sequences of unequal length whose tokens share an offset: the error must cover the spread between samples."""
    means, errors = [], []
    for _ in range(400):
        counts = RNG.integers(20, 100, 16)
        sums = np.array(
            [RNG.normal(1 + offset, 0.5, n).sum() for offset, n in zip(RNG.normal(0, 1, 16), counts, strict=True)]
        )
        means.append(sums.sum() / counts.sum())
        errors.append(ratio_standard_error(sums, counts))
    # 400 samples tell a standard deviation to 1/sqrt(800) = 3.5 %; the estimator is some percent low for S = 16.
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means), rel=0.2)


def test_a_single_sequence_has_no_standard_error() -> None:
    assert ratio_standard_error(np.array([3.0]), np.array([4.0])) is None


def test_negative_infinity_is_a_probability_of_zero() -> None:
    rng = np.random.default_rng(5)
    source, result = rng.standard_normal((2, 6, 8))
    targets = np.array([0, 1, 2, 3, 0, 1])
    expected = score_tokens(source[:, :4], result[:, :4], targets)
    source[:, 4:] = -np.inf
    result[:, 4:] = -np.inf
    found = score_tokens(source, result, targets)
    for a, b in ((expected.kl, found.kl), (expected.nll_source, found.nll_source), (expected.agree, found.agree)):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    result[0, 5] = 0.0  # only the source rules it out: finite, and further away
    result[1, 3] = -np.inf  # only the result does: infinitely far
    found = score_tokens(source, result, targets)
    assert expected.kl[0] < found.kl[0] < np.inf
    assert found.kl[1] == np.inf
    np.testing.assert_allclose(found.kl[2:], expected.kl[2:], rtol=1e-12)
