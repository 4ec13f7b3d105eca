"""mlx's own quantized kernels, unmodified from the headers in its wheel, in the checker: what ours are measured by."""

from __future__ import annotations

import metal_on_cpu
import mlx.core as mx

_FILES = ("steel/gemm/gemm.h", "quantized_utils.h", "quantized.h")
HEADER = "".join(f'#include "mlx/backend/metal/kernels/{file}"\n' for file in _FILES)
# Strides of a batch, which no launch here has: any memory will do.
_SIZES = (
    "const constant int* ints = (const constant int*)sizes; "
    "const constant int64_t* longs = (const constant int64_t*)(sizes + 4);\n"
)
_BATCH = "sizes[3], ints, longs, sizes[3], ints, longs, longs, longs, threadgroup_position_in_grid"
_SIMD = "simdgroup_index_in_threadgroup, thread_index_in_simdgroup"


def product(function: str, x: mx.array, packed: tuple, bits: int, group_size: int) -> metal_on_cpu.Report:
    """Counts of a product by `affine_qmv_fast`, `affine_qmv_wide`, `affine_qmm_t` or `affine_qmm_n`, launched as
    mlx/backend/metal/quantized.cpp (0.32.4) launches it."""
    w_q, scales, _ = packed
    M, inner = x.shape
    N, K = w_q.shape[0], scales.shape[1] * group_size
    columns = K if function == "affine_qmm_n" else N
    template = [("T", x.dtype), ("GS", group_size), ("BITS", bits)]
    # Of a product not transposed, mlx's N counts the columns of y, its K those of x.
    dims = f"sizes[0], sizes[1], {_BATCH}, {_SIMD}"
    more = ""
    if function == "affine_qmv_fast":
        more, grid, threadgroup = ", false", (M * 32, -(-N // 8) * 2, 1), (32, 2, 1)
    elif function == "affine_qmv_wide":
        tiles = -(-M // 5)
        more, grid, threadgroup = f", {-(-M // tiles)}, 8, false", (tiles * 32, -(-N // 8) * 2, 1), (32, 2, 1)
        dims = f"sizes[0], sizes[1], sizes[2], {_BATCH}, {_SIMD}"
    else:
        more = f", {str(N % 32 == 0).lower()}, false" if function == "affine_qmm_t" else ", false"
        grid, threadgroup = (-(-columns // 32) * 32, -(-M // 32) * 2, 2), (32, 2, 2)
        dims = f"sizes[0], sizes[1], sizes[2], {_BATCH}, thread_index_in_threadgroup, {_SIMD}"
    kernel = metal_on_cpu.metal_kernel(
        name=f"mlx_{function}",
        input_names=["w", "scales", "biases", "x", "sizes"],
        output_names=["y"],
        header=HEADER,
        source=f"{_SIZES}{function}<T, GS, BITS{more}>(w, scales, biases, x, y, {dims});\n",
    )
    with metal_on_cpu.options(mode="count", lint=False):
        kernel(
            inputs=[*packed, x, mx.array([inner, columns, M, 0, 0, 0], mx.int32)],
            template=template,
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=[(M, columns)],
            output_dtypes=[x.dtype],
        )
    return kernel.report


def quantize(w: mx.array, bits: int, group_size: int, mode: str = "fast") -> tuple[list[mx.array], metal_on_cpu.Report]:
    """Bytes of codes, scales and biases by `affine_quantize`, and its report."""
    N, K = w.shape
    outputs = {"out": ((N, K * bits // 8), mx.uint8)}
    outputs |= dict.fromkeys(("scales", "biases"), ((N, K // group_size), w.dtype))
    return _run("affine_quantize", {"w": w}, bits, group_size, w.size * 32 // group_size, outputs, mode)


def dequantize_report(packed: tuple, bits: int, group_size: int) -> metal_on_cpu.Report:
    """Counts of `affine_dequantize`."""
    w_q, scales, biases = packed
    shape = (scales.shape[0], scales.shape[1] * group_size)
    per_thread = 8 if bits in (3, 5) else 4 if bits == 6 else 8 // bits
    inputs = {"w": w_q.view(mx.uint8), "scales": scales, "biases": biases}
    threads = shape[0] * shape[1] // per_thread
    outputs = {"out": (shape, scales.dtype)}
    return _run("affine_dequantize", inputs, bits, group_size, threads, outputs, "count")[1]


def _run(
    function: str,
    inputs: dict[str, mx.array],
    bits: int,
    group_size: int,
    threads: int,
    outputs: dict[str, tuple],
    mode: str,
) -> tuple[list[mx.array], metal_on_cpu.Report]:
    arrays = ", ".join([*inputs, *outputs])
    dtype = list(outputs.values())[-1][1]
    kernel = metal_on_cpu.metal_kernel(
        name=f"mlx_{function}",
        input_names=list(inputs),
        output_names=list(outputs),
        header=HEADER,
        source=f"{function}<T, GS, BITS>({arrays}, uint2(thread_position_in_grid.xy), uint2(threads_per_grid.xy));\n",
    )
    with metal_on_cpu.options(mode=mode, lint=False):
        made = kernel(
            inputs=list(inputs.values()),
            template=[("T", dtype), ("GS", group_size), ("BITS", bits)],
            grid=(threads, 1, 1),
            threadgroup=(256, 1, 1),
            output_shapes=[shape for shape, _ in outputs.values()],
            output_dtypes=[dtype for _, dtype in outputs.values()],
        )
    return made, kernel.report
