"""Affine grids as integer zero points: the same weights where the grid has them, a refusal where it is far from it."""

import numpy as np
import pytest

from mlxq.errors import FormatError
from mlxq.formats import affine, crossings
from mlxq.formats.floats import from_float32
from mlxq.formats.zero_points import decoded, integer_grid
from mlxq.quantizers import rtn
from mlxq.types import QuantizedTensor, QuantSpec

N, K, GROUP = 8, 128, 32


def tensor(codes, scales, biases, bits=4, dtype="F16"):
    stored = [from_float32(np.asarray(a, np.float32), dtype) for a in (scales, biases)]
    return QuantizedTensor(affine.pack(codes, bits), *stored, QuantSpec(bits, GROUP), codes.shape, dtype)


@pytest.fixture
def parts():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (N, K), dtype=np.uint8)
    scales = rng.integers(1, 100, (N, K // GROUP)) / 1024 * rng.choice([-1, 1], (N, K // GROUP))
    return codes, scales.astype(np.float32), rng.integers(1, 16, scales.shape)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_a_grid_with_integer_zero_points_stays_as_it_is(parts, dtype):
    codes, scales, zeros = parts
    q = tensor(codes, scales, -zeros * scales, dtype=dtype)
    grid = integer_grid(q, 1)
    np.testing.assert_array_equal(grid.codes, codes)
    np.testing.assert_array_equal(grid.zero_points, zeros)
    np.testing.assert_array_equal(grid.scales.astype(np.float32), scales)
    if dtype != "BF16":
        assert grid.exact
        np.testing.assert_array_equal(decoded(grid), crossings.dequantize(q))


def test_biases_that_were_rounded_give_back_their_scales(parts):
    codes, scales, zeros = parts
    odd = from_float32(scales * np.float32(1.0478515625), "F16").astype(np.float32)
    grid = integer_grid(tensor(codes, odd, -zeros * odd))
    np.testing.assert_array_equal(grid.scales.astype(np.float32), odd)
    np.testing.assert_array_equal(grid.zero_points, zeros)
    assert not grid.exact


def test_a_zero_point_of_0_is_mirrored_where_it_must_not_be(parts):
    codes, scales, zeros = parts
    zeros[2, 1] = 0
    q = tensor(codes, scales, -zeros * scales)
    assert integer_grid(q, 0).zero_points[2, 1] == 0
    grid = integer_grid(q, 1)
    assert grid.exact
    assert grid.zero_points[2, 1] == 15
    np.testing.assert_array_equal(decoded(grid), crossings.dequantize(q))


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_groups_of_one_value_need_no_zero_point(parts, value):
    codes, scales, zeros = parts
    biases = -zeros * scales
    codes[1, :GROUP], scales[1, 0], biases[1, 0] = 3, 2.0**-20, value - 3 * 2.0**-20 if value else -3 * 2.0**-20
    scales[4, 2], biases[4, 2], codes[4, 2 * GROUP : 3 * GROUP] = 0, value, 0
    q = tensor(codes, scales, biases, dtype="F32")
    grid = integer_grid(q, 1)
    assert grid.exact
    assert (grid.scales != 0).all()
    np.testing.assert_array_equal(decoded(grid)[[1, 4]][:, [0, 2 * GROUP]], crossings.dequantize(q)[[1, 4]][:, [0, 64]])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_what_rounding_to_nearest_makes_changes_little(bits, dtype):
    w = np.random.default_rng(1).standard_normal((16, 256)).astype(np.float32)
    q = rtn.quantize(from_float32(w, dtype), QuantSpec(bits, 64), dtype)
    grid, w_hat = integer_grid(q, 1), crossings.dequantize(q)
    # The scale was rounded: by 2^-9 of itself in bfloat16, times at most 2^bits steps to the far end. It is fitted.
    eps = 2.0**-9 if dtype == "BF16" else 2.0**-12
    step = np.repeat(np.abs(grid.scales.astype(np.float32)), 64, axis=1)
    assert (np.abs(decoded(grid) - w_hat) <= 2 * eps * (1 << bits) * step + 2.0**-10 * np.abs(w_hat)).all()


def test_other_grids_are_refused_with_what_to_do(parts):
    codes, scales, zeros = parts
    biases = -zeros * scales
    biases[3, 1] -= scales[3, 1] * 0.4
    with pytest.raises(FormatError, match=r"1 of 32 groups have no integer zero point.*--recipe four-way"):
        integer_grid(tensor(codes, scales, biases))
    biases[3, 1] = -16 * scales[3, 1]
    with pytest.raises(FormatError, match=r"one would be 16\)"):
        integer_grid(tensor(codes, scales, biases))


def test_scales_that_float16_lacks_are_refused(parts):
    codes, scales, zeros = parts
    with pytest.raises(FormatError, match="beyond float16"):
        integer_grid(tensor(codes, scales * 2.0**24, -zeros * scales * 2.0**24, dtype="F32"))
    scales[0, 0] = np.nan
    with pytest.raises(FormatError, match="NaN"):
        integer_grid(tensor(codes, scales, -zeros * scales))
