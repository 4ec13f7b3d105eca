"""Codes of a matrix whose scales, biases and rounding move down a gradient, and are what they are stored as meanwhile.

Every weight has a number that its code is rounded from, every group a step and a centre; gradients pass the rounding as
if it were not there (Cheng et al. 2023, "SignRound": an offset before rounding, at most half a step to either side).
It starts from codes that another method chose: a weight's number is the float weight on the grid where that rounds to
its code, else the nearest that does. Steps are Adam's (Kingma and Ba 2015): relative to the scale for a scale, in steps
of the grid for the rest, so the sizes of the weights do not matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlxq.formats import affine, floats
from mlxq.quantizers.grid_search import rounding
from mlxq.types import QuantizedTensor

#: How far from a code, in steps, a number starts that would round to another.
_EDGE = np.float32(0.49)
#: How far a number moves from where it starts.
_MOST = np.float32(0.5)


@dataclass(frozen=True)
class Rates:
    """Lengths of the first steps: of scales, relative; of centres, and of what codes are rounded from, in grid steps.

    With `codes` 0 the codes stay as they are.
    """

    scales: float
    centres: float
    codes: float


class TunedGrid:
    """A matrix float32 `[..., N, K]` as MLX's affine codes that are being tuned."""

    def __init__(self, q: QuantizedTensor, w: np.ndarray, rates: Rates):
        """Start from codes `q` of float32 weights `w`; what they decode to is unchanged."""
        self._spec, self._dtype, self.shape = q.spec, q.dtype, tuple(q.shape)
        self._rates = rates
        self._middle = np.float32(((1 << q.spec.bits) - 1) / 2)
        self._q = affine.unpack(q.w_q, q.spec.bits, self.shape[-1]).reshape(*q.scales.shape, q.spec.group_size)
        self.scales, self.biases = (floats.to_float32(a, q.dtype) for a in (q.scales, q.biases))
        self._unit = np.array(self.scales)
        self._scale = _Adam(self.scales)
        self._centre = _Adam(self.biases + self._middle * self.scales)
        self._number: _Adam | None = None
        if rates.codes:
            codes = self._q.astype(np.float32)
            start = (w.reshape(codes.shape) - self.biases[..., None]) / self.scales[..., None]
            start = np.clip(start, codes - _EDGE, codes + _EDGE)
            self._number = _Adam(start)
            self._start = start.astype(np.float16)

    def decoded(self) -> np.ndarray:
        """The weights, float32, that the codes stand for now."""
        return (self._q * self.scales[..., None] + self.biases[..., None]).reshape(self.shape)

    def step(self, gradient: np.ndarray, rate: float) -> None:
        """Go down a gradient float32 `[..., N, K]` of what is to be small; `rate` is a share of the first step."""
        g = gradient.reshape(self._q.shape)
        rates, unit = self._rates, self._unit
        of_centre = g.sum(axis=-1)
        of_scale = np.einsum("...k,...k->...", g, self._q) - self._middle * of_centre
        self._scale.step(of_scale * unit, rate * rates.scales, unit)
        self._centre.step(of_centre * unit, rate * rates.centres, unit)
        if self._number is not None:
            self._number.step(g * unit[..., None], rate * rates.codes)
            value = self._number.value
            start = self._start.astype(np.float32)
            np.clip(value, start - _MOST, start + _MOST, out=value)
            self._q = np.clip(np.rint(value), 0, 2 * self._middle).astype(np.uint8)
        to = rounding(self._dtype)
        scales = to(self._scale.value)
        # A step of 0 would make one code of all weights.
        self.scales = np.where(scales == 0, self.scales, scales)
        self.biases = to(self._centre.value - self._middle * self.scales)

    def stored(self) -> QuantizedTensor:
        """The codes and their grid as they are now."""
        codes = affine.pack(np.ascontiguousarray(self._q.reshape(self.shape)), self._spec.bits)
        grid = [floats.from_float32(a, self._dtype) for a in (self.scales, self.biases)]
        return QuantizedTensor(codes, *grid, self._spec, self.shape, self._dtype)


class _Adam:
    """A float32 array that follows the mean of its gradient over the root of the mean of its square."""

    _MEAN, _SQUARE = np.float32(0.9), np.float32(0.99)

    def __init__(self, value: np.ndarray):
        self.value = np.array(value, np.float32)
        self._mean, self._square = np.zeros_like(self.value), np.zeros_like(self.value)
        self._done = 0

    def step(self, gradient: np.ndarray, rate: float, unit: np.ndarray | float = 1.0) -> None:
        """Move by about `rate` times `unit`; what has had no gradient yet stays."""
        self._done += 1
        self._mean += (1 - self._MEAN) * (gradient - self._mean)
        self._square += (1 - self._SQUARE) * (gradient * gradient - self._square)
        mean = self._mean / np.float32(1 - self._MEAN**self._done)
        root = np.sqrt(self._square / np.float32(1 - self._SQUARE**self._done))
        moved = np.divide(mean, root, out=np.zeros_like(mean), where=root > 0)
        self.value -= np.float32(rate) * moved * unit
