"""IQ4_NL and IQ4_XS: every byte decodes as the gguf package decodes it, and packing is the inverse of unpacking."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize

from mlxq.errors import FormatError
from mlxq.formats import iq4
from mlxq.formats.geometry import block_format


def random_blocks(name, n, seed=0):
    """Any bytes with a finite d, of both signs, down to subnormal numbers."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (n, block_format(name).type_size), dtype=np.uint8)
    d = (rng.normal(size=n) * 10.0 ** rng.integers(-7, 2, n)).astype("<f2")
    blocks[:, :2] = d.view(np.uint8).reshape(n, 2)
    return blocks


@pytest.mark.parametrize("name", iq4.IQ4_TYPES)
def test_decodes_bit_for_bit_as_gguf(name):
    # More than one chunk, and not a whole number of them.
    n = 65536 // block_format(name).block_size + 5
    blocks = random_blocks(name, n)
    expected = gguf_dequantize(blocks, GGMLQuantizationType[name])
    assert np.array_equal(iq4.dequantize(blocks, name).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", iq4.IQ4_TYPES)
def test_leading_axes_are_kept(name):
    geometry = block_format(name)
    blocks = random_blocks(name, 24)
    stacked = blocks.reshape(2, 3, 4 * geometry.type_size)
    w = iq4.dequantize(stacked, name)
    assert w.shape == (2, 3, 4 * geometry.block_size)
    assert np.array_equal(w.reshape(24, -1), iq4.dequantize(blocks, name))
    assert iq4.dequantize(blocks[:0], name).shape == (0, geometry.block_size)


@pytest.mark.parametrize("name", iq4.IQ4_TYPES)
def test_pack_is_the_inverse_of_unpack(name):
    blocks = random_blocks(name, 100)
    parts = iq4.unpack(blocks, name)
    assert parts.codes.max() == 15
    assert (parts.scales is None) == (name == "IQ4_NL")
    if parts.scales is not None:
        assert (parts.scales.min(), parts.scales.max()) == (-32, 31)
    assert np.array_equal(iq4.pack(parts, name), blocks)


def test_values_ascend_and_are_those_of_gguf():
    from gguf.quants import IQ4_NL

    assert tuple(iq4.VALUES) == IQ4_NL.kvalues
    assert (np.diff(iq4.VALUES.astype(int)) > 0).all()


def test_errors_name_the_rule():
    with pytest.raises(FormatError, match=r"'Q4_0' is not one of IQ4_NL, IQ4_XS"):
        iq4.dequantize(np.zeros((1, 18), np.uint8), "Q4_0")
    with pytest.raises(FormatError, match="whole blocks of 18 bytes"):
        iq4.dequantize(np.zeros((1, 19), np.uint8), "IQ4_NL")
    with pytest.raises(FormatError, match="uint8 bytes, got float32"):
        iq4.dequantize(np.zeros((1, 18), np.float32), "IQ4_NL")
    with pytest.raises(FormatError, match=r"blocks are \[n, 136\] bytes"):
        iq4.unpack(np.zeros((1, 272), np.uint8), "IQ4_XS")
    codes, d = np.zeros((1, 256), np.uint8), np.zeros(1, np.float16)
    with pytest.raises(FormatError, match=r"scales must be int8 \(1, 8\), got None"):
        iq4.pack(iq4.IQ4Blocks(d, codes), "IQ4_XS")
    with pytest.raises(FormatError, match=r"codes must be uint8 \(1, 32\), got uint8 \(1, 256\)"):
        iq4.pack(iq4.IQ4Blocks(d, codes), "IQ4_NL")
