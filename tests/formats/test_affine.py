"""The affine reference against mx.quantize and mx.dequantize on the CPU, bit for bit, and its own invariants."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxq.errors import FormatError
from mlxq.formats import affine
from mlxq.formats.floats import bf16_bits_to_float32, from_float32, to_float32
from mlxq.formats.geometry import AFFINE_BITS, AFFINE_GROUP_SIZES

DTYPES = ("F32", "F16", "BF16")
LARGEST = {
    "F32": float(np.finfo(np.float32).max),
    "F16": 65504.0,
    "BF16": float(bf16_bits_to_float32(np.uint16([0x7F7F]))[0]),
}


def to_mlx(a: np.ndarray) -> mx.array:
    return mx.array(a).view(mx.bfloat16) if a.dtype == np.uint16 else mx.array(a)


def from_mlx(a: mx.array) -> np.ndarray:
    return np.array(a.view(mx.uint16)) if a.dtype == mx.bfloat16 else np.array(a)


def mlx_quantize(w: np.ndarray, bits: int, group_size: int) -> list[np.ndarray]:
    with mx.stream(mx.cpu):
        return [from_mlx(a) for a in mx.quantize(to_mlx(w), group_size=group_size, bits=bits)]


def mlx_dequantize(w_q, scales, biases, bits: int, group_size: int) -> np.ndarray:
    with mx.stream(mx.cpu):
        return from_mlx(mx.dequantize(to_mlx(w_q), to_mlx(scales), to_mlx(biases), group_size=group_size, bits=bits))


def reference_quantize(w: np.ndarray, dtype: str, bits: int, group_size: int) -> list[np.ndarray]:
    scales, biases = affine.choose_qparams(w, bits, group_size)
    w_q = affine.pack(affine.quantize(w, scales, biases, bits, group_size), bits)
    return [w_q, from_float32(scales, dtype), from_float32(biases, dtype)]


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray, dtype: str | None = None) -> None:
    """Equal bits; NaN equals NaN, whose payload no format defines."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    different = ours.view(f"u{ours.itemsize}") != theirs.view(f"u{theirs.itemsize}")
    if dtype:
        different &= ~(np.isnan(to_float32(ours, dtype)) & np.isnan(to_float32(theirs, dtype)))
    assert not different.any(), f"first difference at {np.argwhere(different)[0]}"


def edge_groups(dtype: str, group_size: int) -> np.ndarray:
    """One row for each named kind of group that a formula could get wrong."""
    rng = np.random.default_rng(1)
    top, normal = LARGEST[dtype], rng.standard_normal(group_size)
    one_spike = np.zeros(group_size)
    one_spike[3] = 7
    groups = {
        "all zero": np.zeros(group_size),
        "negative zeros": np.full(group_size, -0.0),
        "zeros of both signs": rng.choice([0.0, -0.0], group_size),
        "constant": np.full(group_size, 1.5),
        "negative constant": np.full(group_size, -2.25),
        "constant around the smallest step": np.full(group_size, 1e-7),
        "constant below half of it": np.full(group_size, -4e-8),
        "all negative": -np.abs(normal),
        "all positive": np.abs(normal),
        "far from zero": 5 + 0.01 * normal,
        "one spike": one_spike,
        "one negative spike": -one_spike,
        "integers": rng.integers(-8, 8, group_size),
        "small": 1e-3 * normal,
        "tiny": 1e-30 * normal,
        "denormal": 1e-40 * normal,
        "a few denormals": 1e-44 * rng.integers(-3, 4, group_size),
        "large": 1e3 * normal,
        "the largest": np.full(group_size, top),
        "the largest, negative": np.full(group_size, -top),
        "huge": rng.uniform(0, top, group_size),
        "huge, range just fits": rng.uniform(-top / 2.01, top / 2.01, group_size),
        "huge, range overflows float32": rng.uniform(-top, top, group_size),
        "only the extremes": rng.choice([top, -top, 0.0], group_size),
    }
    return from_float32(np.array(list(groups.values())).astype(np.float32), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", AFFINE_GROUP_SIZES)
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_reference_equals_mlx_on_edge_and_ordinary_groups(dtype, group_size, bits):
    rng = np.random.default_rng(bits * group_size)
    ordinary = from_float32(rng.standard_normal((500, group_size)).astype(np.float32), dtype)
    w = np.concatenate([edge_groups(dtype, group_size), ordinary])
    ours, theirs = reference_quantize(w, dtype, bits, group_size), mlx_quantize(w, bits, group_size)
    for a, b in zip(ours, theirs, strict=True):
        assert_same_bits(a, b)
    codes = affine.unpack(ours[0], bits, group_size)
    w_hat = affine.dequantize(codes, *ours[1:], bits, group_size)
    assert_same_bits(w_hat, mlx_dequantize(*ours, bits, group_size), dtype)


@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    bits=st.sampled_from(AFFINE_BITS),
    group_size=st.sampled_from(AFFINE_GROUP_SIZES),
    data=st.data(),
)
def test_reference_equals_mlx_on_any_finite_bits(dtype, bits, group_size, data):
    top = LARGEST[dtype]
    value = st.floats(-top, top, width=32, allow_subnormal=True)
    pool = data.draw(st.lists(value, min_size=1, max_size=8))
    picks = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1))).integers(0, len(pool), (3, 2 * group_size))
    w = from_float32(np.array(pool, np.float32)[picks], dtype)
    ours = reference_quantize(w, dtype, bits, group_size)
    for a, b in zip(ours, mlx_quantize(w, bits, group_size), strict=True):
        assert_same_bits(a, b)
    w_hat = affine.dequantize(affine.unpack(ours[0], bits, 2 * group_size), *ours[1:], bits, group_size)
    assert_same_bits(w_hat, mlx_dequantize(*ours, bits, group_size), dtype)


@pytest.mark.parametrize(
    ("dtype", "bits"), [(dtype, bits) for dtype in DTYPES for bits in AFFINE_BITS if (dtype, bits) != ("BF16", 8)]
)
def test_what_a_grid_represents_survives_requantization_to_it(dtype, bits):
    # Zero loss: the reconstruction misses its grid point by the rounding of a product and of a sum, each at most
    # u * (2**bits - 1) steps in a group with values of both signs. With u = 2**-8 (BF16) and 6 bits that is 0.49 of
    # a step, still rounded back; 8-bit codes are finer than bfloat16 itself, the one pair left out.
    w = from_float32(np.random.default_rng(bits).standard_normal((64, 256)).astype(np.float32), dtype)
    w_q, scales, biases = reference_quantize(w, dtype, bits, 64)
    codes = affine.unpack(w_q, bits, 256)
    w_hat = affine.dequantize(codes, scales, biases, bits, 64)
    assert np.array_equal(affine.quantize(w_hat, scales, biases, bits, 64), codes)


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_round_trip_error_is_at_most_half_a_step(bits):
    w = np.random.default_rng(bits).standard_normal((32, 256)).astype(np.float32)
    scales, biases = affine.choose_qparams(w, bits, 64)
    w_hat = affine.dequantize(affine.quantize(w, scales, biases, bits, 64), scales, biases, bits, 64)
    # Snapping 0 onto the grid moves the far end by up to half a step more, where codes are clipped; float32 rounding
    # adds a relative 2**-22 or so.
    step = np.repeat(np.abs(scales), 64, axis=1)
    assert (np.abs(w_hat - w) <= step * (1 + 1e-4)).all()
    assert (np.abs(w_hat - w) <= step * (0.5 + 1e-4)).mean() > 0.95


@pytest.mark.parametrize("bits", AFFINE_BITS)
@pytest.mark.parametrize("shape", [(32,), (3, 96), (2, 3, 160), (0, 64)])
def test_pack_is_lsb_first_and_inverts(bits, shape):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, shape, dtype=np.uint8)
    words = affine.pack(codes, bits)
    assert words.shape == (*shape[:-1], shape[-1] * bits // 32)
    assert words.dtype == np.uint32
    assert np.array_equal(affine.unpack(words, bits, shape[-1]), codes)
    for row, packed in zip(codes.reshape(-1, shape[-1]), words.reshape(-1, words.shape[-1]), strict=True):
        # The definition, in Python's integers: the row is one number, code k at bit k * bits.
        number = sum(int(code) << (k * bits) for k, code in enumerate(row))
        assert int.from_bytes(packed.astype("<u4").tobytes(), "little") == number


def test_strided_input_is_packed_like_contiguous():
    codes = np.random.default_rng(0).integers(0, 8, (64, 4), dtype=np.uint8)
    assert np.array_equal(affine.pack(codes.T, 3), affine.pack(np.ascontiguousarray(codes.T), 3))
    words = affine.pack(codes.T, 3)
    assert np.array_equal(affine.unpack(np.asfortranarray(words), 3, 64), codes.T)


def test_a_group_whose_scale_is_zero_gets_code_zero():
    w = np.full((1, 32), 3.0, np.float32)
    codes = affine.quantize(w, np.zeros((1, 1), np.float32), np.full((1, 1), 2.0, np.float32), 4, 32)
    assert not codes.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(dtype, bad):
    w = np.ones((2, 64), np.float32)
    w[1, 40] = bad
    with pytest.raises(FormatError, match="finite"):
        affine.choose_qparams(from_float32(w, dtype), 4, 32)


W, SCALES = np.ones((2, 64), np.float32), np.ones((2, 1), np.float32)
CODES = np.ones((2, 64), np.uint8)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: affine.choose_qparams(W, 7, 64), ["2, 3, 4, 5, 6, 8", "7"]),
        (lambda: affine.choose_qparams(W, 4, 128), ["64", "128"]),
        (lambda: affine.choose_qparams(W.astype(np.float64), 4, 64), ["float64"]),
        (lambda: affine.quantize(W, SCALES, SCALES[:1], 4, 64), ["(2, 64)", "(2, 1)", "(1, 1)"]),
        (lambda: affine.dequantize(CODES, SCALES, SCALES.astype(np.float16), 4, 64), ["F32", "F16"]),
        (lambda: affine.dequantize(CODES, SCALES[:, 0], SCALES, 4, 64), ["(2, 64)", "(2,)"]),
        (lambda: affine.pack(CODES[:, :40], 4), ["32", "40"]),
        (lambda: affine.pack(CODES.astype(np.int64), 4), ["uint8", "int64"]),
        (lambda: affine.unpack(np.zeros((2, 8), np.uint32), 4, 96), ["96", "12", "8"]),
        (lambda: affine.unpack(np.zeros((2, 8), np.int32), 4, 64), ["uint32", "int32"]),
    ],
)
def test_errors_name_both_sides(call, words):
    with pytest.raises(FormatError) as error:
        call()
    assert all(word in str(error.value) for word in words), str(error.value)
