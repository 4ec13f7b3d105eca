"""ggml blocks against the `gguf` package's decoder, and the affine grid against the blocks."""

import gguf
import numpy as np
import pytest

from mlxq.errors import FormatError
from mlxq.formats import crossings, ggml
from mlxq.formats.affine import unpack
from mlxq.formats.floats import to_float32
from mlxq.formats.geometry import BLOCK_FORMATS, block_format

BLOCK_TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
#: Every type but the floats.
ALL_TYPES = [f.name for f in BLOCK_FORMATS.values() if f.block_size > 1]
#: Types that are an affine grid -> bits, group size, float type of scales and biases.
GRIDS = {
    "Q4_0": (4, 32, "F16"),
    "Q4_1": (4, 32, "F16"),
    "Q5_0": (5, 32, "F16"),
    "Q5_1": (5, 32, "F16"),
    "Q8_0": (8, 32, "F16"),
    "Q4_K": (4, 32, "F32"),
    "Q5_K": (5, 32, "F32"),
    "IQ4_NL": (8, 32, "F16"),
    "IQ4_XS": (8, 32, "F32"),
    "TQ1_0": (2, 128, "F16"),
    "TQ2_0": (2, 128, "F16"),
}


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


def any_blocks(name: str, n: int, seed: int = 0) -> np.ndarray:
    """`n` blocks of random bytes, all of them: float16 scales that are subnormal, infinite or NaN too."""
    return np.random.default_rng(seed).integers(0, 256, (n, block_format(name).type_size), dtype=np.uint8)


def finite_blocks(name: str, n: int, seed: int = 0) -> np.ndarray:
    """Those of `any_blocks` whose weights and offsets (up to 128 times a scale) are finite."""
    blocks = any_blocks(name, n, seed)
    with np.errstate(all="ignore"):
        w = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    limit = 2.0**120 if name == "MXFP4" else 200.0
    return blocks[(np.abs(w) < limit).all(axis=1)]


def assert_same_floats(actual: np.ndarray, expected: np.ndarray) -> None:
    """Bit for bit, except that any NaN is as good as another."""
    assert (actual.dtype, actual.shape) == (np.float32, expected.shape)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    np.testing.assert_array_equal(actual.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


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


@pytest.mark.parametrize("name", ALL_TYPES)
def test_every_type_equals_gguf_for_any_bytes(name):
    # 320 blocks of 256 weights are more than one chunk of the decoder.
    blocks = any_blocks(name, 320 * 256 // block_format(name).block_size)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    assert_same_floats(ggml.dequantize(blocks, name), expected)
    rows = blocks[: len(blocks) // 16 * 16].reshape(4, 2, -1)
    assert_same_floats(ggml.dequantize(rows, name), expected[: len(blocks) // 16 * 16].reshape(4, 2, -1))


@pytest.mark.parametrize("name", ALL_TYPES)
def test_every_type_equals_ggml_for_any_bytes(name):
    libgguf = pytest.importorskip("libgguf", reason="ggml's own decoder, PyPI libgguf, is not installed")
    blocks = any_blocks(name, 300, seed=1)
    expected = np.asarray(libgguf.dequantize_rows(blocks, int(gguf.GGMLQuantizationType[name])), np.float32)
    assert_same_floats(ggml.dequantize(blocks, name), expected.reshape(300, -1))


def test_the_table_of_types_is_the_decoders():
    decodable = {t.name for t in gguf.quants._type_traits} | {"F32", "F16"}
    assert set(ggml.READABLE) <= decodable
    assert {n for n in ggml.READABLE if ggml.affine_spec(n)} == {*GRIDS, "MXFP4", "NVFP4"}


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


@pytest.mark.parametrize("name", GRIDS)
def test_affine_grid_decodes_to_the_same_numbers(name):
    bits, group_size, dtype = GRIDS[name]
    blocks = random_blocks(name, 5, 3, seed=2).reshape(15, -1) if name in BLOCK_TYPES else finite_blocks(name, 3000)
    n = len(blocks) // 5 * 5
    assert n
    blocks = blocks[:n].reshape(5, -1)
    t = ggml.to_affine(blocks, name)
    K = blocks.shape[1] // block_format(name).type_size * block_format(name).block_size
    assert (t.spec.bits, t.spec.group_size, t.dtype) == (bits, group_size, dtype)
    assert (ggml.affine_spec(name), ggml.affine_scales_dtype(name)) == (t.spec, dtype)
    assert t.shape == (5, K)
    assert (t.w_q.dtype, t.w_q.shape) == (np.uint32, (5, K * bits // 32))
    assert t.scales.shape == t.biases.shape == (5, K // group_size)
    q = unpack(t.w_q, bits, K).reshape(5, -1, group_size).astype(np.float32)
    scales, biases = (to_float32(a, dtype)[..., None] for a in (t.scales, t.biases))
    # Equal as numbers: no tolerance. (+0 and -0 compare equal.)
    np.testing.assert_array_equal((scales * q + biases).reshape(5, K), ggml.dequantize(blocks, name))


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K"])
def test_super_blocks_with_infinite_parts_have_no_grid(name):
    blocks = finite_blocks(name, 100)[:5]
    for at, what in ((0, "scale"), (2, "minimum")):
        broken = blocks.copy()
        broken[3, at : at + 2] = np.array([np.inf], "<f2").view(np.uint8)
        with pytest.raises(FormatError, match=f"{name}: block 3 has a {what} that is NaN or infinite"):
            ggml.to_affine(broken, name)


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
    with pytest.raises(FormatError, match=r"ggml type 'Q8_K' is not known: the known types are F32 \(0\)"):
        ggml.dequantize(np.zeros((1, 292), np.uint8), "Q8_K")
    with pytest.raises(FormatError, match="whole blocks of 20 bytes, got 21"):
        ggml.dequantize(np.zeros((1, 21), np.uint8), "Q4_1")
    with pytest.raises(FormatError, match="uint8 bytes, got int8"):
        ggml.dequantize(np.zeros((1, 20), np.int8), "Q4_1")
    with pytest.raises(FormatError, match="'F16' has no affine grid"):
        ggml.to_affine(np.zeros((1, 20), np.uint8), "F16")
    assert ggml.affine_spec("F16") is None


def test_no_rows():
    assert ggml.dequantize(np.zeros((0, 20), np.uint8), "Q4_1").shape == (0, 32)


@pytest.mark.parametrize(("name", "mode", "K"), [("MXFP4", "mxfp4", 32), ("NVFP4", "nvfp4", 64)])
def test_four_bit_floats_are_modes_of_mlx(name, mode, K):
    n = 360 if name == "MXFP4" else 600
    blocks = finite_blocks(name, 400)[:n] if name == "MXFP4" else any_blocks(name, n)
    scales = blocks[:, : K // 16] if name == "NVFP4" else blocks[:, :1]
    scales[scales == 255] = 127
    blocks = blocks.reshape(3, -1)
    t = ggml.to_affine(blocks, name)
    assert (str(t.spec), t.dtype, t.biases, t.shape) == (mode, mode, None, (3, n // 3 * K))
    assert (ggml.affine_spec(name), ggml.affine_scales_dtype(name)) == (t.spec, None)
    np.testing.assert_array_equal(crossings.dequantize(t), ggml.dequantize(blocks, name).reshape(t.shape))


def test_an_exponent_that_stands_for_nan():
    for name in ("MXFP4", "NVFP4"):
        blocks = np.zeros((3, 2 * block_format(name).type_size), np.uint8)
        blocks[1, block_format(name).type_size] = 255
        with pytest.raises(FormatError, match="a scale is 255"):
            ggml.to_affine(blocks, name)
