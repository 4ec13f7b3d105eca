"""Products with weights that stay in ggml blocks: both back ends against float64, every type, every error."""

from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
from random_blocks import BLOCK_TYPES, random_blocks

from mlxq import ops
from mlxq.errors import FormatError
from mlxq.formats import ggml, kquants
from mlxq.formats.floats import from_float32, to_float32
from mlxq.formats.superblocks import K_TYPES
from mlxq.ops import blocks as block_products
from mlxq.ops.arrays import dtype_name, to_mlx, to_numpy

BACKENDS = ("numpy", "mlx")
#: Unit roundoff of each dtype.
ROUNDOFF = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}


def normal(shape, seed, dtype="F32") -> np.ndarray:
    return from_float32(np.random.default_rng(seed).standard_normal(shape).astype(np.float32), dtype)


def values(a) -> np.ndarray:
    a = to_numpy(a)
    return to_float32(a, dtype_name(a)).astype(np.float64)


def exact(x, blocks, name):
    """The product in float64, and what bounds its rounding: sum of |x| * (|scale * q| + |min|)."""
    w = ggml.dequantize(blocks, name).astype(np.float64)
    magnitude = np.abs(w)
    if name in K_TYPES and K_TYPES[name].has_mins:
        flat = blocks.reshape(-1, blocks.shape[-1] * 256 // w.shape[-1])
        mins = np.repeat(np.abs(kquants.scales(flat, name)[1]), K_TYPES[name].sub_block, axis=1)
        # scale * q = w + min.
        magnitude = magnitude + 2 * mins.reshape(w.shape)
    return values(x) @ w.T, np.abs(values(x)) @ magnitude.T


def assert_close(got, y, magnitude, K, dtype):
    """Standard bound for K products summed in any order, plus 8 for the operations on one; rounded once to `dtype`."""
    assert (dtype_name(got), got.shape) == (dtype, y.shape)
    error = np.abs(values(got) - y)
    assert (error <= (K + 8) * ROUNDOFF["F32"] * magnitude + ROUNDOFF[dtype] * np.abs(y) + 1e-7).all()


@pytest.mark.parametrize("dtype", ROUNDOFF)
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_every_type_is_multiplied_by_both_back_ends(name, dtype):
    N, K = 70, 768
    blocks = random_blocks(name, (N, K))
    for M in (1, 3, 16, 17):
        x = normal((M, K), M, dtype)
        y, magnitude = exact(x, blocks, name)
        assert np.abs(y).max() > 0.02
        for backend in BACKENDS:
            assert_close(ops.block_matmul(x, blocks, type_name=name, backend=backend), y, magnitude, K, dtype)


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q5_K", "Q6_K", "IQ3_S"])
@pytest.mark.parametrize("M", [1, 2, 20])
def test_matrices_of_several_parts_in_both_directions(monkeypatch, name, M):
    # 23 rows in parts of 5, and 5 blocks in parts of 2; many rows of x are multiplied with 8 rows of weights at a time.
    monkeypatch.setattr(block_products, "_PART_ROWS", 5)
    monkeypatch.setattr(block_products, "_PART", 2 * 256 * 5)
    monkeypatch.setattr(block_products, "_WIDE_PART", 8 * 1280)
    monkeypatch.setattr(block_products, "_scratch", block_products._Scratch())
    blocks = random_blocks(name, (23, 1280))
    x = normal((M, 1280), 1)
    y, magnitude = exact(x, blocks, name)
    assert_close(ops.block_matmul(x, blocks, type_name=name, backend="numpy"), y, magnitude, 1280, "F32")


@pytest.mark.parametrize("name", K_TYPES)
def test_arrays_that_are_not_contiguous(name):
    blocks = random_blocks(name, (12, 512))
    x = normal((4, 512), 2)
    y = ops.block_matmul(x, blocks, type_name=name)
    wide = np.repeat(blocks, 2, axis=1)[:, ::2]
    assert not wide.flags.c_contiguous
    assert np.array_equal(ops.block_matmul(x, wide, type_name=name), y)
    assert np.array_equal(ops.block_matmul(x, np.asfortranarray(blocks), type_name=name), y)
    # The order of x's memory may change the order of sums.
    assert_close(ops.block_matmul(np.asfortranarray(x), blocks, type_name=name), *exact(x, blocks, name), 512, "F32")
    assert np.array_equal(ops.block_matmul(x, blocks[::-2], type_name=name), y[:, ::-2])
    on_mlx = ops.block_matmul(mx.array(x), mx.array(blocks)[:, :], type_name=name)
    assert np.array_equal(np.array(on_mlx), y)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("dtype", ROUNDOFF)
def test_the_first_argument_decides_the_kind(backend, dtype):
    blocks = random_blocks("Q6_K", (3, 4, 256))
    x = normal((2, 1, 1, 256), 2, dtype)
    indices = np.array([[2], [0]])
    for convert, kind in ((to_numpy, np.ndarray), (to_mlx, mx.array)):
        own = blocks if kind is np.ndarray else mx.array(blocks)
        both = convert(x), mx.array(blocks) if kind is np.ndarray else blocks
        results = [
            ops.block_matmul(both[0], both[1][1], type_name="Q6_K", backend=backend),
            ops.gather_block_matmul(*both, indices, type_name="Q6_K", backend=backend),
            ops.block_dequantize(own, type_name="Q6_K", dtype=dtype, backend=backend),
        ]
        assert [r.shape for r in results] == [(2, 1, 1, 4), (2, 1, 1, 4), (3, 4, 256)]
        assert all(isinstance(r, kind) and dtype_name(r) == dtype for r in results)


@pytest.mark.parametrize("dtype", ROUNDOFF)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dequantize_is_the_formats_own(backend, dtype):
    for name in BLOCK_TYPES:
        blocks = random_blocks(name, (2, 3, 256))
        expected = from_float32(ggml.dequantize(blocks, name), dtype)
        assert np.array_equal(ops.block_dequantize(blocks, type_name=name, dtype=dtype, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["Q2_K", "Q6_K", "NVFP4", "IQ1_M"])
@pytest.mark.parametrize(("batch", "index_shape", "M"), [((5,), (5,), 1), ((2, 1), (2, 3), 2), ((1, 40), (1, 40), 1)])
def test_gathered_products_go_to_their_experts(backend, name, batch, index_shape, M):
    blocks = random_blocks(name, (4, 9, 512))
    x = normal((*batch, M, 512), 3)
    indices = np.random.default_rng(4).integers(0, 4, index_shape)
    got = ops.gather_block_matmul(x, blocks, indices, type_name=name, backend=backend)
    shape = np.broadcast_shapes(batch, index_shape)
    x, indices = np.broadcast_to(x, (*shape, M, 512)), np.broadcast_to(indices, shape)
    assert got.shape == (*shape, M, 9)
    for at in np.ndindex(shape):
        y, magnitude = exact(x[at], blocks[indices[at]], name)
        assert_close(got[at], y, magnitude, 512, "F32")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("M", "N"), [(0, 4), (3, 0), (0, 0)])
def test_no_rows_give_no_rows(backend, M, N):
    blocks = np.zeros((N, 210), np.uint8)
    assert ops.block_matmul(np.zeros((M, 256), np.float32), blocks, type_name="Q6_K", backend=backend).shape == (M, N)


def test_several_threads_multiply_at_once():
    blocks = random_blocks("Q6_K", (64, 2048))
    rows = normal((8, 1, 2048), 1)
    expected = [ops.block_matmul(x, blocks, type_name="Q6_K") for x in rows]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            results = list(pool.map(lambda x: ops.block_matmul(x, blocks, type_name="Q6_K"), rows))
            assert np.array_equal(results, expected)


@pytest.mark.parametrize("M", [1, 17])
@pytest.mark.parametrize("name", ["Q4_K", "IQ2_XS"])
@pytest.mark.filterwarnings("error")
def test_infinite_operands_go_through_without_a_word(M, name):
    blocks = random_blocks(name, (600, 256))
    x = normal((M, 256), 1)
    x[0, 3] = np.inf
    assert not np.isfinite(ops.block_matmul(x, blocks, type_name=name)[0]).any()
    # An infinite scale in the weights, too.
    blocks[5, :2] = np.array([np.inf], "<f2").view(np.uint8)
    assert not np.isfinite(ops.block_matmul(normal((M, 256), 1), blocks, type_name=name)[:, 5]).any()


X, BLOCKS = np.zeros((2, 256), np.float32), np.zeros((4, 210), np.uint8)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ops.block_matmul(X, BLOCKS, type_name="Q9_K"), ["block_matmul", "'Q9_K'", "Q6_K (14)"]),
        (lambda: ops.block_matmul(X, BLOCKS, type_name=14), ["type_name", "14"]),
        (lambda: ops.block_matmul(X, BLOCKS, type_name="Q4_K"), ["whole blocks of 144", "(4, 210)", "'Q4_K'"]),
        (lambda: ops.block_matmul(X, BLOCKS.view(np.int8), type_name="Q6_K"), ["uint8", "int8"]),
        (lambda: ops.block_matmul(X, BLOCKS[0], type_name="Q6_K"), ["[N, row_bytes]", "1 axes"]),
        (lambda: ops.block_matmul(X[:, :255], BLOCKS, type_name="Q6_K"), ["255 columns", "multiply 256"]),
        (lambda: ops.block_matmul(X.astype(int), BLOCKS, type_name="Q6_K"), ["x must be float32", "int64"]),
        (lambda: ops.block_matmul(X, BLOCKS.tolist(), type_name="Q6_K"), ["blocks must be a NumPy or mlx array"]),
        (lambda: ops.block_dequantize(BLOCKS, type_name="Q6_K", dtype="F64"), ["block_dequantize", "F32, F16, BF16"]),
        (
            lambda: ops.gather_block_matmul(X, BLOCKS, np.array([0]), type_name="Q6_K"),
            ["gather_block_matmul", "[experts, N, row_bytes]"],
        ),
        (
            lambda: ops.gather_block_matmul(X, BLOCKS[None], np.array([0.5]), type_name="Q6_K"),
            ["rhs_indices must be integers", "float64"],
        ),
        (
            lambda: ops.gather_block_matmul(X, BLOCKS[None], np.array([1]), type_name="Q6_K", backend="numpy"),
            ["0..0", "1..1"],
        ),
    ],
)
def test_errors_name_the_operation_the_rule_and_both_sides(call, words):
    with pytest.raises(FormatError) as error:
        call()
    assert all(word in str(error.value) for word in words), str(error.value)
