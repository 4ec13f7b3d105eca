"""Fused kernels against float64: gate and up with their function, several products at once, x in another order."""

from __future__ import annotations

import math

import affine_cases
import covering
import mlx.core as mx
import numpy as np
import pytest
from affine_cases import DTYPES, TOLERANCES
from random_blocks import random_blocks

from mlxq import ops
from mlxq.errors import BackendError
from mlxq.formats import ggml
from mlxq.formats.geometry import AFFINE_BITS, block_format
from mlxq.ops.metal_blocks import METAL_TYPES

GELU = 0.7978845608028654
#: Written out here once more, in float64.
FUNCTIONS = {
    "silu": lambda g: g / (1 + np.exp(-g)),
    "gelu_approx": lambda g: g / 2 * (1 + np.tanh(GELU * (g + 0.044715 * g**3))),
    "gelu": lambda g: g / 2 * np.vectorize(math.erfc)(-g / math.sqrt(2)),
}
ORDERS = ("forward", "reverse", "random")
METAL = {"backend": "metal"}
QUICK_TYPES = ("Q4_K", "Q6_K", "Q8_0", "Q2_K")
TYPES = [t if t in QUICK_TYPES else pytest.param(t, marks=pytest.mark.slow) for t in METAL_TYPES]


def blocks(name: str, N: int, K: int, seed: int) -> tuple[ops.BlockWeights, np.ndarray]:
    made = random_blocks(name, (N, K), seed)
    return ops.BlockWeights(mx.array(made), name), ggml.dequantize(made, name).astype(np.float64)


def packed(bits: int, group_size: int, dtype: str, N: int, K: int, seed: int) -> tuple[ops.PackedWeights, np.ndarray]:
    """Weights so small that outputs are about as large as x."""
    made = affine_cases.packed((N, K), bits, group_size, DTYPES[dtype], seed)
    size = np.float32(2.0 ** -math.ceil(math.log2(K) / 2))
    made = made._replace(scales=made.scales * size, biases=made.biases * size)
    made = made._replace(scales=made.scales.astype(DTYPES[dtype]), biases=made.biases.astype(DTYPES[dtype]))
    return ops.PackedWeights(*made, bits, group_size), made.decoded(bits, group_size)


def order_of(K: int) -> mx.array:
    return mx.array(np.random.default_rng(K).permutation(K).astype(np.int32))


def check_gated(gate, up, M: int, dtype: str, activation: str = "silu", permuted: bool = False) -> None:
    (g, g_w), (u, u_w) = gate, up
    K = g_w.shape[1]
    x = affine_cases.normal((M, K), DTYPES[dtype])
    order = order_of(K) if permuted else None
    y = ops.gated_projection(x, g, u, activation=activation, g_idx=order, **METAL)
    assert y.dtype == DTYPES[dtype]
    wide = affine_cases.doubles(x)[:, np.array(order)] if permuted else affine_cases.doubles(x)
    g, u = wide @ g_w.T, wide @ u_w.T
    a = FUNCTIONS[activation](g)
    # Each product has float32's error; the slope of the function is at most 1.13. Half floats round the result, too.
    allowed = 1e-6 * (1.13 * np.abs(g).max() * np.abs(u) + np.abs(a) * np.abs(u).max())
    if dtype != "f32":
        allowed += TOLERANCES[DTYPES[dtype]] * np.abs(a * u).max()
    assert (np.abs(affine_cases.doubles(y) - a * u) <= allowed).all()


def check_each(weights, M: int, dtype: str, permuted: bool = False) -> None:
    K = weights[0][1].shape[1]
    x = affine_cases.normal((M, K), DTYPES[dtype])
    order = order_of(K) if permuted else None
    wide = affine_cases.doubles(x)[:, np.array(order)] if permuted else affine_cases.doubles(x)
    results = ops.projections(x, [w for w, _ in weights], g_idx=order, **METAL)
    for y, (_, w) in zip(results, weights, strict=True):
        assert affine_cases.error(y, wide @ w.T) <= TOLERANCES[DTYPES[dtype]]


def in_one_launch(metal, name: str) -> bool:
    return metal.real or [n.startswith(name) for n, _ in metal.launches] == [True]


@pytest.mark.parametrize("name", TYPES)
def test_gate_and_up_in_blocks(metal, name):
    K = 1024 + 3 * block_format(name).block_size
    check_gated(blocks(name, 37, K, 1), blocks(name, 37, K, 2), 1, "f32")
    assert in_one_launch(metal, f"ggml_qmv_gated_silu_{name.lower()}")


@pytest.mark.parametrize(("activation", "dtype"), list(zip(FUNCTIONS, DTYPES, strict=True)))
def test_activations_and_dtypes(metal, activation, dtype):
    check_gated(blocks("Q4_K", 37, 512, 1), blocks("Q4_K", 37, 512, 2), 1, dtype, activation)
    check_gated(packed(4, 64, dtype, 37, 512, 1), packed(4, 64, dtype, 37, 512, 2), 1, dtype, activation)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (3, 64), (6, 16)])
def test_affine_gate_and_up(metal, bits, group_size):
    check_gated(packed(bits, group_size, "f32", 37, 1152, 1), packed(bits, group_size, "f32", 37, 1152, 2), 1, "f32")
    assert in_one_launch(metal, "affine_qmv_gated_silu")


@pytest.mark.parametrize("M", [1, 3, *(pytest.param(M, marks=pytest.mark.slow) for M in (8, 9, 16))])
def test_few_rows_in_an_order_of_columns(metal, M):
    order = ORDERS[M % 3]
    with metal.options(order=order):
        check_gated(blocks("Q6_K", 5, 768, 1), blocks("Q6_K", 5, 768, 2), M, "f16", permuted=True)
        check_gated(packed(4, 32, "f16", 5, 96, 1), packed(4, 32, "f16", 5, 96, 2), M, "f16", permuted=True)
        check_each([blocks("Q6_K", 5, 768, 1), blocks("Q4_K", 3, 768, 2)], M, "f16", permuted=True)
        check_each([packed(4, 32, "f16", 5, 96, 1), packed(5, 32, "f16", 3, 96, 2)], M, "f16", permuted=True)


@pytest.mark.parametrize("M", [1, 3])
def test_one_output_and_one_block(metal, M):
    check_gated(blocks("Q4_0", 1, 32, 1), blocks("Q4_0", 1, 32, 2), M, "f16")
    check_gated(packed(2, 32, "f16", 1, 32, 1), packed(2, 32, "f16", 1, 32, 2), M, "f16")
    check_each([blocks("Q8_0", 1, 32, 1), blocks("Q4_0", 2, 32, 2)], M, "f32", permuted=True)
    check_each([packed(2, 32, "f32", 1, 32, 1), packed(4, 32, "f32", 2, 32, 2)], M, "f32", permuted=True)


@pytest.mark.parametrize("M", [1, 4])
def test_products_of_several_types_and_grids(metal, M):
    check_each([blocks("Q4_K", 24, 512, 1), blocks("Q4_K", 9, 512, 2), blocks("Q6_K", 7, 512, 3)], M, "f32")
    assert in_one_launch(metal, "ggml_qmv_each_3_q4_k_w_16_q4_k_w_16_q6_k_w_4")
    check_each(
        [packed(4, 64, "f32", 24, 512, 1), packed(4, 64, "f32", 9, 512, 2), packed(8, 32, "f32", 7, 512, 3)], M, "f32"
    )


@pytest.mark.slow
@pytest.mark.parametrize(("at", "name"), list(enumerate(METAL_TYPES)))
def test_every_type_of_blocks(metal, at, name):
    """Each with one row and with another number of them; dtypes, shapes, functions and lane orders in turn."""
    size = block_format(name).block_size
    shapes = [(5, 3 * size), (37, 1024 + 3 * size), (9, 2048)]
    for turn, M in ((at, 1), (at + 1, 4 + at)):
        N, K = shapes[turn % 3]
        pair = blocks(name, N, K, 1), blocks(name, N, K, 2)
        dtype, activation = list(DTYPES)[turn % 3], list(FUNCTIONS)[turn // 3 % 3]
        with metal.options(order=ORDERS[turn % 3]):
            # One row of one sort and more of the other, in turn.
            if covering.EVERY or turn & 1:
                check_gated(*pair, M, dtype, activation, permuted=bool(at & 2))
            if covering.EVERY or not turn & 1:
                check_each([*pair, blocks("Q8_0", 3, K, 3)], M, dtype, permuted=bool(at & 4))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at", "bits", "group_size"),
    [(i, bits, g) for i, (bits, g) in enumerate((b, g) for b in AFFINE_BITS for g in (16, 32, 64, 128))],
)
def test_every_affine_grid(metal, at, bits, group_size):
    M = 1 if at % 3 == 0 else 2 + at % 15
    dtype, activation = list(DTYPES)[at // 3 % 3], list(FUNCTIONS)[at % 3]
    N, K = [(37, 1152), (9, 128), (21, 384)][at // 2 % 3]
    pair = packed(bits, group_size, dtype, N, K, 1), packed(bits, group_size, dtype, N, K, 2)
    with metal.options(order=ORDERS[at % 3]):
        check_gated(*pair, M, dtype, activation, permuted=bool(at & 1))
        check_each([*pair, packed(4, 32, dtype, 5, K, 3)], M, dtype, permuted=bool(at & 2))


@pytest.mark.parametrize("order", ["reverse", "random"])
@pytest.mark.parametrize("M", [1, 3])
def test_lane_orders_give_the_same_bits(metal, M, order):
    x = affine_cases.normal((M, 768), mx.float16)
    affine = [packed(4, 32, "f16", 21, 768, seed)[0] for seed in (1, 2)]
    for pair in ([blocks("Q6_K", 21, 768, seed)[0] for seed in (1, 2)], affine):
        forward = ops.gated_projection(x, *pair, activation="silu", **METAL), *ops.projections(x, pair, **METAL)
        with metal.options(order=order):
            other = ops.gated_projection(x, *pair, activation="silu", **METAL), *ops.projections(x, pair, **METAL)
        assert all(mx.array_equal(a, b) for a, b in zip(forward, other, strict=True))


def test_large_and_infinite_x(metal):
    (gate, g_w), (up, u_w) = blocks("Q4_K", 9, 256, 1), blocks("Q4_K", 9, 256, 2)
    x = affine_cases.normal((1, 256), mx.float32) * 1e12
    wide = affine_cases.doubles(x)
    for activation in FUNCTIONS:
        y = ops.gated_projection(x, gate, up, activation=activation, **METAL)
        with np.errstate(over="ignore"):
            # Where the gate is far below zero, nothing is left.
            expected = np.maximum(wide @ g_w.T, 0) * (wide @ u_w.T)
        assert affine_cases.error(y, expected) <= 1e-6
    x[0, 3] = float("nan")
    assert np.isnan(np.array(ops.gated_projection(x, gate, up, activation="silu", **METAL))).all()


def test_an_index_past_the_columns_reads_the_last(metal):
    weights, w = blocks("Q4_K", 3, 256, 1)
    x = affine_cases.normal((1, 256), mx.float32)
    order = mx.array(np.r_[0:255, 1 << 20].astype(np.int32))
    (y,) = ops.projections(x, [weights], g_idx=order, **METAL)
    assert affine_cases.error(y, affine_cases.doubles(x) @ w.T) <= 1e-6


@pytest.mark.parametrize("M", [1, 3, 20])
def test_gradient_of_x(metal, M):
    gate, up = blocks("Q4_K", 12, 256, 1), blocks("Q4_K", 12, 256, 2)
    pair, order = (gate[0], up[0]), order_of(256)
    x, seed = affine_cases.normal((M, 256), mx.float32), affine_cases.normal((M, 12), mx.float32, seed=5)
    wide, s, columns = affine_cases.doubles(x)[:, np.array(order)], affine_cases.doubles(seed), np.array(order)
    _, (gradient,) = mx.vjp(
        lambda x: ops.gated_projection(x, *pair, activation="silu", g_idx=order, **METAL), [x], [seed]
    )
    g, u = wide @ gate[1].T, wide @ up[1].T
    sigmoid = 1 / (1 + np.exp(-g))
    expected = np.empty((M, 256))
    expected[:, columns] = (s * u * sigmoid * (1 + g * (1 - sigmoid))) @ gate[1] + (s * g * sigmoid) @ up[1]
    assert affine_cases.error(gradient, expected) <= 2e-6
    _, (gradient,) = mx.vjp(lambda x: list(ops.projections(x, pair, **METAL)), [x], [seed, 2 * seed])
    assert affine_cases.error(gradient, s @ gate[1] + 2 * s @ up[1]) <= 1e-6


def test_more_rows_and_different_types_are_computed_apart(metal):
    gate, up = blocks("Q4_K", 9, 256, 1), blocks("Q6_K", 9, 256, 2)
    check_gated(gate, up, 2, "f32")
    check_gated(gate, blocks("Q4_K", 9, 256, 2), 17, "f32", permuted=True)
    if not metal.real:
        names = [n.split("_float32")[0] for n, _ in metal.launches]
        assert names == ["ggml_qmv_q4_k", "ggml_qmv_q6_k", "ggml_qmm_q4_k", "ggml_qmm_q4_k"]


def test_sizes_that_a_launch_cannot_count_are_refused(metal):
    huge = mx.broadcast_to(mx.zeros((1, 18), mx.uint8), ((1 << 27) + 1, 18))
    with pytest.raises(BackendError, match="rows of weights"):
        ops.projections(mx.zeros((1, 32)), [ops.BlockWeights(huge, "Q4_0")], **METAL)
    assert not metal.launches
