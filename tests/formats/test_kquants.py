"""Super-blocks of the K types: against the drawing, against gguf's decoder and ggml's own, and there and back."""

import dataclasses

import gguf
import numpy as np
import pytest

from mlxq.errors import FormatError
from mlxq.formats import kquants
from mlxq.formats.geometry import block_format
from mlxq.formats.superblocks import K_TYPES

NAMES = list(K_TYPES)
#: Byte offsets of the float16 fields: d, and dmin where there is one.
FLOATS = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def random_blocks(name: str, n: int, seed: int = 0) -> np.ndarray:
    """Random bytes in every field: every code and scale, and float16 numbers that are subnormal, infinite or NaN."""
    return np.random.default_rng(seed).integers(0, 256, (n, block_format(name).type_size), dtype=np.uint8)


def every_float16(name: str) -> np.ndarray:
    """One block for each float16 pattern of `d`, the same patterns in another order as `dmin`."""
    blocks = random_blocks(name, 1 << 16, seed=1)
    patterns = np.arange(1 << 16, dtype="<u2")
    for at, values in zip(FLOATS[name], (patterns, np.random.default_rng(2).permutation(patterns)), strict=False):
        blocks[:, at : at + 2] = values.view(np.uint8).reshape(-1, 2)
    return blocks


def assert_same_floats(actual: np.ndarray, expected: np.ndarray) -> None:
    """Bit for bit, except that any NaN is as good as another."""
    assert (actual.dtype, actual.shape) == (np.float32, expected.shape)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    np.testing.assert_array_equal(actual.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


def drawn_codes(block: np.ndarray, name: str) -> list[int]:
    """Codes of one block, one weight at a time, from the drawing in the module's docstring."""
    at = {"Q2_K": 16, "Q3_K": 32, "Q4_K": 16, "Q5_K": 48, "Q6_K": 0}[name]
    b = [int(x) for x in block]
    codes = []
    for i in range(256):
        if name in ("Q2_K", "Q3_K"):
            code = b[at + i // 128 * 32 + i % 32] >> 2 * (i % 128 // 32) & 3
            if name == "Q3_K":
                code |= (b[i % 32] >> i // 32 & 1) << 2
        elif name == "Q6_K":
            code = b[at + i // 128 * 64 + i % 64] >> 4 * (i % 128 // 64) & 15
            code |= (b[128 + i // 128 * 32 + i % 32] >> 2 * (i % 128 // 32) & 3) << 4
        else:
            code = b[at + i // 64 * 32 + i % 32] >> 4 * (i % 64 // 32) & 15
            if name == "Q5_K":
                code |= (b[16 + i % 32] >> i // 32 & 1) << 4
        codes.append(code)
    return codes


def drawn_scales(block: np.ndarray, name: str) -> tuple[list[int], list[int] | None]:
    b = [int(x) for x in block]
    if name == "Q2_K":
        return [x & 15 for x in b[:16]], [x >> 4 for x in b[:16]]
    if name == "Q6_K":
        return [x - 256 if x > 127 else x for x in b[192:208]], None
    if name == "Q3_K":
        s = b[96:108]
        low = [s[j % 8] >> 4 * (j // 8) & 15 for j in range(16)]
        return [(low[j] | (s[8 + j % 4] >> 2 * (j // 4) & 3) << 4) - 32 for j in range(16)], None
    s = b[4:16]
    scales = [s[j] & 63 if j < 4 else s[j + 4] & 15 | s[j - 4] >> 6 << 4 for j in range(8)]
    mins = [s[j + 4] & 63 if j < 4 else s[j + 4] >> 4 | s[j] >> 6 << 4 for j in range(8)]
    return scales, mins


@pytest.mark.parametrize("name", NAMES)
def test_parts_follow_the_drawing(name):
    blocks = random_blocks(name, 3, seed=5)
    parts = kquants.unpack(blocks, name)
    for i, block in enumerate(blocks):
        scales, mins = drawn_scales(block, name)
        assert parts.codes[i].tolist() == drawn_codes(block, name)
        assert parts.scales[i].tolist() == scales
        assert (None if parts.mins is None else parts.mins[i].tolist()) == mins
        floats = [np.frombuffer(block[at : at + 2].tobytes(), "<u2")[0] for at in FLOATS[name]]
        assert [a.view(np.uint16)[i] for a in (parts.d, parts.dmin) if a is not None] == floats


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_what_superblocks_says(name):
    blocks = random_blocks(name, 2, seed=6)
    for at in FLOATS[name]:
        blocks[:, at : at + 2] = np.array([0.25, -1.5], "<f2").view(np.uint8).reshape(2, 2)
    parts, g = kquants.unpack(blocks, name), K_TYPES[name]
    scales = np.repeat(parts.scales.astype(float), g.sub_block, axis=1)
    w = parts.d[:, None].astype(float) * scales * (parts.codes.astype(float) - g.offset)
    if g.has_mins:
        w -= parts.dmin[:, None].astype(float) * np.repeat(parts.mins.astype(float), g.sub_block, axis=1)
    # These few bits are exact in float64 and in float32.
    np.testing.assert_array_equal(kquants.dequantize(blocks, name), w)


@pytest.mark.parametrize("name", NAMES)
def test_dequantize_equals_gguf_for_every_float16(name):
    blocks = every_float16(name)
    for start in range(0, len(blocks), 1 << 13):
        part = blocks[start : start + (1 << 13)]
        with np.errstate(all="ignore"):
            expected = gguf.quants.dequantize(part, gguf.GGMLQuantizationType[name])
        assert_same_floats(kquants.dequantize(part, name), expected)


@pytest.mark.parametrize("name", NAMES)
def test_dequantize_equals_ggml(name):
    libgguf = pytest.importorskip("libgguf", reason="ggml's own decoder, PyPI libgguf, is not installed")
    blocks = every_float16(name)[::16]
    expected = np.asarray(libgguf.dequantize_rows(blocks, int(gguf.GGMLQuantizationType[name])), np.float32)
    assert_same_floats(kquants.dequantize(blocks, name), expected.reshape(-1, 256))


@pytest.mark.parametrize("name", NAMES)
def test_pack_gives_back_the_bytes_that_unpack_took_apart(name):
    # More blocks than one chunk; every float16 pattern, those of NaN included, and every byte elsewhere.
    blocks = every_float16(name)[::8]
    parts = kquants.unpack(blocks, name)
    np.testing.assert_array_equal(kquants.pack(parts, name), blocks)
    # Arrays in another memory order are the same parts.
    transposed = {f.name: getattr(parts, f.name) for f in dataclasses.fields(parts)}
    transposed = {k: None if a is None else np.asfortranarray(a) for k, a in transposed.items()}
    np.testing.assert_array_equal(kquants.pack(type(parts)(**transposed), name), blocks)


@pytest.mark.parametrize("name", NAMES)
def test_no_blocks_and_blocks_of_a_larger_array(name):
    size = block_format(name).type_size
    assert kquants.dequantize(np.zeros((0, size), np.uint8), name).shape == (0, 256)
    assert kquants.pack(kquants.unpack(np.zeros((0, size), np.uint8), name), name).shape == (0, size)
    wide = random_blocks(name, 40)
    every_other, alone = wide[::2], wide[::2].copy()
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(kquants.dequantize(every_other, name), kquants.dequantize(alone, name))
    np.testing.assert_array_equal(kquants.unpack(every_other, name).codes, kquants.unpack(alone, name).codes)


@pytest.mark.parametrize("name", NAMES)
def test_parts_beyond_their_range_are_refused(name):
    parts, g = kquants.unpack(random_blocks(name, 2), name), K_TYPES[name]
    codes = parts.codes.copy()
    codes[1, 7] = 1 << g.bits
    with pytest.raises(FormatError, match=rf"{name}: codes must lie in 0 to {(1 << g.bits) - 1}"):
        kquants.pack(dataclasses.replace(parts, codes=codes), name)
    if name != "Q6_K":
        scales = parts.scales.copy()
        scales[0, 3] = 64
        with pytest.raises(FormatError, match=rf"{name}: scales must lie in .*, got .* to 64"):
            kquants.pack(dataclasses.replace(parts, scales=scales), name)
    with pytest.raises(FormatError, match=rf"{name}: scales must be .*, got float32"):
        kquants.pack(dataclasses.replace(parts, scales=parts.scales.astype(np.float32)), name)
    other = parts.d if not g.has_mins else None
    with pytest.raises(FormatError, match="dmin"):
        kquants.pack(dataclasses.replace(parts, dmin=other), name)


def test_errors():
    with pytest.raises(FormatError, match="'Q4_0' has no super-blocks: the types that do are Q2_K, Q3_K"):
        kquants.dequantize(np.zeros((1, 18), np.uint8), "Q4_0")
    with pytest.raises(FormatError, match=r"Q6_K: blocks are uint8 \[n, 210\], got uint8 \[1, 209\]"):
        kquants.unpack(np.zeros((1, 209), np.uint8), "Q6_K")
    with pytest.raises(FormatError, match="got int8"):
        kquants.unpack(np.zeros((1, 210), np.int8), "Q6_K")
