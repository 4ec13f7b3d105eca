"""Bounds: what rounding predicts, measured on random weights; and the bounds' order of size."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlxq import ops
from mlxq.evaluate.bounds import (
    UNRELATED,
    better_than_chance,
    expected_rmse,
    kl_bound,
    largest_rmse,
    noise,
    smallest_step,
    suspicious_kl,
)
from mlxq.formats import affine, floats
from mlxq.formats.geometry import AFFINE_BITS, AFFINE_GROUP_SIZES
from mlxq.types import QuantSpec, TensorInfo


def _round_trip(w: np.ndarray, spec: QuantSpec) -> float:
    scales, biases = affine.choose_qparams(w, spec.bits, spec.group_size)
    codes = affine.quantize(w, scales, biases, spec.bits, spec.group_size)
    w_hat = affine.dequantize(codes, scales, biases, spec.bits, spec.group_size)
    return float(np.linalg.norm(w_hat - w) / np.linalg.norm(w))


@pytest.mark.parametrize("group_size", AFFINE_GROUP_SIZES)
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_expected_error_is_that_of_gaussian_weights(bits: int, group_size: int) -> None:
    w = np.random.default_rng(bits).standard_normal((64, 1024), dtype=np.float32)
    spec = QuantSpec(bits, group_size)
    # The formula allows 0.004 for rounded scales, which float32 scales do not have.
    assert _round_trip(w, spec) == pytest.approx(math.sqrt(expected_rmse(spec) ** 2 - 0.004**2), rel=0.2)


@pytest.mark.parametrize("group_size", AFFINE_GROUP_SIZES)
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_no_weights_exceed_the_largest_error(bits: int, group_size: int) -> None:
    """Groups of one outlier among equal weights, over all sizes of the outlier: the worst there is."""
    rng = np.random.default_rng(1)
    spec = QuantSpec(bits, group_size)
    for size in 2.0 ** np.arange(0, 14, 0.25):
        w = rng.choice([-1.0, 1.0], (16, group_size)).astype(np.float32)
        w[:, 0] = size
        assert _round_trip(w, spec) < largest_rmse(spec)


def _model(bits: int | None, *, head: int | None = 8, embedding: int | None = 8) -> list[TensorInfo]:
    def info(name: str, bits: int | None, module: str = "linear") -> TensorInfo:
        return TensorInfo(name, (64, 64), "AFFINE", 1, QuantSpec(bits, 64) if bits else None, "F16", module)

    blocks = [info(f"model.layers.{i}.mlp.up_proj.weight", bits) for i in range(4)]
    norm = TensorInfo("model.norm.weight", (64,), "F32", 256)
    return [info("model.embed_tokens.weight", embedding, "embedding"), *blocks, norm, info("lm_head.weight", head)]


#: KL in nats per token of round-to-nearest, group 64, on the hardest model met (see the module's docstring).
MEASURED = {8: 0.0055, 6: 0.057, 5: 0.19, 4: 0.87}


@pytest.mark.parametrize("bits", MEASURED)
def test_the_hardest_model_is_well_within_the_bound(bits: int) -> None:
    bound = kl_bound(_model(bits, head=bits, embedding=max(bits, 6)))
    assert 5 * MEASURED[bits] < bound < max(10 * MEASURED[bits], 1.01)


def test_what_predicts_nothing_has_no_bound_unless_nothing_is_rounded() -> None:
    model = _model(8)
    assert math.isinf(kl_bound(model, predicts=False))
    assert kl_bound(model, {t.name for t in model}, predicts=False) < 0.01
    assert better_than_chance(3.0, 320)
    assert not better_than_chance(math.log(320), 320)
    assert not better_than_chance(math.nan, 320)
    assert better_than_chance(50.0, None), "nobody knows"


@pytest.mark.parametrize("dtype", ["F32", "F16"])
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_tiny_weights_err_by_the_smallest_step_at_most(bits: int, dtype: str) -> None:
    """Down to weights that all become 0, the error is one that `largest_rmse` or `smallest_step` allows."""
    spec = QuantSpec(bits, 64)
    w = np.random.default_rng(2).standard_normal((16, 256), dtype=np.float32)
    for size in 2.0 ** np.arange(-40, 0, 1.0):
        scaled = floats.to_float32(floats.from_float32((w * size).astype(np.float32), dtype), dtype)
        w_q, scales, biases = ops.quantize(floats.from_float32(scaled, dtype), bits=bits, group_size=64)
        w_hat = ops.dequantize(w_q, *(floats.to_float32(a, dtype) for a in (scales, biases)), bits=bits, group_size=64)
        error = np.linalg.norm(w_hat - scaled)
        assert error <= max(largest_rmse(spec) * np.linalg.norm(scaled), smallest_step(spec, dtype) * w.size**0.5)


def test_there_is_no_bound_where_rounding_may_do_anything() -> None:
    assert math.isinf(kl_bound(_model(2)))
    assert math.isfinite(suspicious_kl(_model(2))), "the weights are compared all the same"
    assert kl_bound(_model(4)) < UNRELATED


def test_fewer_bits_and_larger_groups_are_noisier() -> None:
    assert noise(_model(3)) > noise(_model(4)) > noise(_model(8)) > noise(_model(None)) > 0
    assert expected_rmse(QuantSpec(4, 128)) > expected_rmse(QuantSpec(4, 32))
    assert noise(_model(8, head=2)) > noise(_model(8, embedding=2)) > noise(_model(8))


def test_a_tied_embedding_counts_as_the_head_too() -> None:
    tied = _model(8, embedding=4)[:-1]
    assert noise(tied) == pytest.approx(noise(_model(8, head=4, embedding=4)))


def test_what_is_taken_over_exactly_has_no_noise() -> None:
    model = _model(4)
    names = {t.name for t in model}
    assert noise(model, names) == 0
    assert 0 < kl_bound(model, names) < 0.01, "then hardly any divergence is honest"
    assert noise(model, names - {"model.layers.0.mlp.up_proj.weight"}) == pytest.approx(
        expected_rmse(QuantSpec(4, 64)) ** 2 / 4
    )
    assert noise(model, names - {"model.norm.weight"}) == expected_rmse(None) ** 2
