"""The vector kernels on CUDA: 4-bit affine and Q4_K weights, one row of x, beside mlx's kernel and copies of memory.

    python bench/cuda_kernels.py [--sizes 4096,14336] [--runs 50]

The kernels are the Metal text of `metal/`, behind `metal/cuda_prelude.h`, launched by the package's own code. For each
size: microseconds of the median run, and GB/s of weights. mlx has no kernel for Q4_K; its own is for 4-bit affine.
Not yet run: no machine with an NVIDIA GPU was to be had. That the text compiles as CUDA is a test.
"""

import argparse
import sys
import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np
from measure import median

from mlxq.formats import ggml
from mlxq.ops import metal_backend, metal_blocks, metal_source
from mlxq.quantizers.ggml import quantize

#: Largest error of a product in float16 by its largest result.
TOLERANCE = 5e-4


def cuda_text(source: str, header: str) -> tuple[str, str]:
    """Body and header of a kernel for `mx.fast.cuda_kernel`, from those for `mx.fast.metal_kernel`."""
    return source.replace("threadgroup uint4 room", "__shared__ uint4 room"), metal_source.header(
        "cuda_prelude"
    ) + header


def cuda_kernel(name: str, input_names: list[str], output_names: list[str], source: str, header: str) -> Callable:
    """`mx.fast.cuda_kernel` with the arguments of `mx.fast.metal_kernel`."""
    body, before = cuda_text(source, header)
    return mx.fast.cuda_kernel(
        name=name, input_names=input_names, output_names=output_names, source=body, header=before
    )


def microseconds(function: Callable[[], mx.array], runs: int) -> float:
    """Of a run, where as many run one after another as take some milliseconds."""
    together = 20
    mx.eval(function())
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        mx.eval([function() for _ in range(together)])
        times.append((time.perf_counter() - begin) / together)
    return 1e6 * median(times)


def check(name: str, y: mx.array, expected: np.ndarray) -> None:
    error = np.abs(np.array(y.astype(mx.float32)) - expected).max() / np.abs(expected).max()
    if not error <= TOLERANCE:
        sys.exit(f"{name}: the product is off by {error:.1e} of the largest result, {TOLERANCE} is allowed")


def measure(size: int, runs: int) -> None:
    rng = np.random.default_rng(0)
    # Rows repeat: how long a product takes does not depend on what they hold.
    w = np.tile((rng.standard_normal((64, size)) / size**0.5).astype(np.float32), (size // 64, 1))
    x = mx.array(rng.standard_normal((1, size)).astype(np.float16))
    x64 = np.array(x).astype(np.float64)
    packed = mx.quantize(mx.array(w).astype(mx.float16), group_size=64, bits=4)
    blocks = mx.array(np.tile(quantize(w[:64], "Q4_K"), (size // 64, 1)))
    big = mx.zeros((64 << 20,), mx.float32)
    jobs = {
        "copy": (2 * big.nbytes, lambda: big + 0.0),
        "affine 4-bit": (
            sum(a.nbytes for a in packed),
            lambda: metal_backend.quantized_matmul(x, *packed, True, 4, 64),
        ),
        "affine 4-bit, mlx": (
            sum(a.nbytes for a in packed),
            lambda: mx.quantized_matmul(x, *packed, transpose=True, group_size=64, bits=4),
        ),
        "Q4_K": (blocks.nbytes, lambda: metal_blocks.block_matmul(x, blocks, "Q4_K")),
    }
    w_hat = np.array(mx.dequantize(*packed, group_size=64, bits=4)).astype(np.float64)
    check("affine 4-bit", jobs["affine 4-bit"][1](), x64 @ w_hat.T)
    check("Q4_K", jobs["Q4_K"][1](), x64 @ ggml.dequantize(np.array(blocks), "Q4_K").astype(np.float64).T)
    for name, (n_bytes, function) in jobs.items():
        taken = microseconds(function, runs)
        print(f"{size:6d}  {name:20s} {taken:10.1f} us {n_bytes / taken / 1e3:10.1f} GB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default="4096,14336", help="rows and columns of square weights, multiples of 256")
    parser.add_argument("--runs", type=int, default=50)
    options = parser.parse_args()
    if not mx.cuda.is_available():
        sys.exit(
            "this mlx has no CUDA device: nothing is measured (install mlx[cuda12] on a machine with an NVIDIA GPU)"
        )
    # The package makes its kernels by this function, whichever device mlx has.
    mx.fast.metal_kernel = cuda_kernel
    for size in map(int, options.sizes.split(",")):
        measure(size, options.runs)


if __name__ == "__main__":
    main()
