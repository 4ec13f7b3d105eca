"""Codes for four formats: no product of a float16 loader is rounded, whatever its formula."""

import numpy as np
import pytest

from mlxq.errors import FormatError
from mlxq.formats import affine
from mlxq.formats.zero_points import integer_grid
from mlxq.quantizers import calibrated, four_way
from mlxq.quantizers.curvature import Curvature
from mlxq.types import QuantSpec


def weights(size):
    """Rows from far below float16's normal numbers to large ones, one of zeros, one without negative weights."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((12, 128)).astype(np.float32) * np.float32(size)
    w[3] = 0
    w[4] = np.abs(w[4]) + 1
    w[5] *= np.float32(1e-6)
    return w


def curvature(K):
    x = np.random.default_rng(1).standard_normal((512, K)).astype(np.float32)
    return Curvature.of(x.T @ x / 512, 0.01, sizes=(32, 64, 128))


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("size", [1e-4, 0.02, 300.0])
@pytest.mark.parametrize("feedback", [False, True])
def test_every_formula_gives_the_same_float16(bits, size, feedback):
    w = weights(size)
    spec = QuantSpec(bits, 64)
    how = {"curvature": curvature(128)} if feedback else {}
    q, w_hat = calibrated.quantize(w, spec, "F16", four_way=True, **how)
    codes = affine.unpack(q.w_q, bits, 128).reshape(12, 2, 64).astype(np.float16)
    s, b = (a[..., None] for a in (q.scales, q.biases))
    zeros = np.rint(-b.astype(np.float32) / s.astype(np.float32)).astype(np.float16)
    assert zeros.min() >= 0
    assert zeros.max() < 1 << bits
    by_zero_point, by_bias = (codes - zeros) * s, codes * s + b
    assert by_zero_point.dtype == by_bias.dtype == np.float16
    np.testing.assert_array_equal(by_zero_point, by_bias)
    np.testing.assert_array_equal(by_zero_point.astype(np.float32).reshape(12, 128), w_hat)
    assert integer_grid(q).exact


@pytest.mark.parametrize("bits", [4, 5])
def test_loses_little_more_than_a_free_grid(bits):
    w = np.random.default_rng(2).standard_normal((64, 512)).astype(np.float32)
    spec = QuantSpec(bits, 64)
    free, bound = (
        np.linalg.norm(calibrated.quantize(w, spec, "F16", four_way=four_way)[1] - w) for four_way in (False, True)
    )
    # Measured 1.08: a zero point moves the grid by up to half a step.
    assert bound < 1.15 * free
    assert bound < np.linalg.norm(calibrated.rounded(w, spec, "F16")[1] - w)


def test_scales_keep_few_bits_and_refuse_what_float16_lacks():
    s = np.float32([0.1, -0.1, 3e-7, 1e-9])
    rounded = four_way.rounded_scales(s, 4)
    mantissa = np.frexp(rounded)[0] * 2**7
    np.testing.assert_array_equal(mantissa, np.rint(mantissa))
    np.testing.assert_allclose(rounded[:2], s[:2], rtol=2.0**-7)
    assert rounded[2] % np.float32(2.0**-24) == 0
    assert rounded[3] == 0
    with pytest.raises(FormatError, match="beyond float16"):
        four_way.rounded_scales(np.float32([8000]), 4)
