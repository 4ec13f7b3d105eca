"""Relative error of a model's hidden states after each block, over a sample of tokens.

`|h - h_ref|^2 / |h_ref|^2`, both sums over all sampled tokens, and its root: the root mean square error in units of the
root mean square of the reference's states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np


class BlockSamples:
    """A reference's hidden states after each block, `[m, hidden]` of the sampled rows."""

    def __init__(self, blocks: Mapping[int, np.ndarray] | None = None):
        self._parts: dict[int, list[np.ndarray]] = {i: [a] for i, a in (blocks or {}).items()}

    def add(self, block: int, places: np.ndarray, hidden: np.ndarray) -> None:
        """An observer of `predictions.run`: rows come in order, so the parts follow one another."""
        self._parts.setdefault(block, []).append(hidden)

    def whole(self) -> dict[int, np.ndarray]:
        """All rows of every block."""
        for parts in self._parts.values():
            parts[:] = [np.concatenate(parts)]
        return {i: parts[0] for i, parts in self._parts.items()}


class BlockErrors:
    """Sums up how far a model's hidden states are from the reference's."""

    def __init__(self, reference: BlockSamples):
        self._reference = reference.whole()
        self._sums: dict[int, np.ndarray] = {}
        self._alike = True

    def add(self, block: int, places: np.ndarray, hidden: np.ndarray) -> None:
        """An observer of `predictions.run`."""
        whole = self._reference.get(block)
        if whole is None or whole.shape[1] != hidden.shape[1]:
            self._alike = False
            return
        expected = whole[places].astype(np.float64)
        difference = hidden - expected
        sums = np.array([np.vdot(difference, difference), np.vdot(expected, expected)])
        self._sums[block] = self._sums.get(block, 0) + sums

    def result(self) -> tuple[float, ...] | None:
        """The error after each block; None where there is no reference, or its blocks do not correspond."""
        if not self._alike or not self._sums or self._sums.keys() != self._reference.keys():
            return None
        pairs = (self._sums[i] for i in sorted(self._sums))
        return tuple(math.sqrt(d / s) if s else math.inf if d else 0.0 for d, s in pairs)
