"""mlx's own quantized kernels, unmodified from the headers in its wheel: they run, give its CPU's numbers, and have no
finding but one that is harmless (rows of a last tile are stored twice, with the same values)."""

from __future__ import annotations

import covering
import mlx.core as mx
import numpy as np
import pytest
from metal_on_cpu import metal_kernel

pytestmark = pytest.mark.usefixtures("checker")

_FILES = ("steel/gemm/gemm.h", "quantized_utils.h", "quantized.h", "fp_quantized.h")
_HEADER = {f: f'#include "mlx/backend/metal/kernels/{f}"\n' for f in _FILES}
_AFFINE = "".join(_HEADER[f] for f in _FILES[:3])
_FP = "".join(_HEADER[f] for f in (*_FILES[:2], _FILES[3]))
_ALLOWED = ("two unordered writes of one value",)
_BITS = (2, 3, 4, 5, 6, 8)
_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
#: Half a unit in the last place of an output, relative to the largest; float32 adds the rounding of sums over K <= 1024
#: (about sqrt(1024) * 2^-24), which is small beside the others.
_TOLERANCE = {"float32": 2e-6, "float16": 2**-11 + 2e-6, "bfloat16": 2**-8 + 2e-6}
#: Kernel, M, N, K: whole tiles, and N that is no multiple of the tile.
_PRODUCTS = (
    ("affine_qmv_fast", 1, 64, 1024),
    ("affine_qmv", 1, 61, 768),
    ("affine_qmm_t", 40, 64, 256),
    ("affine_qmm_t", 40, 50, 256),
    ("affine_qvm", 1, 128, 96),
    ("affine_qmm_n", 40, 64, 128),
)
_QUICK = {(4, "float16"), (3, "bfloat16")}


def _grid(bits: int, dtype: str):
    return pytest.param(bits, dtype, marks=() if (bits, dtype) in _QUICK else pytest.mark.slow)


def _products() -> list:
    """Each of mlx's kernels for each number of bits and each dtype; few of them quickly."""
    quick = [(p, bits, dtype) for p in _PRODUCTS for bits, dtype in sorted(_QUICK)]
    slow = [case for case in covering.covering(_PRODUCTS, _BITS, list(_DTYPES)) if case not in quick]
    return [(*p, b, d) for p, b, d in quick] + [pytest.param(*p, b, d, marks=pytest.mark.slow) for p, b, d in slow]


def _product(function: str, x: mx.array, packed: tuple, N: int, template: list, template_text: str) -> mx.array:
    """A product by one of mlx's kernels, launched as mlx/backend/metal/quantized.cpp does."""
    M, K = x.shape
    affine = len(packed) == 3
    batch = "sizes[3], ints, longs, sizes[3], ints, longs, longs" + ", longs" * affine
    simd = "simdgroup_index_in_threadgroup, thread_index_in_simdgroup"
    matrix = "qmm" in function
    if matrix:
        dims = (
            f"sizes[0], sizes[1], sizes[2], {batch}, threadgroup_position_in_grid, thread_index_in_threadgroup, {simd}"
        )
        grid, threadgroup = (-(-N // 32) * 32, -(-M // 32) * 2, 2), (32, 2, 2)
        template_text += f", {str(N % 32 == 0).lower()}, false" if function.endswith("_t") else ", false"
    else:
        dims = f"sizes[0], sizes[1], {batch}, threadgroup_position_in_grid, {simd}"
        rows = 64 if function.endswith("qvm") else 8
        grid, threadgroup = (M * 32, -(-N // rows) * 2, 1), (32, 2, 1)
        template_text += ", false"
    names = ["w", "scales", "biases"][: len(packed)]
    weights = ", ".join(names) + ("" if affine else ", (const device float*)scales")  # a global scale, not read
    kernel = metal_kernel(
        name=function,
        input_names=[*names, "x", "sizes"],
        output_names=["y"],
        header=_AFFINE if affine else _FP,
        source="const constant int* ints = (const constant int*)sizes; "
        "const constant int64_t* longs = (const constant int64_t*)(sizes + 4);\n"
        f"{function}<{template_text}>({weights}, x, y, {dims});\n",
        lint=False,
        allow=_ALLOWED,
    )
    (y,) = kernel(
        inputs=[*packed, x, mx.array([K, N, M, 0, 0, 0], mx.int32)],
        template=template,
        grid=grid,
        threadgroup=threadgroup,
        output_shapes=[(M, N)],
        output_dtypes=[x.dtype],
    )
    return y


def _error(y: mx.array, x: mx.array, w_hat: mx.array) -> float:
    """Largest error relative to the largest output, against float64; w_hat has shape [K, N]."""
    exact = np.array(x.astype(mx.float32), np.float64) @ np.array(w_hat, np.float64)
    return np.abs(np.array(y.astype(mx.float32)) - exact).max() / np.abs(exact).max()


@pytest.mark.parametrize(("function", "M", "N", "K", "bits", "dtype"), _products())
def test_affine_products(function: str, M: int, N: int, K: int, bits: int, dtype: str) -> None:
    T, transposed = _DTYPES[dtype], function not in ("affine_qvm", "affine_qmm_n")
    w, x = mx.random.normal((2, max(N, M), K), key=mx.random.key(1)).astype(T)
    w, x = w[:N] if transposed else w[:N].T, x[:M]
    w_q, scales, biases = mx.quantize(w, group_size=32, bits=bits)
    template = [("T", T), ("GS", 32), ("BITS", bits)]
    y = _product(function, x, (w_q, scales, biases), N, template, "T, GS, BITS")
    w_hat = mx.dequantize(w_q, scales.astype(mx.float32), biases.astype(mx.float32), group_size=32, bits=bits)
    # qmm rounds its decoded weights to the dtype too: errors of 256 terms that average out.
    allowed = _TOLERANCE[dtype] * (1.5 if "qmm" in function else 1)
    assert _error(y, x, w_hat.T if transposed else w_hat) <= allowed


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("mode", "group_size", "bits"), [("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)])
@pytest.mark.parametrize(("function", "M", "N", "K"), [("fp_qmv_fast", 1, 64, 1024), ("fp_qmm_t", 40, 50, 256)])
def test_float_format_products(
    function: str, M: int, N: int, K: int, mode: str, group_size: int, bits: int, dtype: str
) -> None:
    T = _DTYPES[dtype]
    w, x = mx.random.normal((2, max(N, M), K), key=mx.random.key(1)).astype(T)
    w_q, scales = mx.quantize(w[:N], mode=mode)[:2]
    template = [("T", T), ("GS", group_size), ("BITS", bits)]
    y = _product(function, x[:M], (w_q, scales), N, template, "T, GS, BITS")
    w_hat = mx.dequantize(w_q, scales, mode=mode, dtype=mx.float32)
    assert _error(y, x[:M], w_hat.T) <= _TOLERANCE[dtype]  # decoded weights of these formats are exact in the dtype


@pytest.mark.parametrize(("bits", "dtype"), [_grid(b, d) for b in _BITS for d in _DTYPES])
def test_affine_dequantize_is_the_cpus(bits: int, dtype: str) -> None:
    T, N, K = _DTYPES[dtype], 16, 256
    packed = mx.quantize(mx.random.normal((N, K), key=mx.random.key(3)).astype(T), group_size=64, bits=bits)
    threads = N * K // {3: 8, 5: 8, 6: 4}.get(bits, 8 // bits)
    kernel = metal_kernel(
        "affine_dequantize",
        ["w", "scales", "biases"],
        ["y"],
        "affine_dequantize<T, GS, BITS>(w, scales, biases, y, uint2(thread_position_in_grid.xy), "
        "uint2(threads_per_grid.xy));\n",
        _AFFINE,
        lint=False,
    )
    (y,) = kernel(
        inputs=[mx.view(packed[0], mx.uint8), *packed[1:]],
        template=[("T", T), ("GS", 64), ("BITS", bits)],
        grid=(threads, 1, 1),
        threadgroup=(min(threads, 1024), 1, 1),
        output_shapes=[(N, K)],
        output_dtypes=[T],
    )
    assert mx.array_equal(y, mx.dequantize(*packed, group_size=64, bits=bits))


@pytest.mark.parametrize("bits", [pytest.param(b, marks=() if b == 4 else pytest.mark.slow) for b in _BITS])
def test_affine_quantize_in_float32_is_the_cpus(bits: int) -> None:
    # In half types mlx's CPU rounds each step and its Metal kernel does not: some codes differ there. So do those of
    # exact ties, of which these weights have none.
    N, K = 16, 256
    w = mx.random.normal((N, K), key=mx.random.key(1))
    expected = mx.quantize(w, group_size=64, bits=bits)
    kernel = metal_kernel(
        "affine_quantize",
        ["w"],
        ["codes", "scales", "biases"],
        "affine_quantize<T, GS, BITS>(w, codes, scales, biases, uint2(thread_position_in_grid.xy), "
        "uint2(threads_per_grid.xy));\n",
        _AFFINE,
        lint=False,
    )
    made = kernel(
        inputs=[w],
        template=[("T", mx.float32), ("GS", 64), ("BITS", bits)],
        grid=(N * K // 2, 1, 1),
        threadgroup=(1024, 1, 1),
        output_shapes=[(N * K * bits // 8,), (N, K // 64), (N, K // 64)],
        output_dtypes=[mx.uint8, mx.float32, mx.float32],
    )
    assert mx.array_equal(made[0], mx.view(expected[0], mx.uint8).reshape(-1))
    assert all(mx.array_equal(a, b) for a, b in zip(made[1:], expected[1:], strict=True))
