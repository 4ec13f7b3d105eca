"""Weights that already lie on a type's grid are encoded without error, whoever made them and with whatever `d`."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from gguf.quants import quantize as gguf_quantize

from mlxq.formats import iq4, kquants
from mlxq.formats.geometry import block_format
from mlxq.formats.superblocks import SuperBlocks
from mlxq.quantizers.ggml import iq4 as ggml_iq4
from mlxq.quantizers.ggml import symmetric as ggml_symmetric

SUPER_BLOCKS = ("Q3_K", "Q6_K", "IQ4_XS")
LIMITS = {"Q3_K": (8, -32, 31), "Q6_K": (64, -128, 127), "IQ4_XS": (16, -32, 31)}


def encode(w, name, importance=None):
    encoder = ggml_iq4 if name.startswith("IQ4") else ggml_symmetric
    return encoder.quantize(w, name, importance)


def decode(blocks, name):
    return dequantize(blocks, GGMLQuantizationType[name])


def importances(K):
    importance = np.random.default_rng(1).lognormal(0, 1, K)
    return (importance / importance.mean()).astype(np.float32)


def random_blocks(name, n, seed=0):
    """Super-blocks with any scales and codes: not what an encoder would choose, but what a file may hold."""
    rng = np.random.default_rng(seed)
    n_codes, low, high = LIMITS[name]
    n_groups = 8 if name == "IQ4_XS" else 16
    d = (rng.normal(size=n) * 1e-3).astype(np.float16)
    scales = rng.integers(low, high + 1, (n, n_groups)).astype(np.int8)
    scales[:, 0] = low
    codes = rng.integers(0, n_codes, (n, 256)).astype(np.uint8)
    # The largest magnitude of a group is near the end of the range, as encoders have it.
    codes[:, :: 256 // n_groups] = rng.choice([0, 1, n_codes - 1], (n, n_groups))
    if name == "IQ4_XS":
        return iq4.pack(iq4.IQ4Blocks(d, codes, scales), name)
    return kquants.pack(SuperBlocks(d, scales, codes), name)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", SUPER_BLOCKS)
def test_any_super_block_survives(name, given):
    w = decode(random_blocks(name, 300), name).reshape(100, 768)
    again = decode(encode(w, name, importances(768) if given else None), name)
    assert np.array_equal(again, w)


@pytest.mark.parametrize("by", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", [*SUPER_BLOCKS, "IQ4_NL"])
def test_what_ggml_encoded_survives(name, given, by):
    """`by`: ggml encoded by importance; `given`: so do we."""
    libgguf = pytest.importorskip("libgguf")
    importance = importances(768)
    w = (np.random.default_rng(0).normal(size=(64, 768)) * 0.02).astype(np.float32)
    w = decode(libgguf.quantize_rows(w, GGMLQuantizationType[name], importance if by else None), name)
    assert np.array_equal(decode(encode(w, name, importance if given else None), name), w)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q8_0"])
def test_what_the_reference_rule_encoded_keeps_its_values(name, given):
    w = (np.random.default_rng(0).normal(size=(64, 768)) * 0.02).astype(np.float32)
    blocks = gguf_quantize(w, GGMLQuantizationType[name])
    w = decode(blocks, name)
    again = encode(w, name, importances(768) if given else None)
    assert np.array_equal(decode(again, name), w)
    if not given:
        assert np.array_equal(again, blocks)


@pytest.mark.parametrize("name", SUPER_BLOCKS)
def test_only_exact_blocks_are_taken_and_their_neighbours_are_searched(name):
    w = decode(random_blocks(name, 8), name)
    w[3] *= np.float32(1 + 1e-4 * np.arange(256) / 256)
    w[5] = (np.random.default_rng(2).normal(size=256) * 0.02).astype(np.float32)
    w[6, 17] = np.nextafter(w[6, 17], np.float32(1))
    again = decode(encode(w, name), name)
    exact = (again == w).all(axis=1)
    assert exact.tolist() == [True, True, True, False, True, False, False, True]
    # No block loses by it: a step is at most 1/3 of the largest weight (3 bits), so the error is below it.
    assert (np.abs(again - w).max(axis=1) < np.abs(w).max(axis=1) / 3).all()


@pytest.mark.parametrize("name", ["Q3_K", "Q6_K"])
def test_few_values_fit_many_grids(name):
    """Signs times a power of two, and one weight among zeros: any of the grids that fit will do."""
    signs = np.where(np.random.default_rng(0).random((4, 256)) < 0.5, -1, 1).astype(np.float32) / 64
    assert np.array_equal(decode(encode(signs, name), name), signs)
    alone = np.zeros((2, 256), np.float32)
    alone[0, 100], alone[1, 0] = 0.3125, -3
    assert np.array_equal(decode(encode(alone, name), name), alone)


@pytest.mark.parametrize("name", SUPER_BLOCKS)
def test_blocks_keep_their_size(name):
    blocks = random_blocks(name, 6).reshape(2, -1)
    assert encode(decode(blocks, name), name).shape == blocks.shape == (2, 3 * block_format(name).type_size)
