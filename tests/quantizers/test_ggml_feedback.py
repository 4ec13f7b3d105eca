"""Error feedback into ggml's blocks: decoded bit for bit, and less output error than the encoders leave."""

import gguf
import numpy as np
import pytest

from mlxq.errors import FormatError
from mlxq.formats import ggml
from mlxq.formats.geometry import block_format
from mlxq.quantizers import ggml as encoders
from mlxq.quantizers.curvature import Curvature
from mlxq.quantizers.ggml import feedback
from mlxq.quantizers.ggml.block_types import SIZES, TYPES

N, K = 48, 512


def weights(n=N, k=K, seed=0):
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def hessian(k=K, seed=1):
    """Of correlated inputs, some channels of which are ten times as large as others."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * k, k // 4)) @ rng.standard_normal((k // 4, k)) + rng.standard_normal((4 * k, k))
    x *= np.exp(rng.normal(0, 1, k))
    return (x.T @ x / len(x)).astype(np.float32)


def curvature(h):
    return Curvature.of(h, sizes=SIZES)


def output_error(w, w_hat, h):
    e = (w - w_hat).astype(np.float64)
    return float(np.einsum("nk,nk->", e @ h.astype(np.float64), e))


@pytest.fixture(scope="module")
def inputs():
    h = hessian()
    return h, curvature(h)


def test_every_type_that_is_searched_has_error_feedback():
    assert set(TYPES) == {n for n in encoders.ENCODABLE if block_format(n).block_size > 1}


@pytest.mark.parametrize("sweeps", [0, 1])
@pytest.mark.parametrize("name", TYPES)
def test_blocks_decode_to_the_weights_that_are_given_back(name, sweeps, inputs):
    blocks, w_hat = feedback.quantize(weights(), inputs[1], name, sweeps=sweeps)
    format = block_format(name)
    assert blocks.dtype == np.uint8
    assert blocks.shape == (N, K // format.block_size * format.type_size)
    np.testing.assert_array_equal(ggml.dequantize(blocks, name), w_hat)
    np.testing.assert_array_equal(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name]), w_hat)


@pytest.mark.parametrize("name", TYPES)
def test_output_errors_are_smaller_than_the_encoders(name, inputs):
    h, c = inputs
    w = weights()
    plain = ggml.dequantize(encoders.quantize(w, name, np.diagonal(h).copy(), backend="numpy"), name)
    errors = [output_error(w, feedback.quantize(w, c, name, sweeps=n)[1], h) for n in (0, 1, 2)]
    # Three quarters of the inputs' energy is shared between columns. 0.45 at most was measured, Q2_K's.
    assert errors[0] < 0.6 * output_error(w, plain, h)
    # Descent makes the error under the damped Hessian smaller, by a tenth in each first round.
    assert errors[1] < 0.97 * errors[0]
    assert errors[2] < errors[1]


@pytest.mark.parametrize("name", ["Q4_K", "Q3_K", "Q4_0", "Q4_1", "IQ4_XS"])
def test_rows_are_independent(name, inputs, monkeypatch):
    """Of their order, too: a GGUF file has the rows of some matrices in another one."""
    w = weights()
    blocks, w_hat = feedback.quantize(w, inputs[1], name)
    order = np.random.default_rng(4).permutation(N)
    monkeypatch.setattr(feedback, "_ROWS", 7)
    again, w_again = feedback.quantize(w[order], inputs[1], name)
    # Sums of products in another order may round a weight between two values the other way; hardly any.
    assert (w_again != w_hat[order]).mean() < 0.02
    relative = output_error(w, w_again[np.argsort(order)], inputs[0]) / output_error(w, w_hat, inputs[0])
    assert relative == pytest.approx(1, abs=0.01)
    assert again.shape == blocks.shape


@pytest.mark.parametrize("name", TYPES)
def test_the_same_input_gives_the_same_bytes_and_stays(name, inputs):
    w = weights(8)
    before = w.copy()
    np.testing.assert_array_equal(feedback.quantize(w, inputs[1], name)[0], feedback.quantize(w, inputs[1], name)[0])
    np.testing.assert_array_equal(w, before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zeros", "constant", "tiny", "outlier", "one sided"])
@pytest.mark.parametrize("name", TYPES)
def test_unusual_weights(name, kind, inputs):
    w = weights(6)
    if kind == "zeros":
        w[:, :256] = 0
        w[0] = 0
    elif kind == "constant":
        w[...] = -0.25
    elif kind == "tiny":
        w *= 1e-9
    elif kind == "outlier":
        w *= 1e-3
        w[:, 7] = 8
    else:
        w = np.abs(w) + 2
    blocks, w_hat = feedback.quantize(w, inputs[1], name)
    assert np.isfinite(w_hat).all()
    np.testing.assert_array_equal(ggml.dequantize(blocks, name), w_hat)
    if kind == "zeros":
        assert not w_hat[0].any()
    # No weight becomes larger than twice the largest, or than a step of the smallest float16.
    assert np.abs(w_hat).max() <= max(2 * np.abs(w).max(), 2.0**-24 * 128 * 127)


def test_channels_without_input_cost_nothing():
    h = hessian()
    h[:, 300:310] = h[300:310] = 0
    w = weights(8)
    w_hat = feedback.quantize(w, curvature(h), "Q4_K")[1]
    assert np.isfinite(w_hat).all()
    assert output_error(w, w_hat, h) < 0.01 * output_error(w, 0 * w, h)


@pytest.mark.slow
@pytest.mark.parametrize("k", [32, 96, 288])
@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"])
def test_rows_that_are_no_super_blocks(name, k):
    h = hessian(k)
    w = weights(8, k)
    blocks, w_hat = feedback.quantize(w, curvature(h), name)
    np.testing.assert_array_equal(ggml.dequantize(blocks, name), w_hat)
    plain = ggml.dequantize(encoders.quantize(w, name, np.diagonal(h).copy(), backend="numpy"), name)
    assert output_error(w, w_hat, h) < output_error(w, plain, h)


def test_what_cannot_be_encoded_is_refused(inputs):
    w = weights(2)
    with pytest.raises(FormatError, match="'IQ2_XS' has no error feedback: the types that have it are Q2_K"):
        feedback.quantize(w, inputs[1], "IQ2_XS")
    with pytest.raises(FormatError, match="Q4_K: a row is whole blocks of 256 weights, got 288"):
        feedback.quantize(weights(2, 288), curvature(hessian(288)), "Q4_K")
    with pytest.raises(FormatError, match="Q4_K: the curvature's order does not keep 256 columns together"):
        feedback.quantize(w, Curvature.of(inputs[0], sizes=(32,)), "Q4_K")


@pytest.mark.parametrize("name", TYPES)
def test_weights_beyond_the_type_are_refused(name, inputs):
    with pytest.raises(FormatError, match=rf"{name}: (its float16 steps cannot hold weights|a weight is)"):
        feedback.quantize(weights(2) * np.float32(1e9), inputs[1], name)
