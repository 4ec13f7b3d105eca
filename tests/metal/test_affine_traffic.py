"""Budgets: bytes that kernels move, and what they execute beside mlx's own kernel for the same job in the same checker.

Loads and arithmetic of mlx's kernels are counted from the headers in its wheel; ours may take as many, never more.
"""

from __future__ import annotations

import affine_cases
import mlx.core as mx
import mlx_kernels
import pytest

from mlxq.formats.geometry import AFFINE_BITS
from mlxq.ops import metal_backend

pytestmark = pytest.mark.usefixtures("checker")

QUICK_BITS = (4, 8)
BITS = [b if b in QUICK_BITS else pytest.param(b, marks=pytest.mark.slow) for b in AFFINE_BITS]


@pytest.fixture
def counted(metal):
    """The report of a product by our kernel in mode `count`."""
    if metal.real:
        pytest.skip("the real Metal counts nothing")

    def run(function, *args):
        with metal.options(mode="count"):
            function(*args)
        return metal.report

    return run


def check_beside_mlx(own, theirs) -> None:
    assert own.loads <= theirs.loads
    assert own.arithmetic <= theirs.arithmetic


@pytest.mark.parametrize("M", [1, 2, pytest.param(5, marks=pytest.mark.slow), 8])
def test_each_weight_is_loaded_once_for_all_rows(counted, M):
    size = 4096 if M == 1 else 1024
    weights = affine_cases.packed((size, size), 4, 64, mx.float16)
    x = affine_cases.normal((M, size), mx.float16)
    report = counted(metal_backend.quantized_matmul, x, *weights, True, 4, 64)
    w_q = report.buffers["w_q"]
    assert w_q.load_bytes == w_q.size == w_q.unique_read
    assert report.line_use("w_q") >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("M", [2, 4, 8, 16])
def test_each_weight_of_a_large_matrix_is_loaded_once(counted, M):
    weights = affine_cases.packed((4096, 4096), 4, 64, mx.float16)
    x = affine_cases.normal((M, 4096), mx.float16)
    report = counted(metal_backend.quantized_matmul, x, *weights, True, 4, 64)
    assert report.buffers["w_q"].load_bytes == report.buffers["w_q"].size
    assert report.line_use("w_q") >= 0.9


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("M", [32, pytest.param(64, marks=pytest.mark.slow)])
def test_tiles_load_each_weight_once_a_pass(counted, bits, M):
    weights = affine_cases.packed((128, 1024), bits, 64, mx.float16)
    x = affine_cases.normal((M, 1024), mx.float16)
    report = counted(metal_backend.quantized_matmul, x, *weights, True, bits, 64)
    w_q = report.buffers["w_q"]
    assert w_q.load_bytes <= 1.05 * w_q.size * (M // 32)
    # The lines that a SIMD-group touches; those of 4 and 8 bits by one load.
    assert w_q.load_bytes >= 0.9 * 128 * w_q.simdgroup_lines
    assert report.line_use("w_q") >= 0.9 or bits in (2, 3, 5, 6)


def test_tiles_not_transposed_load_each_weight_once_a_pass(counted):
    weights = affine_cases.packed((64, 512), 4, 64, mx.float16)
    x = affine_cases.normal((32, 64), mx.float16)
    report = counted(metal_backend.quantized_matmul, x, *weights, False, 4, 64)
    w_q = report.buffers["w_q"]
    assert w_q.load_bytes == w_q.size
    # A SIMD-group takes a quarter of each line, the four of a threadgroup all of it.
    assert w_q.load_bytes == 128 * w_q.threadgroup_lines


@pytest.mark.slow
def test_tiles_of_a_large_matrix(counted):
    weights = affine_cases.packed((4096, 4096), 4, 64, mx.float16)
    x = affine_cases.normal((32, 4096), mx.float16)
    report = counted(metal_backend.quantized_matmul, x, *weights, True, 4, 64)
    assert report.buffers["w_q"].load_bytes <= 1.05 * report.buffers["w_q"].size
    assert report.line_use("w_q") >= 0.9


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", ["f16", pytest.param("f32", marks=pytest.mark.slow)])
def test_one_row_takes_no_more_than_mlx(counted, bits, dtype):
    weights = affine_cases.packed((16, 4096), bits, 64, affine_cases.DTYPES[dtype])
    x = affine_cases.normal((1, 4096), affine_cases.DTYPES[dtype])
    own = counted(metal_backend.quantized_matmul, x, *weights, True, bits, 64)
    check_beside_mlx(own, mlx_kernels.product("affine_qmv_fast", x, weights, bits, 64))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("M", [2, 8, pytest.param(16, marks=pytest.mark.slow)])
def test_few_rows_take_no_more_than_either_kernel_of_mlx(counted, bits, M):
    weights = affine_cases.packed((16, 4096), bits, 64, mx.float16)
    x = affine_cases.normal((M, 4096), mx.float16)
    own = counted(metal_backend.quantized_matmul, x, *weights, True, bits, 64)
    for function in ("affine_qmv_fast", "affine_qmv_wide"):
        check_beside_mlx(own, mlx_kernels.product(function, x, weights, bits, 64))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("transpose", "K"), [(True, 256), (True, 576), (False, 256)])
def test_tiles_take_no_more_than_mlx(counted, bits, transpose, K):
    weights = affine_cases.packed((64, K), bits, 64, mx.float16)
    x = affine_cases.normal((32, K if transpose else 64), mx.float16)
    own = counted(metal_backend.quantized_matmul, x, *weights, transpose, bits, 64)
    function = "affine_qmm_t" if transpose else "affine_qmm_n"
    check_beside_mlx(own, mlx_kernels.product(function, x, weights, bits, 64))


@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("transpose", [True, False])
def test_tiles_in_float32_take_no_more_than_mlx(counted, transpose, bits):
    """mlx's kernels load 8-bit codes byte by byte, and so cut out nothing: the least arithmetic beside ours."""
    N, K = (64, 512) if transpose else (512, 256)
    weights = affine_cases.packed((N, K), bits, 64, mx.float32)
    x = affine_cases.normal((32, K if transpose else N), mx.float32)
    own = counted(metal_backend.quantized_matmul, x, *weights, transpose, bits, 64)
    function = "affine_qmm_t" if transpose else "affine_qmm_n"
    check_beside_mlx(own, mlx_kernels.product(function, x, weights, bits, 64))


def test_two_rows_in_float32_take_no_more_than_mlx(counted):
    weights = affine_cases.packed((16, 4096), 8, 64, mx.float32)
    x = affine_cases.normal((2, 4096), mx.float32)
    own = counted(metal_backend.quantized_matmul, x, *weights, True, 8, 64)
    for function in ("affine_qmv_fast", "affine_qmv_wide"):
        check_beside_mlx(own, mlx_kernels.product(function, x, weights, 8, 64))


@pytest.mark.parametrize("bits", BITS)
def test_quantize_and_dequantize_take_no_more_than_mlx(counted, bits):
    w = affine_cases.normal((16, 512), mx.float16)
    own = counted(metal_backend.quantize, w, bits, 64)
    _, theirs = mlx_kernels.quantize(w, bits, 64, "count")
    check_beside_mlx(own, theirs)
    weights = affine_cases.packed((16, 512), bits, 64, mx.float16)
    own = counted(metal_backend.dequantize, *weights, bits, 64, None)
    check_beside_mlx(own, mlx_kernels.dequantize_report(weights, bits, 64))


def test_gathered_rows_load_the_chosen_experts_only(counted):
    weights = affine_cases.packed((8, 32, 512), 4, 64, mx.float16)
    x = affine_cases.normal((2, 1, 1, 512), mx.float16)
    indices = mx.array([[3, 1], [3, 6]], mx.uint32)
    report = counted(metal_backend.gather_quantized_matmul, x, *weights, indices, True, 4, 64, False)
    expert = report.buffers["w_q"].size // 8
    assert report.buffers["w_q"].load_bytes == 4 * expert
    assert report.buffers["w_q"].unique_read == 3 * expert
    assert report.line_use("w_q") >= 0.9


def test_sorted_rows_load_an_expert_once_a_tile(counted):
    weights = affine_cases.packed((4, 64, 256), 4, 64, mx.float16)
    x = affine_cases.normal((64, 1, 256), mx.float16)
    indices = mx.array([0] * 32 + [1] * 20 + [3] * 12, mx.uint32)
    report = counted(metal_backend.gather_quantized_matmul, x, *weights, indices, True, 4, 64, True)
    assert report.buffers["w_q"].load_bytes == 3 * report.buffers["w_q"].size // 4
