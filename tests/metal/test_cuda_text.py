"""The vector kernels' text compiles as CUDA: behind `cuda_prelude.h`, by clang, with declarations of what CUDA has.

`mx.fast.cuda_kernel` would compile it by NVRTC. Nothing runs here: no result and no speed is known of.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import affine_cases
import mlx.core as mx
import pytest
from random_blocks import random_blocks

from mlxq.formats.geometry import AFFINE_BITS
from mlxq.ops import metal_backend, metal_blocks
from mlxq.ops.metal_blocks import METAL_TYPES

CLANG = "clang++-19"
ROOT = Path(__file__).resolve().parents[2]
#: mlx's names of types, and what it defines before a kernel's header (mlx/backend/cuda/custom_kernel.cpp, utils.cpp).
TYPES = {mx.float32: "float", mx.float16: "__half", mx.bfloat16: "__nv_bfloat16", mx.uint32: "uint32_t"}
TYPES |= {mx.uint8: "uint8_t"}
CUDA = """
#define __device__ __attribute__((device))
#define __global__ __attribute__((global))
#define __shared__ __attribute__((shared))
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
using size_t = decltype(sizeof(0));
using uint8_t = unsigned char;
using uint32_t = unsigned int;
struct uint3 {
  unsigned x, y, z;
};
extern const __device__ uint3 threadIdx, blockIdx, blockDim;
template <typename Bits>
struct SixteenBits {
  Bits bits;
  SixteenBits() = default;
  __device__ SixteenBits(float);
  __device__ SixteenBits(int);
  __device__ operator float() const;
  __device__ operator int() const;
};
using __half = SixteenBits<unsigned short>;
using half = __half;
using __nv_bfloat16 = SixteenBits<short>;
struct Shape {
  __device__ int operator[](int) const;
};
__device__ void __syncwarp(unsigned);
__device__ void __syncthreads();
__device__ float __shfl_xor_sync(unsigned, float, int);
__device__ int min(int, int);
__device__ unsigned min(unsigned, unsigned);
__device__ float fma(float, float, float);
extern "C" __device__ void* memcpy(void*, const void*, size_t);
// mlx has NVRTC take functions for the device's unless they say otherwise.
#pragma clang force_cuda_host_device begin
"""


class Launch(NamedTuple):
    """What the package gave to `mx.fast.metal_kernel`, and how it called the kernel."""

    kernel: dict[str, Any]
    call: dict[str, Any]


@pytest.fixture(scope="module")
def clang() -> str:
    if not shutil.which(CLANG):
        reason = f"{CLANG} not found: the CUDA text is not compiled"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return CLANG


@pytest.fixture(scope="module")
def bench() -> Any:
    """bench/cuda_kernels.py, which makes CUDA text of Metal's."""
    spec = importlib.util.spec_from_file_location("cuda_kernels", ROOT / "bench" / "cuda_kernels.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench"))
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def launches(monkeypatch) -> list[Launch]:
    """The launches that products ask for; none runs, results are zeros."""
    launches = []

    def metal_kernel(**kernel):
        def launch(**call):
            launches.append(Launch(kernel, call))
            return [mx.zeros(s, t) for s, t in zip(call["output_shapes"], call["output_dtypes"], strict=True)]

        return launch

    monkeypatch.setattr(mx.fast, "metal_kernel", metal_kernel)
    return launches


def unit(launch: Launch, bench: Any) -> str:
    """The text that mlx would compile for a launch."""
    kernel, call = launch
    body, header = bench.cuda_text(kernel["source"], kernel["header"])
    parameters = []
    for name, a in zip(kernel["input_names"], call["inputs"], strict=True):
        parameters.append(f"const {TYPES[a.dtype]}* {name}")
        if f"{name}_shape" in body:
            parameters.append(f"const __grid_constant__ Shape {name}_shape")
    outputs = zip(kernel["output_names"], call["output_dtypes"], strict=True)
    parameters += [f"{TYPES[dtype]}* {name}" for name, dtype in outputs]
    constants = [
        f"using {name} = {TYPES[value]};" if isinstance(value, mx.Dtype) else f"constexpr int {name} = {int(value)};"
        for name, value in call["template"]
    ]
    lines = [CUDA, header, "namespace mlx::core::cu {", f"__global__ void {kernel['name']}({', '.join(parameters)}) {{"]
    return "\n".join([*lines, *constants, body, "}", "}", "#pragma clang force_cuda_host_device end", ""])


def compile_text(clang: str, text: str, folder: Path, *options: str) -> str:
    source = folder / "kernel.cu"
    source.write_text(text)
    target = ("-x", "cuda", "--cuda-device-only", "--cuda-gpu-arch=sm_80", "-nocudainc", "-nocudalib", "-nogpulib")
    command = [clang, *target, "-std=c++17", "-Wno-unknown-cuda-version", "-Werror=return-type", *options, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    return done.stderr if done.returncode else ""


@pytest.mark.parametrize("M", [1, 2])
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_affine(clang, bench, launches, tmp_path, bits, M):
    dtype = (mx.float16, mx.bfloat16, mx.float32)[bits % 3]
    weights = affine_cases.packed((37, 320), bits, 64, dtype)
    metal_backend.quantized_matmul(affine_cases.normal((M, 320), dtype), *weights, True, bits, 64)
    (launch,) = launches
    assert compile_text(clang, unit(launch, bench), tmp_path, "-fsyntax-only") == ""


@pytest.mark.parametrize("M", [1, 2])
@pytest.mark.parametrize("name", METAL_TYPES)
def test_blocks(clang, bench, launches, tmp_path, name, M):
    dtype = (mx.float16, mx.bfloat16, mx.float32)[METAL_TYPES.index(name) % 3]
    metal_blocks.block_matmul(mx.zeros((M, 512), dtype), mx.array(random_blocks(name, (9, 512))), name)
    (launch,) = launches
    assert compile_text(clang, unit(launch, bench), tmp_path, "-fsyntax-only") == ""


def test_a_fault_is_found(clang, bench, launches, tmp_path):
    metal_blocks.block_matmul(mx.zeros((1, 512), mx.float16), mx.array(random_blocks("Q4_K", (9, 512))), "Q4_K")
    text = unit(launches[0], bench).replace("simd_sum(acc[m][r])", "simd_summ(acc[m][r])")
    assert "simd_summ" in compile_text(clang, text, tmp_path, "-fsyntax-only")
