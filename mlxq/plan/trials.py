"""The smallest size whose measured divergence is at most a limit: which size to try next. Pure.

A divergence is expected of every size; what is measured goes with it as a power, which is fitted to the two trials
nearest to the limit. Sizes that passed and sizes that failed close in on the answer from both sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: Conversions that are made at most.
MOST_TRIALS = 5
#: A result whose divergence is above this share of the limit is as small as it gets, nearly: a tenth of a divergence
#: is a hundredth of the bytes.
_CLOSE = 0.93
#: Share of the limit that is aimed at, and again for each trial that failed.
_AIM, _AFTER_FAILURE = 0.97, 0.95
#: Sizes nearer to one another than this share are not told apart.
_APART = 0.005
#: Powers of the expected divergence that a fit may have.
_POWERS = 0.5, 2.0


@dataclass(frozen=True)
class Trial:
    """One result: the bytes that it was allowed, and its divergence, expected and measured, in nats per token."""

    nbytes: int
    expected: float
    measured: float


def smallest(trials: Sequence[Trial], limit: float) -> Trial | None:
    """The smallest that is within the limit."""
    return min((t for t in trials if t.measured <= limit), key=lambda t: t.nbytes, default=None)


def next_size(
    trials: Sequence[Trial], limit: float, least: int, most: int, nbytes_for: Callable[[float], int]
) -> int | None:
    """Bytes to try next, or None where nothing more is to be gained.

    The last trial that is allowed, if none was within the limit, is of the most bytes there are.

    Args:
        trials: so far.
        limit: nats per token.
        least, most: bytes that there can be.
        nbytes_for: the fewest bytes of which so many nats are expected.
    """
    if not trials:
        return min(max(nbytes_for(_AIM * limit), least), most)
    best = smallest(trials, limit)
    failed = [t for t in trials if t.measured > limit]
    worst = max(failed, key=lambda t: t.nbytes, default=None)
    if best is None and worst.nbytes >= most:
        return None
    if len(trials) >= MOST_TRIALS or (best is not None and (best.measured >= _CLOSE * limit or best.nbytes <= least)):
        return None
    low, high = (worst.nbytes if worst else least), (best.nbytes if best else most)
    if best is not None and high - low <= _APART * high:
        return None
    if best is None and (len(trials) == MOST_TRIALS - 1 or high - low <= _APART * high):
        return most
    wanted = nbytes_for(_expected_at(trials, limit, _AIM * limit * _AFTER_FAILURE ** len(failed)))
    margin = max(int(_APART * high / 2), 1)
    if low < wanted < high:
        return min(max(wanted, low + margin), high - margin) if best else wanted
    return least if worst is None else most if best is None else (low + high) // 2


def _expected_at(trials: Sequence[Trial], limit: float, aim: float) -> float:
    """The expected divergence at which `aim` is likely measured."""

    def distance(t: Trial) -> float:
        return abs(math.log(max(t.measured, 1e-30) / limit))

    first, *others = sorted((t for t in trials if t.expected > 0), key=distance) or [Trial(0, aim, aim)]
    power = 1.0
    if others and others[0].expected != first.expected:
        rise = math.log(max(others[0].measured, 1e-30) / max(first.measured, 1e-30))
        power = min(max(rise / math.log(others[0].expected / first.expected), _POWERS[0]), _POWERS[1])
    return first.expected * (aim / max(first.measured, 1e-30)) ** (1 / power)
