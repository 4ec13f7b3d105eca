"""Codes that go down a gradient: where they start, how far they go, what is stored."""

from __future__ import annotations

import numpy as np
import pytest

from mlxq.formats import affine, crossings
from mlxq.quantizers import calibrated
from mlxq.quantizers.tuned_grid import Rates, TunedGrid
from mlxq.types import QuantizedTensor, QuantSpec

RATES = Rates(scales=1e-3, centres=1e-2, codes=1e-2)
#: Numbers start within 0.49 of their codes, and move by half a step at most.
MOVED = 1


def weights(seed: int = 0, shape: tuple[int, int] = (16, 128)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def codes_of(q: QuantizedTensor) -> np.ndarray:
    return affine.unpack(q.w_q, q.spec.bits, q.shape[-1]).astype(int)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_it_starts_from_the_codes_of_any_method(bits: int, dtype: str) -> None:
    w = weights()
    # Codes that rounding to nearest would not choose.
    q, _ = calibrated.quantize(w[::-1].copy(), QuantSpec(bits, 64), dtype)
    grid = TunedGrid(q, w, RATES)
    assert (grid.decoded() == crossings.dequantize(q)).all()
    stored = grid.stored()
    for part in ("w_q", "scales", "biases"):
        assert (getattr(stored, part) == getattr(q, part)).all()
    # Nothing to go down: nothing moves but what float32 loses of a centre.
    grid.step(np.zeros_like(w), 1.0)
    assert (codes_of(grid.stored()) == codes_of(q)).all()


@pytest.mark.parametrize("bits", [2, 4])
def test_it_goes_down_and_stays_what_is_stored(bits: int) -> None:
    w = weights(1)
    # Errors that add up in sums of columns: rounding to nearest knows nothing of them.
    x = np.random.default_rng(2).standard_normal((256, 8), dtype=np.float32) @ weights(3, (8, 128))
    hessian = x.T @ x / len(x)
    q, w_hat = calibrated.rounded(w, QuantSpec(bits, 64), "BF16")
    grid = TunedGrid(q, w, Rates(1e-3, 1e-2, 1e-2))

    def loss(w_hat: np.ndarray) -> float:
        return float(np.einsum("nk,kl,nl->", w_hat - w, hessian, w_hat - w))

    for i in range(60):
        grid.step((grid.decoded() - w) @ hessian, 1 - i / 60)
    assert loss(grid.decoded()) < 0.5 * loss(w_hat)
    stored = grid.stored()
    assert (crossings.dequantize(stored) == grid.decoded()).all()
    moved = np.abs(codes_of(stored) - codes_of(q))
    assert moved.any()
    assert moved.max() <= MOVED


def test_codes_stay_where_their_rate_is_0() -> None:
    w = weights(4)
    q, _ = calibrated.rounded(w, QuantSpec(3, 32), "F16")
    grid = TunedGrid(q, w, Rates(1e-2, 1e-1, 0.0))
    grid.step(weights(5), 1.0)
    stored = grid.stored()
    assert (stored.w_q == q.w_q).all()
    assert not (stored.scales == q.scales).all()


def test_stacks_are_tuned_as_their_matrices_are() -> None:
    w, g = weights(6, (8, 64)), weights(7, (8, 64))
    q, _ = calibrated.rounded(w, QuantSpec(2, 32), "F16")
    stack = QuantizedTensor(*(np.stack([a, a]) for a in (q.w_q, q.scales, q.biases)), q.spec, (2, 8, 64), "F16")
    one, two = TunedGrid(q, w, RATES), TunedGrid(stack, np.stack([w, w]), RATES)
    for _ in range(3):
        one.step(g, 1.0)
        two.step(np.stack([g, np.zeros_like(g)]), 1.0)
    assert (two.decoded()[0] == one.decoded()).all()
    assert (codes_of(two.stored())[1] == codes_of(q)).all()
