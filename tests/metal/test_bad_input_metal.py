"""What the Metal kernels refuse, at which nothing is launched, and inputs of odd layouts and few elements."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from random_blocks import random_blocks

from mlxq import ops
from mlxq.errors import BackendError
from mlxq.formats import ggml
from mlxq.formats.geometry import BLOCK_FORMATS, block_format
from mlxq.ops.dispatch import METAL_TYPES

GRID = {"bits": 4, "group_size": 32, "backend": "metal"}
WITHOUT_KERNELS = [name for name in BLOCK_FORMATS if name not in METAL_TYPES]


@pytest.fixture
def no_launch(metal):
    yield metal
    assert not metal.launches


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(y: object, expected: object) -> bool:
    y, expected = np.array(y, np.float64), np.array(expected, np.float64)
    assert y.shape == expected.shape
    return bool(np.abs(y - expected).max() <= 1e-6 * np.abs(expected).max())


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("name", WITHOUT_KERNELS)
def test_a_type_without_kernels(name):
    f = block_format(name)
    blocks, how = mx.zeros((2, 3, f.type_size), mx.uint8), {"type_name": name, "backend": "metal"}
    x = mx.zeros((2, 1, f.block_size))
    for call in (
        lambda: ops.block_dequantize(blocks, **how),
        lambda: ops.block_matmul(x, blocks[0], **how),
        lambda: ops.gather_block_matmul(x, blocks, mx.array([0, 1]), **how),
    ):
        with pytest.raises(BackendError, match=f"no kernel for ggml type '{name}'; it has for Q4_0, "):
            call()


@pytest.mark.usefixtures("no_launch")
def test_more_than_a_launch_counts():
    """The arrays are never made: mlx makes them when they are needed."""
    packed = (mx.zeros((1 << 28, 4), mx.uint32), *(mx.zeros((1 << 28, 1), mx.float16),) * 2)
    x = mx.zeros((1 << 16, 1 << 15, 32), mx.float16)
    blocks, how = mx.zeros((1 << 28, 18), mx.uint8), {"type_name": "Q4_0", "backend": "metal"}
    few = [a[:8] for a in packed]
    stack = [a[None] for a in few]
    for call, words in (
        (lambda: ops.quantized_matmul(x[0, :1], *packed, **GRID), "rows of weights to 134217727, got 268435456"),
        (lambda: ops.quantized_matmul(x, *few, **GRID), "M to 2147483647, got 2147483648"),
        (lambda: ops.gather_quantized_matmul(x, *stack, mx.array([0]), **GRID), "products to 2147483647"),
        (lambda: ops.dequantize(*(mx.zeros((8, *a.shape), a.dtype) for a in packed), **GRID), "threads"),
        (lambda: ops.quantize(mx.zeros((1 << 15, 1 << 19), mx.float16), **GRID), "threads to 2147483647"),
        (lambda: ops.block_matmul(x[0, :1], blocks, **how), "rows of weights to 134217727, got 268435456"),
        (lambda: ops.block_matmul(x, blocks[:8], **how), "M to 2147483647, got 2147483648"),
        (lambda: ops.gather_block_matmul(x, blocks[None, :8], mx.array([0]), **how), "products to 2147483647"),
        (lambda: ops.block_dequantize(mx.zeros((8, *blocks.shape), mx.uint8), **how), "threads to 2147483647"),
    ):
        with pytest.raises(BackendError, match=words):
            call()


@pytest.mark.usefixtures("no_launch")
def test_nothing_is_launched_for_nothing():
    packed = [mx.zeros((3, 8, 8), mx.uint32), *[mx.zeros((3, 8, 2), mx.float16)] * 2]
    blocks, x, indices = mx.zeros((3, 8, 36), mx.uint8), mx.zeros((2, 1, 64), mx.float16), mx.array([0, 2])
    how = {"type_name": "Q4_0", "backend": "metal"}
    for none in (x[:, :0], x[:0]):
        few = indices[: none.shape[0]]
        lead = none.shape[:-1]
        assert ops.quantized_matmul(none, *(a[0] for a in packed), **GRID).shape == (*lead, 8)
        assert ops.quantized_matmul(none[..., :8], *(a[0] for a in packed), transpose=False, **GRID).shape == (
            *lead,
            64,
        )
        assert ops.gather_quantized_matmul(none, *packed, few, **GRID).shape == (*lead, 8)
        assert ops.block_matmul(none, blocks[0], **how).shape == (*lead, 8)
        assert ops.gather_block_matmul(none, blocks, few, **how).shape == (*lead, 8)
        assert [a.shape for a in ops.quantize(none, **GRID)] == [(*lead, 8), (*lead, 2), (*lead, 2)]
    assert ops.quantized_matmul(x, *(a[0, :0] for a in packed), **GRID).shape == (2, 1, 0)
    assert ops.dequantize(*(a[:, :0] for a in packed), **GRID).shape == (3, 0, 64)
    assert ops.block_dequantize(blocks[:0], **how).shape == (0, 8, 64)
    assert ops.block_matmul(x, blocks[0, :0], **how).shape == (2, 1, 0)


def test_arrays_that_are_not_contiguous_are_copied(metal):
    """Every second row and column, and axes in another order: what comes out is that of a copy."""
    w = normal(3, 16, 64)
    x = mx.array(normal(64, 2, 3)).T
    indices = mx.array([[2, 9], [0, 9], [1, 9]])[:, 0]
    contiguous = ops.quantize(w, bits=4, group_size=32, backend="numpy")
    strided = [mx.array(np.repeat(a, 2, axis=1))[:, ::2] for a in contiguous]
    flipped = [mx.array(np.ascontiguousarray(a.swapaxes(0, 2))).swapaxes(0, 2) for a in contiguous]
    w_hat = ops.dequantize(*contiguous, bits=4, group_size=32, backend="numpy")
    for packed in (strided, flipped):
        assert np.array_equal(np.array(ops.dequantize(*packed, **GRID)), w_hat)
        assert close(ops.quantized_matmul(x, *(a[1] for a in packed), **GRID), np.array(x) @ w_hat[1].T)
        y = ops.gather_quantized_matmul(x, *packed, indices, **GRID)
        assert close(y, np.array(x) @ w_hat[[2, 0, 1]].swapaxes(1, 2))
    halves = mx.array(w.swapaxes(1, 2).copy()).swapaxes(1, 2)
    for a, b in zip(ops.quantize(halves, **GRID), ops.quantize(mx.array(w), **GRID), strict=True):
        assert mx.array_equal(a, b)
    blocks, how = random_blocks("Q4_1", (3, 16, 64)), {"type_name": "Q4_1", "backend": "metal"}
    w = ggml.dequantize(blocks, "Q4_1")
    for held in (mx.array(np.repeat(blocks, 2, axis=1))[:, ::2], mx.array(blocks.swapaxes(0, 2).copy()).swapaxes(0, 2)):
        assert np.array_equal(np.array(ops.block_dequantize(held, **how)), w)
        assert close(ops.block_matmul(x, held[1], **how), np.array(x) @ w[1].T)
        y = ops.gather_block_matmul(x, held, indices, **how)
        assert close(y, np.array(x) @ w[[2, 0, 1]].swapaxes(1, 2))


@pytest.mark.parametrize("group_size", [16, 32])
def test_fewer_than_eight_elements(metal, group_size):
    """mlx passes them in another address space: two words of codes, one scale, one index, one value of x."""
    grid = {"bits": 2, "group_size": group_size}
    packed = ops.quantize(normal(1, 1, 32), **grid, backend="numpy")
    w = ops.dequantize(*packed, **grid, backend="numpy")[0]
    held, index, grid = [mx.array(a) for a in packed], mx.array([0]), grid | {"backend": "metal"}
    for inner in (32, 1):
        transpose = inner == 32
        x = normal(1, 1, inner)
        expected = x @ (w.T if transpose else w)
        assert close(ops.quantized_matmul(mx.array(x), *(a[0] for a in held), transpose=transpose, **grid), expected)
        y = ops.gather_quantized_matmul(mx.array(x), *held, index, transpose=transpose, **grid)
        assert close(y, expected)
    assert np.array_equal(np.array(ops.dequantize(*held, **grid))[0], w)
    how = {"type_name": "Q8_0", "backend": "metal"}
    blocks = random_blocks("Q8_0", (1, 1, 32))
    w, x = ggml.dequantize(blocks, "Q8_0")[0], normal(1, 1, 32)
    assert close(ops.block_matmul(mx.array(x), mx.array(blocks[0]), **how), x @ w.T)
    assert close(ops.gather_block_matmul(mx.array(x), mx.array(blocks), index, **how), x @ w.T)
