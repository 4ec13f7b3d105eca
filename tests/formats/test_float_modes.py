"""Small floats: their tables against mlx's, MLX's float modes against `mx.dequantize`, ggml's blocks against gguf."""

import gguf
import numpy as np
import pytest

from mlxq.errors import FormatError
from mlxq.formats import crossings, float8, float_modes, geometry, ggml
from mlxq.formats.affine import pack, unpack
from mlxq.types import QuantizedTensor, QuantSpec

mx = pytest.importorskip("mlx.core")
MODES = list(geometry.FLOAT_MODES)


def random_parts(mode, rows=5, K=192, seed=0):
    """Any codes but NaN, and scales around 1."""
    rng = np.random.default_rng(seed)
    how = geometry.FLOAT_MODES[mode]
    codes = rng.integers(0, 1 << how.bits, (rows, K)).astype(np.uint8)
    if how.bits == 8:
        codes[codes & 0x7F == 0x7F] = 0
    low, high = (100, 150) if how.scale == "E8M0" else (0, 0x7F)
    scales = rng.integers(low, high, (rows, K // how.group_size)).astype(np.uint8)
    return pack(codes, how.bits), scales


def as_tensor(w_q, scales, mode):
    how = geometry.FLOAT_MODES[mode]
    spec = QuantSpec(how.bits, how.group_size, mode)
    return QuantizedTensor(w_q, scales, None, spec, (*scales.shape[:-1], scales.shape[-1] * how.group_size), mode)


def test_every_e4m3_code_is_mlx_s():
    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(float8.E4M3, np.array(mx.from_fp8(mx.array(codes), mx.float32)))
    np.testing.assert_array_equal(np.signbit(float8.E4M3[128]), True)


def test_every_e8m0_exponent():
    np.testing.assert_array_equal(float8.E8M0[:255], np.ldexp(1.0, np.arange(-127, 128)).astype(np.float32))
    assert np.isnan(float8.E8M0[255])


@pytest.mark.parametrize("mode", MODES)
def test_decoded_as_mlx_decodes(mode):
    w_q, scales = random_parts(mode)
    expected = np.array(mx.dequantize(mx.array(w_q), mx.array(scales), mode=mode, dtype=mx.float32))
    found = float_modes.dequantize(w_q, scales, mode)
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
    stack = float_modes.dequantize(w_q[None].repeat(2, 0), scales[None].repeat(2, 0), mode)
    np.testing.assert_array_equal(stack[1], expected)
    np.testing.assert_array_equal(crossings.dequantize(as_tensor(w_q, scales, mode)), expected)


@pytest.mark.parametrize("mode", MODES)
def test_every_code_and_scale(mode):
    how = geometry.FLOAT_MODES[mode]
    top = 255 if how.scale == "E8M0" else 0x7F
    codes = np.arange(1 << how.bits, dtype=np.uint8)
    codes = np.resize(codes[codes & 0x7F != 0x7F] if how.bits == 8 else codes, 256)
    w_q = np.repeat(pack(codes[None], how.bits), top, axis=0)
    scales = np.repeat(np.arange(top, dtype=np.uint8)[:, None], 256 // how.group_size, axis=1)
    with np.errstate(over="ignore"):
        found = float_modes.dequantize(w_q, scales, mode)
    expected = np.array(mx.dequantize(mx.array(w_q), mx.array(scales), mode=mode, dtype=mx.float32))
    # mlx flushes subnormal numbers on some CPUs' vector units.
    normal = np.abs(found) >= np.finfo(np.float32).tiny
    np.testing.assert_array_equal(found[normal], expected[normal])
    float_modes.check(w_q, scales, mode)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_no_number_is_refused(mode):
    w_q, scales = random_parts(mode)
    wrong = scales.copy()
    wrong[2, 3] = 255
    with pytest.raises(FormatError, match="a scale is 255"):
        float_modes.check(w_q, wrong, mode)
    if mode == "nvfp4":
        wrong[2, 3] = 0x80
        with pytest.raises(FormatError, match="a scale is 128, which is NaN or negative"):
            float_modes.check(w_q, wrong, mode)
    if mode == "mxfp8":
        codes = w_q.view(np.uint8).copy()
        codes[1, 7] = 0xFF
        with pytest.raises(FormatError, match="code is NaN"):
            float_modes.check(codes.view(np.uint32), scales, mode)


@pytest.mark.parametrize("mode", list(float_modes.GGML_TYPES))
def test_blocks_are_the_same_weights(mode):
    w_q, scales = random_parts(mode)
    name = float_modes.GGML_TYPES[mode]
    q = as_tensor(w_q, scales, mode)
    assert crossings.exact_types(q) == {name}
    blocks = crossings.from_affine(q, name)
    expected = float_modes.dequantize(w_q, scales, mode)
    np.testing.assert_array_equal(ggml.dequantize(blocks, name).reshape(expected.shape), expected)
    theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(theirs.reshape(expected.shape), expected)
    back = float_modes.from_blocks(blocks, mode)
    np.testing.assert_array_equal(back[0], w_q)
    np.testing.assert_array_equal(back[1], scales)


def test_no_type_holds_mxfp8_or_rows_of_half_a_block():
    assert crossings.exact_types(as_tensor(*random_parts("mxfp8"), "mxfp8")) == frozenset()
    assert crossings.exact_types(as_tensor(*random_parts("nvfp4", K=96), "nvfp4")) == frozenset()


def test_geometry_of_the_modes():
    for mode, how in geometry.FLOAT_MODES.items():
        spec = QuantSpec(how.bits, how.group_size, mode)
        geometry.validate_spec(spec)
        parts = mx.quantize(mx.zeros((6, 256)), mode=mode)
        assert sum(p.nbytes for p in parts) == geometry.quantized_bytes((6, 256), spec, "U8")
        assert geometry.bpw(spec, "U8") == 8 * sum(p.nbytes for p in parts) / (6 * 256)
        assert str(spec) == mode
    with pytest.raises(FormatError, match="does not divide into groups of 32"):
        geometry.quantized_bytes((6, 40), QuantSpec(4, 32, "mxfp4"), "U8")


def test_blocks_of_scales_are_spread_over_cut_edges():
    scales = np.arange(6, dtype=np.float32).reshape(2, 3)
    spread = float8.spread(scales, (3, 10), (4, 4), first_row=2)
    assert float8.block_grid((5, 10), (4, 4)) == (2, 3)
    np.testing.assert_array_equal(spread[:2], np.repeat([[0, 1, 2]], 4, 1).repeat(2, 0)[:, :10].reshape(2, 10))
    np.testing.assert_array_equal(spread[2], np.repeat([3, 4, 5], 4)[:10])


def test_codes_are_packed_as_mlx_packs_them():
    w = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    w_q, scales = (np.array(a) for a in mx.quantize(mx.array(w), mode="mxfp4"))
    codes = unpack(w_q, 4, 64)
    steps = np.repeat(float_modes.scale_values(scales, "mxfp4"), 32, axis=1)
    assert np.abs(float_modes.E2M1[codes] * steps - w).max() <= steps.max()
