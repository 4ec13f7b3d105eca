"""The one entry to every ggml encoder: shapes, types, importance, and each way to be wrong."""

import subprocess
import sys

import numpy as np
import pytest

from mlxq.errors import BackendError, FormatError
from mlxq.formats import floats
from mlxq.formats.geometry import block_format
from mlxq.quantizers.ggml import ENCODABLE, quantize

K = 512
SEARCHED = [name for name in ENCODABLE if block_format(name).block_size > 1]


def weights(*lead, seed=0):
    return np.random.default_rng(seed).standard_normal((*lead, K)).astype(np.float32)


def importance(*lead, seed=1):
    return np.exp(np.random.default_rng(seed).standard_normal((*lead, K))).astype(np.float32)


@pytest.mark.parametrize("name", ENCODABLE)
def test_every_type_keeps_leading_axes_and_fills_its_bytes(name):
    w = weights(3, 4)
    blocks = quantize(w, name)
    format = block_format(name)
    assert blocks.dtype == np.uint8
    assert blocks.shape == (3, 4, K // format.block_size * format.type_size)
    np.testing.assert_array_equal(blocks[1, 2], quantize(w[1, 2], name))
    assert quantize(np.empty((0, K), np.float32), name).shape == (0, blocks.shape[-1])


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_float_types_are_rounded(name):
    w = weights(2)
    expected = floats.from_float32(w, name)
    np.testing.assert_array_equal(quantize(w, name).view(expected.dtype), expected)


@pytest.mark.parametrize("name", SEARCHED)
def test_experts_have_an_importance_each(name):
    w, values = weights(2, 8), importance(2)
    blocks = quantize(w, name, values)
    for expert in range(2):
        np.testing.assert_array_equal(blocks[expert], quantize(w[expert], name, values[expert]))


@pytest.mark.slow
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", SEARCHED)
def test_any_part_of_the_rows_gives_the_same_bytes_and_changes_no_weight(name, given):
    """Rows of one block too, alone or left over behind 2^18 weights."""
    block_size = block_format(name).block_size
    n = (1 << 18) // block_size + 1
    w = np.random.default_rng(3).standard_normal((n, block_size)).astype(np.float32)
    values = importance()[:block_size] if given else None
    before = w.copy()
    blocks = quantize(w, name, values)
    for rows in (*(slice(i, i + 1) for i in range(60)), slice(n - 1, n), slice(60, 62), slice(0, n - 1)):
        np.testing.assert_array_equal(quantize(w[rows], name, values), blocks[rows])
    np.testing.assert_array_equal(w, before)


@pytest.mark.parametrize("name", SEARCHED)
def test_only_ratios_of_importance_matter(name):
    w, values = weights(8), importance()
    # A power of two, so that the ratios are the same to the last bit.
    np.testing.assert_array_equal(quantize(w, name, values * 1024), quantize(w, name, values))
    np.testing.assert_array_equal(quantize(w, name, 0 * values), quantize(w, name))


@pytest.mark.parametrize("name", SEARCHED)
def test_importance_of_float64_and_rows_that_are_not_contiguous(name):
    w, values = weights(8), importance()
    expected = quantize(w, name, values)
    np.testing.assert_array_equal(quantize(np.asfortranarray(w), name, values.astype(np.float64)), expected)


@pytest.mark.parametrize("name", ["F16", "Q8_0", "Q4_K"])
def test_mlx_arrays_come_back_as_mlx_arrays(name):
    mx = pytest.importorskip("mlx.core")
    w, values = weights(2), importance()
    blocks = quantize(mx.array(w), name, mx.array(values))
    assert isinstance(blocks, mx.array)
    np.testing.assert_array_equal(np.array(blocks), quantize(w, name, values))
    with pytest.raises(FormatError, match=r"weights are float32 \[..., K\], got BF16 \[2, 512\]"):
        quantize(mx.array(w).astype(mx.bfloat16), name)
    with pytest.raises(FormatError, match="w must be a NumPy or mlx array, got list"):
        quantize(w.tolist(), name)


@pytest.mark.parametrize("name", ENCODABLE)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(name, value):
    w = weights(2)
    w[1, 77] = value
    with pytest.raises(FormatError, match=f"{name}: a weight is NaN or infinite"):
        quantize(w, name)


@pytest.mark.parametrize("name", SEARCHED)
def test_rows_that_are_not_whole_blocks_are_refused(name):
    size = block_format(name).block_size
    with pytest.raises(FormatError, match=f"{name}: a row is whole blocks of {size} weights, got {size + 16}"):
        quantize(np.zeros((2, size + 16), np.float32), name)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones(K - 1), r"one value for each of 512 columns, got \[511\]"),
        (np.ones((3, K)), r"shape \[3, 512\] is one row for each expert"),
        (np.ones((1, 1, K)), r"one value for each of 512 columns, got \[1, 1, 512\]"),
        (np.full(K, -0.5), "not negative, got -0.5"),
        (np.full(K, np.nan), "not negative, got nan"),
        (np.full(K, np.inf), "not negative, got inf"),
    ],
)
def test_importance_that_does_not_fit_is_refused(values, message):
    with pytest.raises(FormatError, match=message):
        quantize(weights(2, 4), "Q4_K", values)


def test_other_types_dtypes_and_back_ends_are_refused():
    with pytest.raises(FormatError, match="'IQ2_XS' cannot be encoded: the types that can are F32, F16"):
        quantize(weights(2), "IQ2_XS")
    with pytest.raises(FormatError, match=r"weights are float32 \[..., K\], got float64 \[2, 512\]"):
        quantize(weights(2).astype(np.float64), "Q4_K")
    with pytest.raises(FormatError, match=r"got F32 \[\]"):
        quantize(np.zeros((), np.float32), "Q4_K")
    with pytest.raises(BackendError, match="unknown back end 'cuda'"):
        quantize(weights(2), "Q4_K", backend="cuda")


def test_float16_overflow_is_refused():
    with pytest.raises(FormatError, match=r"F16: the weight -70000 is beyond"):
        quantize(np.full((1, K), -7e4, np.float32), "F16")


def test_encoding_needs_numpy_alone():
    code = (
        "import sys, numpy as np\nfrom mlxq.quantizers.ggml import ENCODABLE, quantize\n"
        "for name in ENCODABLE: quantize(np.ones((2, 256), np.float32), name)\n"
        "print([m for m in ('mlx', 'gguf', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    expected = "[]\n" if sys.platform != "darwin" else "['mlx']\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")
