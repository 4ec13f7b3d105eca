"""Products with chosen experts in ggml blocks: one by one, and sorted into tiles."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from random_blocks import random_blocks

from mlxq import ops
from mlxq.errors import BackendError, FormatError
from mlxq.formats import ggml
from mlxq.ops import metal_blocks


def _check(name: str, x_shape: tuple, indices: np.ndarray, E: int, N: int, kernel: str, metal, **options) -> None:
    K = x_shape[-1]
    blocks = random_blocks(name, (E, N, K))
    x = np.random.default_rng(0).standard_normal(x_shape).astype(np.float32)
    y = metal_blocks.gather_block_matmul(mx.array(x), mx.array(blocks), mx.array(indices), name, **options)
    w = ggml.dequantize(blocks, name).astype(np.float64)
    batch = np.broadcast_shapes(x.shape[:-2], indices.shape)
    matrices = np.broadcast_to(x, (*batch, *x.shape[-2:])).astype(np.float64)
    expected = matrices @ w[np.broadcast_to(indices, batch)].swapaxes(-1, -2)
    assert y.shape == expected.shape
    assert np.abs(np.array(y) - expected).max() <= 1e-6 * np.abs(expected).max()
    if not metal.real:
        assert metal.launches[-1][0].startswith(kernel)


def test_token_with_several_experts(metal) -> None:
    indices = np.array([[2, 0], [1, 2], [0, 1]], np.uint32)
    _check("Q4_K", (3, 1, 1, 256), indices, 3, 9, "ggml_gather_qmv_q4_k_float32_m_1", metal)


def test_few_rows_for_each_expert(metal) -> None:
    _check("Q8_0", (4, 3, 64), np.array([1, 1, 0, 4], np.int32), 5, 7, "ggml_gather_qmv_q8_0_float32_m_3", metal)


@pytest.mark.parametrize("sorted_indices", [False, True])
def test_many_tokens_are_sorted_into_tiles(metal, sorted_indices) -> None:
    indices = np.random.default_rng(1).integers(0, 4, 70)
    if sorted_indices:
        indices.sort()
    options = {"sorted_indices": sorted_indices}
    _check("Q6_K", (70, 1, 256), indices, 4, 37, "ggml_gather_qmm_q6_k", metal, **options)


def test_long_matrices_of_experts(metal) -> None:
    _check("Q4_0", (2, 1, 18, 96), np.array([[2, 0], [1, 2]]), 3, 33, "ggml_gather_qmm_q4_0", metal)


def test_unsorted_indices_said_to_be_sorted_are_only_slower(metal) -> None:
    indices = np.tile([3, 0, 2], 12)
    _check("Q5_1", (36, 1, 32), indices, 4, 5, "ggml_gather_qmm_q5_1", metal, sorted_indices=True)


@pytest.mark.parametrize("count", [3, 40])
def test_missing_expert_is_not_a_number(metal, count) -> None:
    blocks = mx.array(random_blocks("Q4_0", (2, 5, 32)))
    indices = np.zeros(count, np.int32)
    indices[1], indices[2] = 2, -1
    y = np.array(metal_blocks.gather_block_matmul(mx.ones((count, 1, 32)), blocks, mx.array(indices), "Q4_0"))
    assert np.isnan(y[1:3]).all()
    assert np.isfinite(np.delete(y, [1, 2], axis=0)).all()


def test_empty(metal) -> None:
    blocks = mx.array(random_blocks("Q4_0", (2, 5, 32)))
    none = mx.zeros((0,), mx.uint32)
    assert metal_blocks.gather_block_matmul(mx.zeros((0, 1, 32)), blocks, none, "Q4_0").shape == (0, 1, 5)
    assert not metal.launches


def test_bad_input_is_refused_before_a_launch(metal) -> None:
    x, blocks, indices = mx.zeros((3, 1, 32)), mx.zeros((2, 5, 18), mx.uint8), mx.zeros((3,), mx.uint32)
    for arguments, error, message in (
        ((x, blocks, mx.zeros((2,), mx.uint32), "Q4_0"), FormatError, "do not broadcast"),
        ((x, blocks, mx.zeros((3,)), "Q4_0"), FormatError, "rhs_indices must be integers"),
        ((x, blocks[0], indices, "Q4_0"), FormatError, r"blocks must be \[experts, N, row_bytes\]"),
        ((x, mx.zeros((2, 5, 17), mx.uint8), indices, "MXFP4"), BackendError, "no kernel for ggml type 'MXFP4'"),
    ):
        with pytest.raises(error, match=message):
            ops.gather_block_matmul(*arguments[:3], type_name=arguments[3], backend="metal")
    assert not metal.launches
