"""Runs kernels of `mx.fast.metal_kernel` on a CPU without Metal, from the same text, and checks what they do.

    kernel = metal_kernel(name="k", input_names=["x"], output_names=["y"], source="...")
    (y,) = kernel(inputs=[x], grid=(32, 1, 1), threadgroup=(32, 1, 1), output_shapes=[(32,)], output_dtypes=[x.dtype])
    kernel.report  # findings, bytes moved, memory instructions; counts of instructions with mode="count"

Every GPU thread is a fiber. Found are, with the line of the text: accesses out of bounds, unordered accesses, missing
and divergent barriers, uninitialized and unwritten memory, misalignment, undefined behaviour, too much threadgroup
memory; rejected is what Apple's compiler would not take, as far as the language's rules say. It models no GPU's speed,
and only a Mac shows what Apple's compiler accepts. It needs clang 19 and Linux: `unavailable()` says what is missing.
"""

from metal_on_cpu.arrays import Sparse
from metal_on_cpu.launch import metal_kernel, run_msl
from metal_on_cpu.options import Options, options
from metal_on_cpu.report import Finding, Report
from metal_on_cpu.tokens import MslError
from metal_on_cpu.toolchain import MLX_INCLUDE, unavailable

__all__ = [
    "MLX_INCLUDE",
    "Finding",
    "MslError",
    "Options",
    "Report",
    "Sparse",
    "metal_kernel",
    "options",
    "run_msl",
    "unavailable",
]
