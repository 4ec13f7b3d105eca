"""The error of rounded scales, by sums over groups, against decoded weights."""

import dataclasses

import numpy as np
import pytest

from mlxq.formats import crossings, rescaled
from mlxq.formats.affine import pack
from mlxq.formats.floats import from_float32
from mlxq.formats.geometry import AFFINE_BITS, AFFINE_GROUP_SIZES
from mlxq.types import QuantizedTensor, QuantSpec


def tensor(spec, shape=(3, 50, 384), seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << spec.bits, shape, dtype=np.uint8)
    groups = (*shape[:-1], shape[-1] // spec.group_size)
    scales, biases = (rng.normal(0, size, groups).astype(np.float32) for size in (0.01, 0.1))
    return QuantizedTensor(pack(codes, spec.bits), scales, biases, spec, shape, "F32")


def cast(q, dtype):
    scales, biases = (from_float32(a, dtype) for a in (q.scales, q.biases))
    return dataclasses.replace(q, scales=scales, biases=biases, dtype=dtype)


@pytest.mark.parametrize("bits", AFFINE_BITS)
@pytest.mark.parametrize("group_size", AFFINE_GROUP_SIZES)
def test_sums_equal_those_of_decoded_weights(bits, group_size):
    q = tensor(QuantSpec(bits, group_size))
    for dtype in ("F16", "BF16"):
        other = cast(q, dtype)
        w, w_hat = (crossings.dequantize(t).astype(np.float64) for t in (q, other))
        error, size = rescaled.squares(q, other)
        # Decoding rounds each weight by up to 2^-24 of it; the changes are some 2^-10 to 2^-13 of it.
        assert error == pytest.approx(((w_hat - w) ** 2).sum(), rel=1e-2)
        assert size == pytest.approx((w**2).sum(), rel=1e-6)


def test_scales_that_lose_nothing_change_nothing():
    q = cast(tensor(QuantSpec(8, 128)), "BF16")
    widened = [(a.astype(np.uint32) << 16).view(np.float32) for a in (q.scales, q.biases)]
    same = dataclasses.replace(q, scales=widened[0], biases=widened[1], dtype="F32")
    assert rescaled.squares(q, same)[0] == 0
    assert rescaled.squares(q, same)[1] > 0


def test_one_scale_of_many_is_found():
    q = tensor(QuantSpec(4, 32))
    scales = q.scales.copy()
    scales[2, 49, 11] *= 1 + 2**-20
    assert 0 < rescaled.squares(q, dataclasses.replace(q, scales=scales))[0] < 1e-9
