"""Each filter on a distribution whose answer is known."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest

from mlxq.runtime.sampling import make_sampler

#: Token -> probability; the order is not that of the probabilities.
PROBABILITIES = [0.05, 0.4, 0.1, 0.25, 0.2]


def drawn(n=300, **options):
    sampler = make_sampler(**({"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 3} | options))
    logits = mx.log(mx.array([PROBABILITIES])) + 7
    return [int(sampler(logits).item()) for _ in range(n)]


@pytest.mark.parametrize(
    ("options", "possible"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.64}, {1, 3}),
        ({"top_p": 0.66}, {1, 3, 4}),
        ({"min_p": 0.45}, {1, 3, 4}),
        # After top_k = 2 the two have 0.4 / 0.65 and 0.25 / 0.65.
        ({"top_k": 2, "top_p": 0.6}, {1}),
        ({"top_k": 3, "min_p": 0.6}, {1, 3}),
        # The filters look at the probabilities before the temperature.
        ({"temperature": 100.0, "top_p": 0.64}, {1, 3}),
        ({"temperature": 0.0}, {1}),
    ],
)
def test_filters(options, possible):
    # The rarest possible token has at least 0.05; (1 - 0.05) ** 300 = 2e-7 that it is never drawn.
    assert set(drawn(**options)) == possible


def test_frequencies_follow_the_probabilities():
    n = 2000
    tokens = drawn(n)
    for token, p in enumerate(PROBABILITIES):
        # Four standard deviations of a binomial frequency.
        assert abs(tokens.count(token) / n - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_the_seed_decides():
    assert drawn(50) == drawn(50)
    assert drawn(50) != drawn(50, seed=4)
    assert drawn(5, seed=-1) == drawn(5, seed=2**64 - 1)


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-45, 5e-324])
def test_low_temperatures_take_the_likeliest(temperature):
    assert set(drawn(20, temperature=temperature)) == {1}


def test_one_candidate_is_the_argmax_even_of_equals():
    sampler = make_sampler(temperature=5.0, top_p=1.0, top_k=1, min_p=0.0, seed=3)
    assert {int(sampler(mx.array([[1.0, 4.0, 4.0, 4.0]])).item()) for _ in range(20)} == {1}
