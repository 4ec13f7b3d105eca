"""Products of x with packed weights, one row to many, transposed or not, gathered: against float64."""

from __future__ import annotations

import itertools

import affine_cases
import covering
import mlx.core as mx
import numpy as np
import pytest

from mlxq import ops
from mlxq.formats.geometry import AFFINE_BITS
from mlxq.ops import metal_backend, metal_source
from mlxq.ops.metal_affine import choose_product

# bits, group size, dtype, N, K: ragged N, K that leaves lanes and tiles empty, one group a row, N = 1.
SHAPES = [
    (4, 64, "f16", 9, 1088),
    (4, 16, "f32", 13, 576),
    (2, 16, "bf16", 5, 1056),
    (3, 32, "f32", 6, 96),
    (5, 128, "f16", 11, 1152),
    (6, 64, "f16", 70, 256),
    (8, 128, "bf16", 1, 128),
    (4, 32, "bf16", 2, 32),
]
QUICK_ROWS = (1, 3, 16, 33)
SLOW_ROWS = (2, 7, 8, 9, 17, 64)
SWEEP = covering.covering(AFFINE_BITS, (16, 32, 64, 128), list(affine_cases.DTYPES))


def row_cases(sweep_rows: tuple[int, ...]) -> list:
    """Each number of rows with some shapes quickly, with more of them slowly, and a sweep of grids slowly."""
    quick = [(M, *SHAPES[(2 * i + j) % len(SHAPES)]) for i, M in enumerate(QUICK_ROWS) for j in (0, 1)]
    rows = (*QUICK_ROWS, *SLOW_ROWS)
    every = [
        (M, *shape)
        for (i, M), (j, shape) in itertools.product(enumerate(rows), enumerate(SHAPES))
        if covering.EVERY or (i + j) % 3 == 0
    ]
    every += [(M, *case, 21, 384) for M in sweep_rows for case in SWEEP]
    return quick + [pytest.param(*c, marks=pytest.mark.slow) for c in every if c not in quick]


def check_product(M: int, bits: int, group_size: int, dtype: str, N: int, K: int, transpose: bool) -> None:
    T = affine_cases.DTYPES[dtype]
    weights = affine_cases.packed((N, K), bits, group_size, T)
    w = weights.decoded(bits, group_size)
    x = affine_cases.normal((M, K if transpose else N), T)
    y = metal_backend.quantized_matmul(x, *weights, transpose, bits, group_size)
    assert y.dtype == T
    expected = affine_cases.doubles(x) @ (w.T if transpose else w)
    assert affine_cases.error(y, expected) <= affine_cases.TOLERANCES[T]


@pytest.mark.parametrize(("M", "bits", "group_size", "dtype", "N", "K"), row_cases((1, 5, 20)))
def test_transposed_product(metal, M, bits, group_size, dtype, N, K):
    check_product(M, bits, group_size, dtype, N, K, True)


@pytest.mark.parametrize(("M", "bits", "group_size", "dtype", "N", "K"), row_cases((20,)))
def test_product_not_transposed(metal, M, bits, group_size, dtype, N, K):
    check_product(M, bits, group_size, dtype, N, K, False)


@pytest.mark.parametrize(("M", "transpose"), [(1, True), (4, True), (20, True), (20, False)])
def test_long_sums_in_float32(metal, M, transpose):
    check_product(M, 4, 32, "f32", *((13, 4096) if transpose else (4096, 32)), transpose)


@pytest.mark.parametrize("order", ["reverse", "random"])
@pytest.mark.parametrize(("M", "transpose"), [(1, True), (5, True), (33, True), (33, False)])
def test_lane_orders_give_the_same_bits(metal, M, transpose, order):
    weights = affine_cases.packed((41, 320), 4, 32, mx.float16)
    x = affine_cases.normal((M, 320 if transpose else 41), mx.float16)
    forward = metal_backend.quantized_matmul(x, *weights, transpose, 4, 32)
    with metal.options(order=order):
        other = metal_backend.quantized_matmul(x, *weights, transpose, 4, 32)
    assert mx.array_equal(forward, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"contract": "fast"}, {"simd_order": 1}, {"opt": "-O0"}, {"flush_denormals": True}]
)
@pytest.mark.parametrize(("M", "transpose"), [(1, True), (5, True), (33, True), (33, False)])
def test_errors_hold_whatever_the_compiler_does(metal, M, transpose, options):
    with metal.options(**options):
        check_product(M, 3, 32, "f32", 9, 352, transpose)


def test_x_and_scales_of_two_dtypes_give_float32(metal):
    weights = affine_cases.packed((8, 64), 4, 32, mx.float16)
    x = affine_cases.normal((2, 64), mx.bfloat16)
    y = metal_backend.quantized_matmul(x, *weights, True, 4, 32)
    assert y.dtype == mx.float32
    assert affine_cases.error(y, affine_cases.doubles(x) @ weights.decoded(4, 32).T) <= 1e-6


def test_x_keeps_its_axes_and_need_not_be_contiguous(metal):
    weights = affine_cases.packed((8, 64), 4, 32, mx.float32)
    x = affine_cases.normal((64, 3, 2), mx.float32).transpose(2, 1, 0)
    y = metal_backend.quantized_matmul(x, *weights, True, 4, 32)
    assert affine_cases.error(y, affine_cases.doubles(x) @ weights.decoded(4, 32).T) <= 1e-6


@pytest.mark.parametrize("M", [1, 3])
def test_arrays_of_fewer_than_eight_elements(metal, M):
    """mlx passes them in another address space."""
    weights = affine_cases.packed((2, 32), 2, 32, mx.float32)
    for transpose in (True, False):
        x = affine_cases.normal((M, 32 if transpose else 2), mx.float32)
        w = weights.decoded(2, 32)
        y = metal_backend.quantized_matmul(x, *weights, transpose, 2, 32)
        assert affine_cases.error(y, affine_cases.doubles(x) @ (w.T if transpose else w)) <= 1e-6
    stack = affine_cases.packed((2, 2, 32), 2, 32, mx.float32)
    x, expert = affine_cases.normal((1, M, 2), mx.float32), mx.array([1], mx.uint32)
    y = metal_backend.gather_quantized_matmul(x, *stack, expert, False, 2, 32, False)
    assert affine_cases.error(y, gathered(x, stack.decoded(2, 32), np.array([1]), False)) <= 1e-6


@pytest.mark.parametrize("transpose", [True, False])
def test_empty_x_and_empty_weights(metal, transpose):
    weights = affine_cases.packed((6, 32), 4, 32, mx.float16)
    inner, columns = (32, 6) if transpose else (6, 32)
    y = metal_backend.quantized_matmul(mx.zeros((0, inner), mx.float16), *weights, transpose, 4, 32)
    assert (y.shape, y.dtype) == ((0, columns), mx.float16)


@pytest.mark.parametrize("M", [2, 40])
@pytest.mark.parametrize("transpose", [True, False])
def test_gradient_of_x(metal, M, transpose):
    weights = affine_cases.packed((24, 64), 4, 32, mx.float32)
    w = weights.decoded(4, 32)
    x = affine_cases.normal((M, 64 if transpose else 24), mx.float32)
    seed = affine_cases.normal((M, 24 if transpose else 64), mx.float32, seed=5)
    grid = {"bits": 4, "group_size": 32, "backend": "metal"}
    (y,), (gradient,) = mx.vjp(lambda x: ops.quantized_matmul(x, *weights, transpose=transpose, **grid), [x], [seed])
    assert affine_cases.error(y, affine_cases.doubles(x) @ (w.T if transpose else w)) <= 1e-6
    assert affine_cases.error(gradient, affine_cases.doubles(seed) @ (w if transpose else w.T)) <= 1e-6


def gathered(x: mx.array, w: np.ndarray, indices: np.ndarray, transpose: bool) -> np.ndarray:
    batch = np.broadcast_shapes(x.shape[:-2], indices.shape)
    rows = np.broadcast_to(affine_cases.doubles(x), (*batch, *x.shape[-2:]))
    chosen = w[np.broadcast_to(indices, batch)]
    return rows @ (chosen.swapaxes(-1, -2) if transpose else chosen)


@pytest.mark.parametrize(
    ("batch", "M", "indices_shape"),
    [((3, 1), 1, (3, 2)), ((), 1, (2,)), ((4,), 3, (4,)), ((2,), 20, (2,)), ((2, 1), 17, (2, 3))],
)
@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize(("bits", "group_size", "dtype"), [(4, 64, "f16"), (3, 16, "f32")])
def test_gathered_product(metal, batch, M, indices_shape, transpose, bits, group_size, dtype):
    T, (E, N, K) = affine_cases.DTYPES[dtype], (5, 37, 128)
    weights = affine_cases.packed((E, N, K), bits, group_size, T)
    x = affine_cases.normal((*batch, M, K if transpose else N), T)
    indices = np.random.default_rng(2).integers(0, E, indices_shape)
    y = metal_backend.gather_quantized_matmul(
        x, *weights, mx.array(indices.astype(np.uint32)), transpose, bits, group_size, False
    )
    expected = gathered(x, weights.decoded(bits, group_size), indices, transpose)
    assert affine_cases.error(y, expected) <= affine_cases.TOLERANCES[T]


def test_sorted_rows_share_an_expert_s_weights(metal):
    E, N, K, rows = 5, 37, 128, 70
    weights = affine_cases.packed((E, N, K), 4, 32, mx.float16)
    x = affine_cases.normal((rows, 1, K), mx.float16)
    indices = np.sort(np.random.default_rng(2).integers(0, E, rows))
    y = metal_backend.gather_quantized_matmul(x, *weights, mx.array(indices.astype(np.uint32)), True, 4, 32, True)
    assert affine_cases.error(y, gathered(x, weights.decoded(4, 32), indices, True)) <= 5e-4
    if not metal.real:
        assert "sorted" in metal.launches[-1][0]


def test_gradient_of_gathered_x_sums_over_its_experts(metal):
    weights = affine_cases.packed((3, 16, 32), 4, 32, mx.float32)
    x = affine_cases.normal((4, 1, 1, 32), mx.float32)
    indices = mx.array([[0, 1], [2, 2], [1, 0], [2, 1]], mx.uint32)
    seed = affine_cases.normal((4, 2, 1, 16), mx.float32, seed=5)
    _, (gradient,) = mx.vjp(
        lambda x: ops.gather_quantized_matmul(x, *weights, indices, bits=4, group_size=32, backend="metal"), [x], [seed]
    )
    w = weights.decoded(4, 32)[np.asarray(indices)]
    expected = (affine_cases.doubles(seed) @ w).sum(axis=1, keepdims=True)
    assert affine_cases.error(gradient, expected) <= 1e-6


def test_an_expert_past_the_stack_reads_its_last_matrix(metal):
    weights = affine_cases.packed((2, 8, 32), 4, 32, mx.float32)
    x = affine_cases.normal((1, 1, 32), mx.float32)
    y = metal_backend.gather_quantized_matmul(x, *weights, mx.array([9], mx.uint32), True, 4, 32, False)
    assert affine_cases.error(y, gathered(x, weights.decoded(4, 32), np.array([1]), True)) <= 1e-6


def test_experts_of_huge_stacks_begin_where_64_bits_say(metal):
    """A stack of 2**34 weights, of which only the place of an expert is computed."""
    where = mx.fast.metal_kernel(
        name="affine_expert_place",
        input_names=["experts"],
        output_names=["place"],
        header=metal_source.header("affine_gather"),
        source="const AffineExpert<64, 4, 4096, 4096, 1024> expert(experts[0]); "
        "place[0] = expert.words; place[1] = expert.groups;",
    )
    (place,) = where(
        inputs=[mx.array([1023], mx.uint32)],
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
        output_shapes=[(2,)],
        output_dtypes=[mx.uint64],
    )
    assert place.tolist() == [1023 * 4096 * 4096 // 8, 1023 * 4096 * 4096 // 64]


def test_choice_of_kernel_by_rows():
    assert [choose_product(M, True).function for M in (1, 2, 16, 17)] == [
        "affine_qmv",
        "affine_qmv_rows",
        "affine_qmv_rows",
        "affine_qmm_t",
    ]
    assert choose_product(1, False).function == "affine_qmm_n"
