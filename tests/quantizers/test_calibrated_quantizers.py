"""Searched grids, curvature and error feedback: what they promise, whatever their constants are."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from mlxq.errors import FormatError
from mlxq.formats import affine, crossings, floats
from mlxq.formats.geometry import AFFINE_GROUP_SIZES
from mlxq.quantizers import calibrated, gptq, rtn
from mlxq.quantizers.curvature import Curvature, output_errors
from mlxq.quantizers.grid_search import rounding, search
from mlxq.types import QuantSpec

BITS = (2, 3, 4, 5, 6, 8)
DTYPES = ("F16", "BF16", "F32")


def weights(N: int, K: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((N, K), dtype=np.float32) * np.float32(K**-0.5)


def inputs(rows: int, K: int, seed: int = 1) -> np.ndarray:
    """Correlated, and of uneven sizes, as activations are."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((rows, K)) @ (np.eye(K) + 0.5 * rng.standard_normal((K, K)) * K**-0.5 * 3)
    return (mixed * np.exp(rng.standard_normal(K))).astype(np.float32)


def hessian_of(x: np.ndarray) -> np.ndarray:
    return x.T @ x / np.float32(len(x))


def output_error(w: np.ndarray, w_hat: np.ndarray, hessian: np.ndarray) -> float:
    e = (w - w_hat).astype(np.float64)
    return float(((e @ hessian) * e).sum())


def weighted_error(x: np.ndarray, s: np.ndarray, b: np.ndarray, importance: np.ndarray, bits: int) -> np.ndarray:
    q = np.clip(np.rint((x - b) / s), 0, (1 << bits) - 1)
    return importance @ (x - (q * s + b)) ** 2


@pytest.mark.parametrize("bits", BITS)
def test_a_searched_grid_beats_the_min_max_grid(bits: int) -> None:
    rng = np.random.default_rng(bits)
    x = rng.standard_normal((64, 300)).astype(np.float32)
    importance = np.exp(rng.standard_normal(64)).astype(np.float32)
    low, top = x.min(axis=0), (1 << bits) - 1
    plain = weighted_error(x, (x.max(axis=0) - low) / top, low, importance, bits)
    s, b = search(x, importance, bits, "F32")
    found = weighted_error(x, s, b, importance, bits)
    assert found.sum() < plain.sum()
    # A single group may lose: the search tries few ranges, of many bits the fewest.
    assert (found < 1.1 * plain).mean() > 0.8


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_on_a_grid_survives(bits: int, dtype: str) -> None:
    """Codes with both ends of the range, a scale and a bias that the dtype holds."""
    rng = np.random.default_rng(bits)
    q = rng.integers(0, 1 << bits, (64, 50))
    q[0], q[1] = 0, (1 << bits) - 1
    s = rounding(dtype)(rng.uniform(0.01, 0.1, 50).astype(np.float32))
    b = rounding(dtype)((-(1 << bits) / 2 * s).astype(np.float32))
    x = (q * s + b).astype(np.float32)
    found = search(x, np.ones(64, np.float32), bits, dtype)
    error = np.sqrt(weighted_error(x, *found, np.full(64, 1 / 64, np.float32), bits))
    # The fit meets the line but for the rounding of scale and bias: half a unit of the dtype's last place each.
    step = {"F32": 2.0**-23, "F16": 2.0**-11, "BF16": 2.0**-8}[dtype]
    assert (error <= 4 * step * (1 << bits) * s + 1e-6).all()


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-30, 6e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_groups_survive(value: float, dtype: str) -> None:
    x = np.full((32, 5), rounding(dtype)(np.float32([value]))[0], np.float32)
    s, b = search(x, np.ones(32, np.float32), 4, dtype)
    assert np.isfinite(s).all()
    assert np.isfinite(b).all()
    assert (s != 0).all()
    assert np.array_equal(np.clip(np.rint((x - b) / s), 0, 15) * s + b, x)


@pytest.mark.parametrize("importance", [np.zeros(64), np.r_[np.zeros(63), 1.0], np.full(64, 1e-30), np.full(64, 1e30)])
def test_importance_that_is_zero_or_extreme(importance: np.ndarray) -> None:
    w = weights(40, 128)
    both = np.tile(importance, 2).astype(np.float32)
    q, w_hat = calibrated.quantize(w, QuantSpec(4, 64), "F32", importance=both)
    assert np.isfinite(w_hat).all()
    assert np.array_equal(w_hat, crossings.dequantize(q))
    assert np.abs(w - w_hat).max() < np.ptp(w), "columns of no importance are still weights"


def test_scales_are_numbers_of_their_dtype() -> None:
    for dtype in DTYPES:
        for a in search(weights(64, 9), np.ones(64, np.float32), 3, dtype):
            assert np.array_equal(a, rounding(dtype)(a))


@pytest.mark.parametrize("K", [64, 96, 128, 320])
def test_upper_is_the_factor_of_the_inverse(K: int) -> None:
    h = hessian_of(inputs(2 * K, K))
    c = Curvature.of(h)
    damped = h[np.ix_(c.order, c.order)].astype(np.float64)
    damped[np.diag_indices(K)] += c.damp * np.diagonal(h).astype(np.float64).mean()
    assert np.array_equal(c.upper, np.triu(c.upper))
    # float32 holds U: relative errors of 2^-24, grown by the condition that the damping leaves.
    assert np.allclose(damped @ (c.upper.astype(np.float64).T @ c.upper), np.eye(K), atol=1e-4)
    assert np.array_equal(c.order[c.inverse_order], np.arange(K))


@pytest.mark.parametrize(("K", "sizes"), [(256, (32, 64, 128)), (192, (32, 64)), (96, (32,))])
def test_the_order_keeps_groups_together(K: int, sizes: tuple[int, ...]) -> None:
    order = Curvature.of(hessian_of(inputs(2 * K, K))).order
    assert sorted(order) == list(range(K))
    assert not np.array_equal(order, np.arange(K))
    for size in sizes:
        for start in range(0, K, size):
            assert len({c // size for c in order[start : start + size]}) == 1


def test_columns_with_more_input_come_first() -> None:
    diagonal = np.random.default_rng(0).permutation(128).astype(np.float32) + 1
    order = Curvature.of(np.diag(diagonal)).order
    for start in range(0, 128, 32):
        inside = diagonal[order[start : start + 32]]
        assert (np.diff(inside) < 0).all()
    sums = diagonal[order].reshape(4, 32).sum(axis=1)
    # Halves of 64 first, then quarters inside them.
    assert sums[:2].sum() >= sums[2:].sum()
    assert sums[0] >= sums[1]


def test_hessians_that_are_singular_or_zero() -> None:
    one = np.zeros((64, 64), np.float32)
    one[5, 5] = 3
    x = inputs(3, 64)
    for h in (np.zeros((64, 64), np.float32), one, hessian_of(x), hessian_of(x) * np.float32(1e-30)):
        c = Curvature.of(h)
        assert np.isfinite(c.upper).all()
        assert (np.diagonal(c.upper) > 0).all()
        w_hat = gptq.quantize(weights(9, 64), c, QuantSpec(4, 32), "F32")[1]
        assert np.isfinite(w_hat).all()


def test_hessians_that_are_not_positive_get_more_damping() -> None:
    h = hessian_of(inputs(200, 64))
    h -= np.eye(64, dtype=np.float32) * (np.linalg.eigvalsh(h)[0] + 0.05 * np.diagonal(h).mean())
    assert Curvature.of(h).damp > 0.01
    with pytest.raises(FormatError, match="cannot be factorized"):
        Curvature.of(np.full((64, 64), 1e4, np.float32) * (1 - np.eye(64, dtype=np.float32)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_hessians_that_are_not_finite_are_named(value: float) -> None:
    h = np.eye(64, dtype=np.float32)
    h[3, 3] = value
    with pytest.raises(FormatError, match="not finite"):
        Curvature.of(h)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", AFFINE_GROUP_SIZES)
@pytest.mark.parametrize("dtype", ["BF16", *(pytest.param(d, marks=pytest.mark.slow) for d in ("F16", "F32"))])
def test_decoded_weights_are_those_of_the_packed_codes(bits: int, group_size: int, dtype: str) -> None:
    spec, K = QuantSpec(bits, group_size), 3 * group_size
    w = weights(11, K)
    curvature = Curvature.of(hessian_of(inputs(K, K)))
    for c in (curvature, None):
        q, w_hat = calibrated.quantize(w, spec, dtype, curvature=c)
        assert np.array_equal(w_hat, crossings.dequantize(q))
        assert (q.spec, q.shape, q.dtype) == (spec, w.shape, dtype)
        assert floats.dtype_of(q.scales) == dtype
        assert affine.unpack(q.w_q, bits, K).shape == w.shape
        assert np.abs(w - w_hat).max() < np.ptp(w)


@pytest.mark.parametrize("bits", BITS)
def test_feedback_loses_less_at_the_output_than_search_and_rounding(bits: int) -> None:
    w, x = weights(96, 320), inputs(1500, 320)
    h, spec = hessian_of(x), QuantSpec(bits, 64)
    curvature = Curvature.of(h)
    lost = {
        "rtn": crossings.dequantize(rtn.quantize(w, spec, "BF16")),
        "search": calibrated.quantize(w, spec, "BF16", importance=np.diagonal(h).copy())[1],
        "gptq": calibrated.quantize(w, spec, "BF16", curvature=curvature)[1],
    }
    error = {name: output_error(w, w_hat, h) for name, w_hat in lost.items()}
    assert error["gptq"] < error["search"] < error["rtn"]


@pytest.mark.parametrize("bits", [2, 4])
def test_descent_never_raises_the_error(bits: int) -> None:
    w, h = weights(50, 128), hessian_of(inputs(500, 128))
    curvature, spec = Curvature.of(h), QuantSpec(bits, 32)
    errors = []
    for sweeps in range(4):
        w_hat = gptq.quantize(w, curvature, spec, "F16", sweeps=sweeps)[1]
        errors.append(output_errors((w - w_hat)[:, curvature.order], curvature.hessian))
    for before, after in pairwise(errors):
        # Every row for itself; products in float32.
        assert (after <= before * (1 + 1e-4)).all()
    assert errors[1].sum() < errors[0].sum()


def test_rows_do_not_depend_on_each_other_nor_on_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    w, spec = weights(37, 128), QuantSpec(3, 64)
    curvature = Curvature.of(hessian_of(inputs(400, 128)))
    for c, module in ((curvature, gptq), (None, calibrated)):
        whole = calibrated.quantize(w, spec, "BF16", curvature=c)
        monkeypatch.setattr(module, "_ROWS", 10)
        tiled = calibrated.quantize(w, spec, "BF16", curvature=c)
        # Sums in another order may tip a code that lies between two.
        assert (whole[1] != tiled[1]).mean() < 0.01
        assert np.array_equal(tiled[1], crossings.dequantize(tiled[0]))


def test_already_representable_weights_stay_nearly_as_they_are() -> None:
    spec = QuantSpec(4, 64)
    w = crossings.dequantize(rtn.quantize(weights(20, 128), spec, "F16"))
    curvature = Curvature.of(hessian_of(inputs(400, 128)))
    for c in (curvature, None):
        w_hat = calibrated.quantize(w, spec, "F16", curvature=c)[1]
        # A sixteenth of the range is a code; what is left is the rounding of scale and bias.
        assert np.abs(w - w_hat).max() < 0.1 * np.ptp(w, axis=1).max() / 15


def test_weights_beyond_the_dtype_are_refused() -> None:
    w = weights(4, 64) * np.float32(1e8)
    with pytest.raises(FormatError, match="exceed the range of F16"):
        calibrated.quantize(w, QuantSpec(4, 64), "F16")
    w[0, 0] = np.nan
    with pytest.raises(FormatError, match="NaN or infinite"):
        calibrated.quantize(w, QuantSpec(4, 64), "F32")
