"""MLX's affine codes as ggml blocks: the decoded weights are the same, bit for bit, or the type is not offered."""

from dataclasses import replace

import gguf
import numpy as np
import pytest

from mlxq.errors import FormatError
from mlxq.formats import crossings, ggml
from mlxq.formats.affine import pack, unpack
from mlxq.formats.floats import from_float32, to_float32
from mlxq.types import QuantizedTensor, QuantSpec

ROWS, K = 6, 512


def grid(bits, group_size, dtype="F16", seed=0, scales=None, biases=None):
    rng = np.random.default_rng(seed)
    shape = (ROWS, K // group_size)
    s = rng.normal(0, 0.01, shape).astype(np.float32) if scales is None else scales
    b = rng.normal(0, 0.1, shape).astype(np.float32) if biases is None else biases
    codes = rng.integers(0, 2**bits, (ROWS, K), dtype=np.uint8)
    stored = (from_float32(a, dtype) for a in (s, b))
    return QuantizedTensor(pack(codes, bits), *stored, QuantSpec(bits, group_size), (ROWS, K), dtype)


def decoded(q):
    """`scales * q + biases` in float32."""
    codes = unpack(q.w_q, q.spec.bits, K).astype(np.float32).reshape(ROWS, -1, q.spec.group_size)
    s, b = (to_float32(a, q.dtype)[..., None] for a in (q.scales, q.biases))
    return (codes * s + b).reshape(ROWS, K)


def types(q):
    return crossings.exact_types(q)


def by_gguf(blocks, name):
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("bits", "name"), [(2, "Q4_1"), (3, "Q4_1"), (4, "Q4_1"), (5, "Q5_1")])
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_any_grid_with_float16_numbers_is_q4_1_or_q5_1(bits, name, group_size, dtype):
    # bfloat16 numbers of this size are float16 numbers: 8 significant bits, and multiples of 2^-24.
    rng = np.random.default_rng(1)
    s, b = (np.round(rng.normal(0, 0.1, (ROWS, K // group_size)) * 1024) / 1024 for _ in range(2))
    q = grid(bits, group_size, dtype, scales=s.astype(np.float32), biases=b.astype(np.float32))
    assert name in types(q)
    blocks = crossings.from_affine(q, name)
    assert blocks.shape == (ROWS, K // 32 * ggml.block_format(name).type_size)
    np.testing.assert_array_equal(by_gguf(blocks, name), decoded(q))


@pytest.mark.parametrize(("bits", "name"), [(4, "Q4_0"), (5, "Q5_0"), (8, "Q8_0")])
@pytest.mark.parametrize("group_size", [32, 64])
def test_a_symmetric_grid_needs_no_offsets(bits, name, group_size):
    s = np.random.default_rng(2).normal(0, 0.01, (ROWS, K // group_size)).astype(np.float16).astype(np.float32)
    q = grid(bits, group_size, scales=s, biases=-(2 ** (bits - 1)) * s)
    assert name in types(q)
    blocks = crossings.from_affine(q, name)
    np.testing.assert_array_equal(by_gguf(blocks, name), decoded(q))
    skewed = replace(q, biases=q.biases + np.float16(0.01))
    assert name not in types(skewed)


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1", "Q8_0", "Q4_0", "Q5_0"])
def test_blocks_to_affine_and_back_are_the_same_bytes(name):
    w = np.random.default_rng(3).normal(0, 0.05, (ROWS, K)).astype(np.float32)
    blocks = gguf.quants.quantize(w, gguf.GGMLQuantizationType[name])
    q = ggml.to_affine(blocks, name)
    assert name in types(q)
    np.testing.assert_array_equal(crossings.from_affine(q, name), blocks)


@pytest.mark.parametrize(("bits", "name"), [(4, "Q4_K"), (5, "Q5_K")])
@pytest.mark.parametrize("negative", [False, True])
def test_super_blocks_are_found_again(bits, name, negative):
    """d and dmin of any 11 bits times 6-bit integers, with common factors among them, and super-blocks of zeros."""
    rng = np.random.default_rng(4)
    n = K // 256
    d, dmin = (rng.uniform(1e-3, 1e-2, (ROWS, n)).astype(np.float16).astype(np.float32) for _ in range(2))
    sc, m = (rng.integers(0, 64, (ROWS, n, 8)) for _ in range(2))
    sc[0] = sc[0] // 2 * 2
    sc[1], m[2] = 0, 0
    if negative:
        d = -d
    scales = (d[..., None] * sc).reshape(ROWS, -1).astype(np.float32)
    biases = -(dmin[..., None] * m).reshape(ROWS, -1).astype(np.float32)
    q = grid(bits, 32, "F32", scales=scales, biases=biases)
    assert name in types(q)
    np.testing.assert_array_equal(by_gguf(crossings.from_affine(q, name), name), decoded(q))


def test_scales_that_share_no_factor_are_no_super_block():
    q = grid(4, 32)
    assert types(q) == {"Q4_1"}
    with pytest.raises(FormatError, match="super-block"):
        crossings.from_affine(q, "Q4_K")


def test_scales_beyond_float16_are_refused_and_fine_ones_not_called_exact():
    q = grid(4, 32, "F32", scales=np.full((ROWS, K // 32), 1e5, np.float32))
    assert types(q) == set()
    with pytest.raises(FormatError, match="scales exceed"):
        crossings.from_affine(q, "Q4_1")
    fine = grid(4, 32, "F32", scales=np.full((ROWS, K // 32), 1 + 2**-20, np.float32))
    assert types(fine) == set()


@pytest.mark.parametrize(("bits", "name"), [(4, "Q4_1"), (4, "Q4_K"), (4, "Q4_0"), (5, "Q5_0"), (8, "Q8_0")])
@pytest.mark.parametrize("idle", [1e-7, -1e-7, 0.375, 1e6])
def test_a_scale_that_no_code_multiplies_does_not_matter(bits, name, idle):
    """`mx.quantize` gives constant groups 1e-7, which is no float16; a group of zeros has no offset beside it."""
    s = np.full((ROWS, K // 32), 0.25, np.float32)
    b = -(2 ** (bits - 1)) * s
    s[:, ::3], b[:, ::3] = idle, 0
    b[1, ::3] = -0.5
    q = grid(bits, 32, "F32", scales=s, biases=b)
    if idle != 0.375:
        assert name not in types(q)
    codes = unpack(q.w_q, bits, K).reshape(ROWS, -1, 32)
    codes[:, ::3] = 0
    q = replace(q, w_q=pack(codes.reshape(ROWS, K), bits))
    assert name in types(q)
    blocks = crossings.from_affine(q, name)
    np.testing.assert_array_equal(by_gguf(blocks, name), decoded(q))
    # What a block becomes does not depend on which others are looked at with it.
    parts = [crossings.from_affine(replace(q, **rows(q, i), shape=(1, K)), name) for i in range(ROWS)]
    np.testing.assert_array_equal(np.concatenate(parts), blocks)


def rows(q, i):
    return {part: getattr(q, part)[i : i + 1] for part in ("w_q", "scales", "biases")}


def test_a_scale_that_is_not_finite_is_never_left_out():
    s = np.full((ROWS, K // 32), 0.25, np.float32)
    s[2, 3] = np.inf
    q = grid(4, 32, "F32", scales=s, biases=-8 * np.where(np.isfinite(s), s, 0).astype(np.float32))
    codes = unpack(q.w_q, 4, K).reshape(ROWS, -1, 32)
    codes[2, 3] = 0
    assert types(replace(q, w_q=pack(codes.reshape(ROWS, K), 4))) == set()


def test_six_bits_have_no_block_type():
    q = grid(6, 64)
    assert types(q) == set()
    with pytest.raises(FormatError, match="cannot be"):
        crossings.from_affine(q, "Q8_0")
