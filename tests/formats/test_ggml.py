"""ggml blocks against the `gguf` package's decoder, and the affine grid against the blocks."""

import gguf
import numpy as np
import pytest

from mlxq.errors import FormatError
from mlxq.formats import ggml
from mlxq.formats.affine import unpack
from mlxq.formats.geometry import block_format

BLOCK_TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


def random_blocks(name: str, rows: int, n_blocks: int, seed: int = 0) -> np.ndarray:
    """Random bytes with finite float16 `d` and `m`: every code, negative, zero and subnormal scales."""
    rng = np.random.default_rng(seed)
    size = block_format(name).type_size
    blocks = rng.integers(0, 256, (rows * n_blocks, size), dtype=np.uint8)
    floats = 2 if name.endswith("_1") else 1
    values = rng.normal(0, 0.02, (rows * n_blocks, floats)).astype("<f2")
    values[0] = 0.0
    values[1] = np.float16(6e-8)
    values[2] = np.float16(-1.5)
    blocks[:, : 2 * floats] = values.view(np.uint8)
    return blocks.reshape(rows, n_blocks * size)


def scalar_dequantize(block: bytes, name: str) -> list[float]:
    """One block, one weight at a time, straight from the drawing in the module's docstring."""
    bits, has_m, offset = {
        "Q4_0": (4, False, 8),
        "Q4_1": (4, True, 0),
        "Q5_0": (5, False, 16),
        "Q5_1": (5, True, 0),
        "Q8_0": (8, False, 0),
    }[name]
    floats = np.frombuffer(block[: 4 if has_m else 2], "<f2").astype(np.float64)
    rest = block[4 if has_m else 2 :]
    if bits == 8:
        return [float(floats[0] * q) for q in np.frombuffer(rest, np.int8)]
    high = int.from_bytes(rest[:4], "little") if bits == 5 else 0
    qs = rest[-16:]
    out = []
    for i in range(32):
        q = (qs[i] & 15 if i < 16 else qs[i - 16] >> 4) | ((high >> i & 1) << 4)
        out.append(float(floats[0] * (q - offset) + (floats[1] if has_m else 0.0)))
    return out


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_dequantize_equals_gguf_bit_for_bit(name):
    # More blocks than one chunk of the decoder.
    blocks = random_blocks(name, rows=70, n_blocks=65)
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    actual = ggml.dequantize(blocks, name)
    assert actual.dtype == np.float32
    assert actual.shape == (70, 65 * 32)
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_dequantize_follows_the_drawing(name):
    blocks = random_blocks(name, rows=1, n_blocks=4, seed=3)
    size = block_format(name).type_size
    expected = [w for i in range(4) for w in scalar_dequantize(blocks[0, i * size : (i + 1) * size].tobytes(), name)]
    # float64 rounded to float32 is float32 arithmetic here: product exact in both, sum rounded once.
    np.testing.assert_array_equal(ggml.dequantize(blocks, name)[0], np.array(expected, np.float32))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_floats(name):
    w = np.random.default_rng(1).normal(size=(3, 40)).astype(np.float32)
    data = gguf.quants.quantize(w, gguf.GGMLQuantizationType[name]).view(np.uint8)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name]).reshape(3, 40)
    np.testing.assert_array_equal(ggml.dequantize(data, name), expected)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_affine_grid_decodes_to_the_same_numbers(name):
    blocks = random_blocks(name, rows=5, n_blocks=3, seed=2)
    t = ggml.to_affine(blocks, name)
    assert t.spec == ggml.affine_spec(name)
    assert t.shape == (5, 96)
    assert (t.w_q.dtype, t.scales.dtype, t.biases.dtype) == (np.uint32, np.float16, np.float16)
    assert t.w_q.shape == (5, 96 * t.spec.bits // 32)
    assert t.scales.shape == t.biases.shape == (5, 3)
    q = unpack(t.w_q, t.spec.bits, 96).reshape(5, 3, 32).astype(np.float32)
    w_hat = t.scales[..., None].astype(np.float32) * q + t.biases[..., None].astype(np.float32)
    # Equal as numbers: no tolerance. (+0 and -0 compare equal.)
    np.testing.assert_array_equal(w_hat.reshape(5, 96), ggml.dequantize(blocks, name))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_affine_codes_are_the_stored_codes(name):
    blocks = random_blocks(name, rows=2, n_blocks=2, seed=4)
    t = ggml.to_affine(blocks, name)
    codes = unpack(t.w_q, t.spec.bits, 64)
    size = block_format(name).type_size
    last = codes[1, 33]
    byte = blocks[1, size:]
    if name == "Q8_0":
        assert last == np.int8(byte[2 + 1].view(np.int8)).astype(int) + 128
    else:
        assert last & 15 == byte[size - 16 + 1] & 15


@pytest.mark.parametrize(("name", "limit"), [("Q4_0", 8188.0), ("Q5_0", 4094.0), ("Q8_0", 511.75)])
def test_offset_that_overflows_is_refused(name, limit):
    blocks = random_blocks(name, rows=1, n_blocks=3)
    largest = np.array([limit], "<f2")
    size = block_format(name).type_size
    blocks[0, size : size + 2] = largest.view(np.uint8)
    assert np.isfinite(ggml.to_affine(blocks, name).biases).all()
    blocks[0, size : size + 2] = np.nextafter(largest, np.float16(np.inf)).view(np.uint8)
    with pytest.raises(FormatError, match=rf"{name}: block 1 has scale .* beyond the largest float16"):
        ggml.to_affine(blocks, name)
    # Decoding still works.
    assert np.isfinite(ggml.dequantize(blocks, name)).all()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_scale_that_is_not_finite_is_refused(value):
    blocks = random_blocks("Q4_1", rows=1, n_blocks=3)
    blocks[0, 20:22] = np.array([value], "<f2").view(np.uint8)
    with pytest.raises(FormatError, match="block 1 has a scale that is NaN or infinite"):
        ggml.to_affine(blocks, "Q4_1")
    blocks = random_blocks("Q4_1", rows=1, n_blocks=3)
    blocks[0, 2:4] = np.array([value], "<f2").view(np.uint8)
    with pytest.raises(FormatError, match="block 0 has a minimum that is NaN or infinite"):
        ggml.to_affine(blocks, "Q4_1")


def test_errors():
    with pytest.raises(FormatError, match="'Q6_K' cannot be decoded: the types that can are F32"):
        ggml.dequantize(np.zeros((1, 210), np.uint8), "Q6_K")
    with pytest.raises(FormatError, match="whole blocks of 20 bytes, got 21"):
        ggml.dequantize(np.zeros((1, 21), np.uint8), "Q4_1")
    with pytest.raises(FormatError, match="uint8 bytes, got int8"):
        ggml.dequantize(np.zeros((1, 20), np.int8), "Q4_1")
    with pytest.raises(FormatError, match="'F16' has no affine grid"):
        ggml.to_affine(np.zeros((1, 20), np.uint8), "F16")
    assert ggml.affine_spec("F16") is None


def test_no_rows():
    assert ggml.dequantize(np.zeros((0, 20), np.uint8), "Q4_1").shape == (0, 32)
