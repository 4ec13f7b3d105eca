"""Float storage: exact widening, IEEE rounding, NaN and infinity."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxq.errors import FormatError
from mlxq.formats import floats

SPECIAL = np.array(
    [
        0.0,
        -0.0,
        1.0,
        -1.0,
        np.inf,
        -np.inf,
        np.finfo(np.float32).max,
        np.finfo(np.float32).tiny,
        1e-45,
        -1e-40,
        65504,
        65520,
    ],
    np.float32,
)


def _mlx_bits(a: np.ndarray) -> np.ndarray:
    with mx.stream(mx.cpu):
        return np.array(mx.array(a).astype(mx.bfloat16).view(mx.uint16))


def test_every_bfloat16_survives_widening_and_narrowing():
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide = floats.bf16_bits_to_float32(bits)
    numbers = ~np.isnan(wide)
    assert np.array_equal(floats.float32_to_bf16_bits(wide)[numbers], bits[numbers])
    assert np.isnan(floats.bf16_bits_to_float32(floats.float32_to_bf16_bits(wide[~numbers]))).all()


def test_narrowing_rounds_halves_to_even():
    # 0x3F80_8000 is halfway between 0x3F80 and 0x3F81: it goes to the even one; one bit more goes up.
    words = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF], np.uint32)
    expected = np.array([0x3F80, 0x3F82, 0x3F81, 0x3F80, 0x7F80], np.uint16)
    assert np.array_equal(floats.float32_to_bf16_bits(words.view(np.float32)), expected)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_narrowing_equals_mlx(words):
    a = np.array(words, np.uint32).view(np.float32)
    assert np.array_equal(floats.float32_to_bf16_bits(a), _mlx_bits(a))


def test_narrowing_equals_mlx_across_chunks():
    a = np.random.default_rng(0).standard_normal((3, 50_000)).astype(np.float32)
    a[1, 7] = np.nan
    assert np.array_equal(floats.float32_to_bf16_bits(a), _mlx_bits(a))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_storage_round_trip(dtype):
    stored = floats.from_float32(SPECIAL, dtype)
    assert stored.dtype == floats.storage_dtype(dtype)
    assert floats.dtype_of(stored) == dtype
    again = floats.from_float32(floats.to_float32(stored, dtype), dtype)
    assert np.array_equal(again.view(np.uint8), stored.view(np.uint8))


def test_float32_is_not_copied():
    assert floats.to_float32(SPECIAL, "F32") is SPECIAL
    assert floats.from_float32(SPECIAL, "F32") is SPECIAL


def test_strided_and_empty_arrays():
    a = np.arange(24, dtype=np.float32).reshape(4, 6)[::2, ::3]
    bits = floats.float32_to_bf16_bits(a)
    assert np.array_equal(floats.bf16_bits_to_float32(bits[:, ::-1]), a[:, ::-1])
    assert floats.float32_to_bf16_bits(np.empty((0, 4), np.float32)).shape == (0, 4)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_all_finite_finds_one_bad_value(dtype, bad):
    a = np.full(200_000, -1.5, np.float32)
    assert floats.all_finite(floats.from_float32(a, dtype))
    a[-1] = bad
    assert not floats.all_finite(floats.from_float32(a, dtype))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: floats.storage_dtype("F8"), ["F8", "F32, F16, BF16"]),
        (lambda: floats.dtype_of(np.zeros(2, np.int32)), ["int32", "BF16"]),
        (lambda: floats.to_float32(np.zeros(2, np.float16), "BF16"), ["BF16", "uint16", "float16"]),
        (lambda: floats.from_float32(np.zeros(2), "F16"), ["float32", "float64"]),
    ],
)
def test_errors_name_both_sides(call, words):
    with pytest.raises(FormatError) as error:
        call()
    assert all(word in str(error.value) for word in words)
