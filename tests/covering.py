"""Which combinations of parameters a sweep runs: all of them, or as many as hold each two values once.

Kernels are compiled for each combination, and that takes the time. A fault of one value, or of two together, shows in
the covering set; that every combination compiles is a test of its own (`metal/test_every_instantiation.py`).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence

import mlx.core as mx
import pytest

#: All combinations run where this says so, and on a Mac, whose compiler is quick.
EVERY = bool(os.environ.get("MLXQ_TEST_EVERY")) or mx.metal.is_available()


def covering(*axes: Sequence) -> list[tuple]:
    """Combinations of one value of each axis in which each two values of two axes come together; `EVERY`: all."""
    every = list(itertools.product(*axes))
    return every if EVERY else pairwise(every)


def pairwise(every: Sequence[tuple]) -> list[tuple]:
    """The first of `every`, then whichever holds most pairs that none before it held, until all pairs are held."""
    missing = set().union(*map(_pairs, every))
    chosen = []
    while missing:
        best = max(every, key=lambda case: len(missing & _pairs(case)))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def quick_first(cases: Iterable, every: int) -> list:
    """The first of each `every` cases; the others are marked slow."""
    return [c if i % every == 0 else pytest.param(c, marks=pytest.mark.slow) for i, c in enumerate(cases)]


def _pairs(case: tuple) -> set[tuple]:
    return set(itertools.combinations(enumerate(case), 2))
