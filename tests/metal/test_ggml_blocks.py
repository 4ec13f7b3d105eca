"""Metal kernels on ggml blocks: weights bit for bit the reference's, products against float64, bad input."""

from __future__ import annotations

import covering
import mlx.core as mx
import numpy as np
import pytest
from random_blocks import random_blocks

from mlxq import ops
from mlxq.errors import BackendError, FormatError
from mlxq.formats import ggml
from mlxq.formats.floats import from_float32, to_float32
from mlxq.formats.geometry import block_format
from mlxq.ops import metal_blocks
from mlxq.ops.arrays import mlx_dtype, to_numpy
from mlxq.ops.metal_blocks import METAL_TYPES

DTYPES = ("F32", "F16", "BF16")
#: Bound of max |error| / max |y|. Half floats: the rounding of the result, half a unit in the last place of at most
#: max |y| (2^-11 and 2^-8 of it, relative), plus float32's. Float32: sums of at most some hundreds of terms each.
BOUND = {"F32": 1e-6, "F16": 5e-4, "BF16": 4e-3}


def _x(*shape: int, dtype: str = "F32", seed: int = 1) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(mlx_dtype(dtype))


def _float64(a: mx.array) -> np.ndarray:
    return np.array(a.astype(mx.float32)).astype(np.float64)


def _check_product(y: mx.array, expected: np.ndarray, dtype: str) -> None:
    assert y.shape == expected.shape
    assert y.dtype == mlx_dtype(dtype)
    assert np.abs(_float64(y) - expected).max() <= BOUND[dtype] * np.abs(expected).max()


def _check_matmul(name: str, M: int, N: int, K: int, dtype: str) -> None:
    blocks = random_blocks(name, (N, K), seed=N)
    x = _x(M, K, dtype=dtype)
    expected = _float64(x) @ ggml.dequantize(blocks, name).astype(np.float64).T
    _check_product(metal_blocks.block_matmul(x, mx.array(blocks), name), expected, dtype)


def _quick_or_slow(cases: list, quick: set) -> list:
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.slow) for case in cases]


_EVERY = [(name, dtype) for name in METAL_TYPES for dtype in DTYPES]
_QUICK = {*((name, "F32") for name in METAL_TYPES), ("Q4_0", "F16"), ("Q6_K", "BF16")}


@pytest.mark.parametrize(("name", "dtype"), _quick_or_slow(_EVERY, _QUICK))
def test_dequantize_is_the_reference_bit_for_bit(metal, name, dtype) -> None:
    """With scales of a common size, and with all that two bytes can be: infinite, too large for float16, denormal."""
    f = block_format(name)
    blocks = random_blocks(name, (3, 5 * f.block_size))
    anything = np.random.default_rng(1).integers(0, 256, (40, blocks.shape[1]), np.uint8)
    blocks = np.concatenate([blocks, anything])
    with np.errstate(all="ignore"):
        expected = from_float32(ggml.dequantize(blocks, name), dtype)
        number = ~np.isnan(to_float32(expected, dtype))
    w = to_numpy(metal_blocks.block_dequantize(mx.array(blocks), name, dtype))
    bits = f"u{w.itemsize}"
    assert number[:3].all()
    assert np.array_equal(w.view(bits)[number], expected.view(bits)[number])
    assert np.isnan(to_float32(w, dtype)[~number]).all()


@pytest.mark.parametrize("name", METAL_TYPES)
def test_one_row(metal, name) -> None:
    size = block_format(name).block_size
    _check_matmul(name, 1, 37, 1024 + 3 * size, "F32")


@pytest.mark.parametrize(("name", "M"), [("Q4_K", 2), ("Q6_K", 3), ("Q8_0", 9), ("Q4_0", 16), ("Q3_K", 2)])
def test_few_rows(metal, name, M) -> None:
    _check_matmul(name, M, 5, 3 * block_format(name).block_size, "F16")


@pytest.mark.parametrize(("name", "M"), [("Q4_K", 33), ("Q6_K", 17), ("Q5_0", 17), ("Q2_K", 20)])
def test_many_rows(metal, name, M) -> None:
    size = block_format(name).block_size
    _check_matmul(name, M, 37, 256 + size, "F32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 4, 40])
def test_dtypes(metal, M, dtype) -> None:
    _check_matmul("Q5_K", M, 5, 512, dtype)


@pytest.mark.parametrize("M", [1, 3, 17])
def test_one_output_and_one_block(metal, M) -> None:
    _check_matmul("Q4_0", M, 1, 32, "F32")


@pytest.mark.parametrize("order", ["reverse", "random"])
@pytest.mark.parametrize("M", [1, 2, 17])
def test_lane_orders(metal, M, order) -> None:
    with metal.options(order=order):
        _check_matmul("Q6_K", M, 13, 768, "F32")


@pytest.mark.slow
@pytest.mark.parametrize("name", METAL_TYPES)
def test_every_number_of_rows(metal, name) -> None:
    """Kernels for each number of rows, of a third of the types each, with dtypes, shapes and lane orders in turn."""
    size = block_format(name).block_size
    shapes = [(1, size), (5, 3 * size), (37, 1024 + 3 * size), (9, 2048)]
    turn = METAL_TYPES.index(name)
    for M in (*range(1, 18), 33, 65):
        if not covering.EVERY and (M + turn) % 3:
            continue
        N, K = shapes[M % 4]
        with metal.options(order=("forward", "reverse", "random")[M // 4 % 3]):
            _check_matmul(name, M, N, K, DTYPES[M % 3])


#: Each type with one dtype, in turn.
_LONG = [(n, d) for i, n in enumerate(METAL_TYPES) for j, d in enumerate(DTYPES) if covering.EVERY or i % 3 == j]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), _LONG)
def test_long_rows(metal, name, dtype) -> None:
    with metal.options(mode="fast"):
        for M in (1, 2, 33):
            _check_matmul(name, M, 70, 4096, dtype)


def test_rows_of_another_array_are_aligned_for_their_loads(metal) -> None:
    blocks = random_blocks("Q6_K", (9, 256))
    x = _x(1, 256)
    expected = _float64(x) @ ggml.dequantize(blocks, "Q6_K").astype(np.float64).T
    _check_product(metal_blocks.block_matmul(x, mx.array(blocks)[1:], "Q6_K"), expected[:, 1:], "F32")


def test_columns_of_another_array(metal) -> None:
    blocks = random_blocks("Q4_0", (9, 96))
    x = _x(2, 64)
    part = np.ascontiguousarray(blocks[:, 18:54])
    expected = _float64(x) @ ggml.dequantize(part, "Q4_0").astype(np.float64).T
    _check_product(metal_blocks.block_matmul(x, mx.array(blocks)[:, 18:54], "Q4_0"), expected, "F32")
    _check_product(
        metal_blocks.block_matmul(_x(64, 2).T, mx.array(part), "Q4_0"),
        _float64(_x(64, 2).T) @ (ggml.dequantize(part, "Q4_0").astype(np.float64).T),
        "F32",
    )


def test_leading_axes_and_empty(metal) -> None:
    blocks = mx.array(random_blocks("Q8_0", (5, 64)))
    y = metal_blocks.block_matmul(_x(2, 3, 64), blocks, "Q8_0")
    assert y.shape == (2, 3, 5)
    assert mx.array_equal(y.reshape(6, 5), metal_blocks.block_matmul(_x(2, 3, 64).reshape(6, 64), blocks, "Q8_0"))
    assert metal_blocks.block_matmul(_x(64), blocks, "Q8_0").shape == (5,)
    launches = len(metal.launches)
    assert metal_blocks.block_matmul(mx.zeros((0, 64)), blocks, "Q8_0").shape == (0, 5)
    assert metal_blocks.block_matmul(_x(2, 64), blocks[:0], "Q8_0").shape == (2, 0)
    assert metal_blocks.block_dequantize(blocks[:0], "Q8_0", "F16").shape == (0, 64)
    assert len(metal.launches) == launches


def test_infinite_and_huge_x(metal) -> None:
    blocks = random_blocks("Q4_K", (3, 256))
    w = ggml.dequantize(blocks, "Q4_K").astype(np.float64)
    x = _x(1, 256) * 1e30
    _check_product(metal_blocks.block_matmul(x, mx.array(blocks), "Q4_K"), _float64(x) @ w.T, "F32")
    x[0, 3] = float("nan")
    assert np.isnan(np.array(metal_blocks.block_matmul(x, mx.array(blocks), "Q4_K"))).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((mx.zeros((1, 64)), mx.zeros((5, 18), mx.uint8), "Q4_0"), FormatError, "x has 64 columns, but .* multiply 32"),
        ((mx.zeros((1, 32)), mx.zeros((5, 19), mx.uint8), "Q4_0"), FormatError, "whole blocks of 18 bytes"),
        ((mx.zeros((1, 32)), mx.zeros((5, 18), mx.int8), "Q4_0"), FormatError, "blocks must be uint8 bytes, got int8"),
        ((mx.zeros((1, 32), mx.int32), mx.zeros((5, 18), mx.uint8), "Q4_0"), FormatError, "x must be float32"),
        ((mx.zeros((1, 32)), mx.zeros((2, 5, 18), mx.uint8), "Q4_0"), FormatError, r"blocks must be \[N, row_bytes\]"),
        ((mx.zeros((1, 32)), mx.zeros((5, 18), mx.uint8), "Q9_0"), FormatError, "ggml type 'Q9_0' is not known"),
        (
            (mx.zeros((1, 256)), mx.zeros((5, 66), mx.uint8), "IQ2_XXS"),
            BackendError,
            "no kernel for .* 'IQ2_XXS'",
        ),
    ],
)
def test_bad_input_is_refused_before_a_launch(metal, arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        ops.block_matmul(*arguments[:2], type_name=arguments[2], backend="metal")
    with pytest.raises(BackendError, match="no kernel for ggml type 'TQ2_0'; it has for Q4_0, "):
        ops.block_dequantize(mx.zeros((1, 66), mx.uint8), type_name="TQ2_0", backend="metal")
    with pytest.raises(FormatError, match="dtype must be one of F32, F16, BF16"):
        ops.block_dequantize(mx.zeros((1, 18), mx.uint8), type_name="Q4_0", dtype="F64", backend="metal")
    assert not metal.launches
