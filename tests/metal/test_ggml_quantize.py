"""The K encoders as Metal kernels beside the NumPy ones: the same search, sums in another order."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxq.errors import BackendError, FormatError
from mlxq.formats import ggml
from mlxq.ops.metal_block_quantize import ENCODED_BITS, block_quantize
from mlxq.quantizers.ggml import asymmetric


def _search(name: str) -> dict:
    search = asymmetric._SEARCHES[name]
    return {"levels": search.levels, "shifts": search.shifts, "factors": search.factors}


def _weights(N: int, K: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    return (rng.standard_t(5, (N, K)) * rng.uniform(0.01, 0.1, (N, 1))).astype(np.float32)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ENCODED_BITS)
def test_blocks_are_those_of_numpy_but_for_ties(metal, name, weighted) -> None:
    w = _weights(12, 512)
    importance = np.random.default_rng(4).uniform(0.1, 3, 512).astype(np.float32) if weighted else None
    ours = np.array(
        block_quantize(mx.array(w), name, None if importance is None else mx.array(importance), **_search(name))
    )
    theirs = asymmetric.quantize(w, name, importance)
    assert ours.shape == theirs.shape
    # A choice between two nearly equal errors may fall otherwise; then a block differs, not its quality.
    assert (ours == theirs).reshape(24, -1).all(axis=1).mean() >= 0.9
    v = np.ones(512) if importance is None else importance.astype(np.float64)
    errors = [(v * (ggml.dequantize(b, name).astype(np.float64) - w) ** 2).sum() for b in (ours, theirs)]
    assert errors[0] <= 1.002 * errors[1]


def test_zeros_and_one_sign(metal) -> None:
    w = np.zeros((3, 256), np.float32)
    w[1], w[2] = 0.5, -np.abs(_weights(1, 256)[0])
    for name in ENCODED_BITS:
        blocks = np.array(block_quantize(mx.array(w), name, **_search(name)))
        w_hat = ggml.dequantize(blocks, name)
        assert not w_hat[0].any()
        # One of a float16's steps, times a code.
        assert np.abs(w_hat[1] - 0.5).max() <= 2**-12
        assert np.abs(w_hat[2] - w[2]).max() <= np.abs(w[2]).max() * 2.0 ** -ENCODED_BITS[name]


@pytest.mark.parametrize("order", ["reverse", "random"])
def test_lane_orders(metal, order) -> None:
    w = mx.array(_weights(3, 256))
    forward = block_quantize(w, "Q5_K", **_search("Q5_K"))
    with metal.options(order=order):
        assert mx.array_equal(block_quantize(w, "Q5_K", **_search("Q5_K")), forward)


def test_bad_input_is_refused_before_a_launch(metal) -> None:
    search = _search("Q4_K")
    with pytest.raises(BackendError, match="no encoder for 'Q6_K'; it has for Q2_K, Q4_K, Q5_K"):
        block_quantize(mx.zeros((1, 256)), "Q6_K", **search)
    for w, importance in (
        (mx.zeros((1, 128)), None),
        (mx.zeros((1, 256), mx.float16), None),
        (mx.zeros((256,)), None),
        (mx.zeros((1, 256)), mx.zeros((128,))),
    ):
        with pytest.raises(FormatError, match="must be float32"):
            block_quantize(w, "Q4_K", importance, **search)
    assert block_quantize(mx.zeros((0, 256)), "Q4_K", **search).shape == (0, 144)
    assert not metal.launches
