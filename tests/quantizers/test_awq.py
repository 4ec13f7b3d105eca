"""Scales to choose from, and the curvature of scaled inputs."""

from __future__ import annotations

import numpy as np
import pytest

from mlxq.quantizers import awq, gptq
from mlxq.quantizers.curvature import Curvature, output_errors
from mlxq.types import QuantSpec


def inputs(rows: int, K: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((rows, K)) @ (np.eye(K) + 1.5 * rng.standard_normal((K, K)) * K**-0.5)
    return (mixed * np.exp(rng.standard_normal(K))).astype(np.float32)


def hessian_of(x: np.ndarray) -> np.ndarray:
    return x.T @ x / np.float32(len(x))


def test_curvature_of_divided_inputs() -> None:
    """The factor is that of the damped Hessian, divided; the order stays."""
    h = hessian_of(inputs(300, 64))
    s = np.exp(np.random.default_rng(0).uniform(-1, 1, 64)).astype(np.float32)
    curvature = Curvature.of(h)
    scaled = curvature.scaled(s)
    assert np.array_equal(scaled.order, curvature.order)
    assert np.array_equal(np.triu(scaled.upper), scaled.upper)
    damped = h.astype(np.float64) + curvature.damp * np.diagonal(h).mean() * np.eye(64)
    divided = (damped / np.outer(s, s))[np.ix_(curvature.order, curvature.order)]
    product = scaled.upper.T.astype(np.float64) @ scaled.upper @ divided
    # Single precision, times a condition of some thousand.
    assert np.abs(product - np.eye(64)).max() < 1e-3
    back = scaled.scaled(1 / s)
    assert np.allclose(back.hessian, curvature.hessian, rtol=1e-5)
    assert np.allclose(back.upper, curvature.upper, rtol=1e-5)


@pytest.mark.parametrize("shape", [(64,), (3, 64)])
def test_candidates_are_positive_and_even(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    sizes, weights = np.exp(0.5 * rng.standard_normal((2, *shape)))
    found = list(awq.candidates(sizes, weights, None))
    assert len(found) >= 3
    for s in found:
        assert s.shape == shape
        assert np.allclose(np.log(s).mean(axis=-1), 0, atol=1e-6)
        assert not np.allclose(s, 1)
    grows = [np.corrcoef(np.log(s).reshape(-1, 64)[0], np.log(sizes).reshape(-1, 64)[0])[0, 1] for s in found]
    assert max(grows) == pytest.approx(1)


def test_candidates_of_what_is_nothing_or_huge_stay_within_bounds() -> None:
    sizes = np.ones(64)
    sizes[:2] = 0, 1e30
    for s in awq.candidates(sizes, np.zeros(64), Curvature.of(hessian_of(inputs(100, 64)))):
        assert np.isfinite(s).all()
        assert (s >= 1 / 16).all()
        assert (s <= 16).all()


def test_scales_save_what_a_few_large_inputs_lose() -> None:
    """Few channels carry nearly all, in groups of many that matter little: what AWQ is about."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2000, 128)).astype(np.float32)
    x[:, ::16] *= 30
    w = rng.standard_normal((64, 128)).astype(np.float32)
    h, spec = hessian_of(x), QuantSpec(3, 64)
    curvature = Curvature.of(h)

    def lost(s: np.ndarray) -> float:
        s = s.astype(np.float32)
        w_hat = gptq.quantize(w * s, curvature.scaled(s), spec, "F32", sweeps=0)[1]
        return float(output_errors((w * s - w_hat) / s, h).sum())

    plain = lost(np.ones(128))
    rms = np.sqrt(np.diagonal(h))
    assert min(lost(s) for s in awq.candidates(rms, np.ones(128), curvature)) < 0.9 * plain
