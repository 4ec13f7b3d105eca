"""The portable quantizer: what it makes are blocks of ggml's, bit for bit, in any dtype and at any magnitude."""

import numpy as np
import pytest

from mlxq.errors import FormatError
from mlxq.formats import crossings, floats, ggml
from mlxq.quantizers import portable
from mlxq.types import QuantSpec


def weights(kind, shape, magnitude):
    rng = np.random.default_rng(5)
    w = rng.normal(0, 1, shape)
    if kind == "constant":
        w[...] = -1
    elif kind == "zeros":
        w[..., :64] = 0
    elif kind == "outlier":
        w *= 1e-4
        w[..., 7] = 1
    elif kind == "alternating":
        w[..., ::2], w[..., 1::2] = -1, 1
    elif kind == "far from zero":
        w = np.abs(w) + 3
    return (w / np.abs(w).max() * magnitude).astype(np.float32)


@pytest.mark.parametrize("kind", ["normal", "constant", "zeros", "outlier", "alternating", "far from zero"])
@pytest.mark.parametrize("bits", [4, 5, 8])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_both_containers_decode_to_the_same_weights(kind, bits, dtype):
    for K in (256, 288):
        # From below the smallest step to near the largest offset: 128 steps of 8 bits reach 65504.
        for magnitude in (1e-9, 1e-7, 1e-5, 1e-2, 1.0, 6e4):
            w = weights(kind, (2, 3, K), magnitude)
            q = portable.quantize(w, QuantSpec(bits, 32), dtype)
            name = portable.block_type(q.spec, K)
            assert name in crossings.exact_types(q), (K, magnitude)
            blocks = crossings.from_affine(q, name)
            np.testing.assert_array_equal(ggml.dequantize(blocks, name), crossings.dequantize(q))


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("magnitude", [3e-6, 2e-5, 6e-5, 1e-3])
def test_the_largest_weight_has_an_8_bit_code_however_few_bits_its_step_has(dtype, magnitude):
    w = weights("normal", (4, 64), magnitude)
    w_hat = crossings.dequantize(portable.quantize(w, QuantSpec(8, 32), dtype))
    # Half a step, which is at most one part in 127 and two of 2^-7 larger than ideal, or the smallest float16.
    steps = np.maximum(np.abs(w).reshape(4, 2, 32).max(-1) / 127 * (1 + 2**-6), 2.0**-24)
    steps = np.where(steps < 2.0**-14, np.ceil(steps * 2**24) / 2**24, steps)
    assert (np.abs(w_hat - w).reshape(4, 2, 32).max(-1) <= 0.5001 * steps).all()


def test_scales_beyond_their_dtype_are_refused():
    """Q4_K's steps are 63 times the largest float16, MLX's scale is a float16 itself."""
    w = weights("normal", (2, 256), 3e6)
    with pytest.raises(FormatError, match="exceed F16"):
        portable.quantize(w, QuantSpec(4, 32), "F16")
    assert floats.all_finite(portable.quantize(w, QuantSpec(4, 32), "F32").scales)
