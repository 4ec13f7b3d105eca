"""The closed loop over sizes, on divergences that are made up: within the limit, close to it, in few trials."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mlxq.plan.trials import MOST_TRIALS, Trial, next_size, smallest

LEAST, MOST = 2_500_000, 8_500_000


def expected(nbytes: int) -> float:
    """Four times less for each bit more of a million weights."""
    return 4.0 ** -(nbytes / 1e6 - 2.5)


def nbytes_for(nats: float) -> int:
    return int(min(max(1e6 * (2.5 - np.log(nats) / np.log(4)), LEAST), MOST))


def search(limit: float, measured: Callable[[int], float]) -> list[Trial]:
    trials: list[Trial] = []
    while (nbytes := next_size(trials, limit, LEAST, MOST, nbytes_for)) is not None:
        assert LEAST <= nbytes <= MOST
        trials.append(Trial(nbytes, expected(nbytes), measured(nbytes)))
        assert len(trials) <= MOST_TRIALS
    return trials


@pytest.mark.parametrize("limit", [0.5, 0.05, 0.01, 0.001])
@pytest.mark.parametrize("factor", [0.3, 1.0, 1.7, 4.0])
@pytest.mark.parametrize("power", [0.8, 1.0, 1.25])
def test_a_power_of_what_is_expected(limit: float, factor: float, power: float) -> None:
    def measured(nbytes: int) -> float:
        return factor * expected(nbytes) ** power

    trials = search(limit, measured)
    found = smallest(trials, limit)
    if measured(LEAST) <= limit:
        assert found.nbytes == LEAST
        return
    if measured(MOST) > limit:
        assert found is None
        return
    least = next(n for n in range(LEAST, MOST, 1000) if measured(n) <= limit)
    # Two hundredths of the bytes are some six hundredths of the divergence.
    assert found.nbytes <= 1.02 * least


def test_noise_never_makes_it_miss_the_limit() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        limit = float(np.exp(rng.uniform(-7, -1)))
        factor = float(np.exp(rng.normal(0, 0.7)))
        trials = search(limit, lambda n, f=factor: f * expected(n) * float(np.exp(rng.normal(0, 0.1))))
        found = smallest(trials, limit)
        assert found is not None
        assert found.measured <= limit


def test_what_cannot_be_reached_is_known_after_the_largest() -> None:
    trials = search(1e-3, lambda n: 0.1 + expected(n))
    assert smallest(trials, 1e-3) is None
    assert trials[-1].nbytes == MOST
    assert [t.nbytes for t in search(1e-6, lambda n: 1.0)] == [MOST]


def test_a_limit_that_everything_is_within() -> None:
    assert [t.nbytes for t in search(10.0, expected)] == [LEAST]


def test_a_trial_that_is_close_enough_is_the_last() -> None:
    assert next_size([Trial(5_000_000, 0.05, 0.0495)], 0.05, LEAST, MOST, nbytes_for) is None
    assert next_size([Trial(5_000_000, 0.05, 0.0505)], 0.05, LEAST, MOST, nbytes_for) > 5_000_000
