"""Every kernel that dispatch can ask for, with every template, compiles in the checker's strictest mode."""

from __future__ import annotations

import itertools
import time

import mlx.core as mx
import pytest
from metal_on_cpu.together import Recorder
from metal_on_cpu.tokens import MslError

from mlxq.formats.geometry import AFFINE_BITS, OPS_GROUP_SIZES, block_format
from mlxq.ops import metal_affine, metal_backend, metal_blocks, metal_fused, metal_source
from mlxq.ops.arrays import mlx_dtype
from mlxq.ops.dispatch import METAL_TYPES
from mlxq.types import FLOAT_BYTES

DTYPES = [mlx_dtype(name) for name in FLOAT_BYTES]
VECTOR_ROWS = range(1, metal_affine.MAX_VECTOR_ROWS + 1)
TILED_ROWS = metal_affine.MAX_VECTOR_ROWS + 1
GRIDS = list(itertools.product(AFFINE_BITS, OPS_GROUP_SIZES))
#: Rows and columns of weights: whole tiles and runs, and neither.
SHAPES = [(128, 2048), (37, 384)]
#: Blocks of a row: their bytes divide by each power of two up to 16 that any K lets them.
BLOCKS = (1, 2, 4, 8)
#: One for each sort of fused kernel.
FUSED_ROWS = (1, 2, 9)


@pytest.fixture
def recorder(checker, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(mx.fast, "metal_kernel", recorder.metal_kernel)
    metal_source._kernel.cache_clear()
    yield recorder
    metal_source._kernel.cache_clear()


def finish(recorder: Recorder, at_least: int) -> None:
    started = time.perf_counter()
    recorder.compile()
    print(f"{recorder.count} instantiations of {len(recorder.asked)} texts in {time.perf_counter() - started:.0f} s")
    assert recorder.count >= at_least


def packed(shape: tuple[int, ...], bits: int, group_size: int, dtype: mx.Dtype) -> list[mx.array]:
    *lead, K = shape
    scales = mx.zeros((*lead, K // group_size), dtype)
    return [mx.zeros((*lead, K * bits // 32), mx.uint32), scales, scales]


def shapes_for(x: mx.Dtype, scales: mx.Dtype) -> list[tuple[int, int]]:
    """What a shape changes does not depend on dtypes: mixed ones are compiled for one of them."""
    return SHAPES if x == scales else SHAPES[1:]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_affine_products(recorder, dtype):
    for (bits, group_size), scales in itertools.product(GRIDS, DTYPES):
        for N, K in shapes_for(dtype, scales):
            w = packed((N, K), bits, group_size, scales)
            for M in (*VECTOR_ROWS, TILED_ROWS):
                metal_backend.quantized_matmul(mx.zeros((M, K), dtype), *w, True, bits, group_size)
            metal_backend.quantized_matmul(mx.zeros((2, N), dtype), *w, False, bits, group_size)
    finish(recorder, len(GRIDS) * (len(DTYPES) + 1) * (len(VECTOR_ROWS) + 2))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_affine_gathered_products(recorder, dtype):
    E, B = 3, metal_backend.MIN_SORTED_ROWS
    experts = mx.zeros((B,), mx.uint32)
    for (bits, group_size), scales in itertools.product(GRIDS, DTYPES):
        for N, K in shapes_for(dtype, scales):
            w, grid = packed((E, N, K), bits, group_size, scales), (bits, group_size)
            # Vector kernels are those of `test_affine_products`: here each sort of them.
            for M in (1, 2, 8, 9, 16, TILED_ROWS):
                metal_backend.gather_quantized_matmul(mx.zeros((B, M, K), dtype), *w, experts, True, *grid, False)
            metal_backend.gather_quantized_matmul(mx.zeros((B, 1, K), dtype), *w, experts, True, *grid, True)
            metal_backend.gather_quantized_matmul(mx.zeros((B, 1, N), dtype), *w, experts, False, *grid, False)
    finish(recorder, len(GRIDS) * (len(DTYPES) + 1) * 8)


@pytest.mark.slow
def test_affine_quantize_and_dequantize(recorder):
    for (bits, group_size), dtype in itertools.product(GRIDS, DTYPES):
        metal_backend.quantize(mx.zeros((8, 256), dtype), bits, group_size)
        metal_backend.dequantize(*packed((8, 256), bits, group_size, dtype), bits, group_size, None)
    finish(recorder, len(GRIDS) * len(DTYPES) * 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", METAL_TYPES)
def test_blocks(recorder, name):
    f, E, N = block_format(name), 3, 37
    B = metal_blocks._MIN_SORTED_ROWS
    few, many = mx.zeros((1,), mx.uint32), mx.zeros((B,), mx.uint32)
    for n_blocks, dtype in itertools.product(BLOCKS, DTYPES):
        K, blocks = n_blocks * f.block_size, mx.zeros((E, N, n_blocks * f.type_size), mx.uint8)
        for M in (*VECTOR_ROWS, TILED_ROWS):
            metal_blocks.block_matmul(mx.zeros((M, K), dtype), blocks[0], name)
            for indices in (few, many):
                x = mx.zeros((indices.size, M, K), dtype)
                metal_blocks.gather_block_matmul(x, blocks, indices, name)
        metal_blocks.block_dequantize(blocks, name, next(n for n in FLOAT_BYTES if mlx_dtype(n) == dtype))
    finish(recorder, len(DTYPES) * 2 * (len(VECTOR_ROWS) + 1))


def _sorts(M: int) -> tuple[str, ...]:
    """Activations that are compiled for M rows: another one changes nothing but its own text."""
    return tuple(metal_fused.ACTIVATIONS) if M == 1 else ("silu",)


@pytest.mark.slow
def test_fused_affine(recorder):
    N, K = SHAPES[1]
    for g_idx, (bits, group_size), dtype in itertools.product((None, mx.zeros((K,), mx.int32)), GRIDS, DTYPES):
        w, grid = packed((N, K), bits, group_size, dtype), (bits, group_size)
        for M in FUSED_ROWS:
            x = mx.zeros((M, K), dtype)
            metal_fused.affine_each(x, [w] * 3, [grid] * 3, g_idx)
            for activation in _sorts(M):
                metal_fused.affine_gated(x, w, w, grid, activation, g_idx)
    finish(recorder, 2 * len(GRIDS) * len(DTYPES) * 2 * len(FUSED_ROWS))


@pytest.mark.slow
@pytest.mark.parametrize("name", METAL_TYPES)
def test_fused_blocks(recorder, name):
    f, N = block_format(name), 37
    for n_blocks, dtype in itertools.product((BLOCKS[0], BLOCKS[-1]), DTYPES):
        K, w = n_blocks * f.block_size, mx.zeros((N, n_blocks * f.type_size), mx.uint8)
        for g_idx, M in itertools.product((None, mx.zeros((K,), mx.int32)), FUSED_ROWS):
            x = mx.zeros((M, K), dtype)
            metal_fused.block_each(x, [w] * 3, [name] * 3, g_idx)
            for activation in _sorts(M):
                metal_fused.block_gated(x, w, w, name, activation, g_idx)
    finish(recorder, len(DTYPES) * 2 * 2 * len(FUSED_ROWS))


def test_an_instantiation_that_does_not_compile_is_found(recorder):
    """One of several, in a text that is right for the others."""
    kernel = mx.fast.metal_kernel(
        name="one", input_names=["x"], output_names=["y"], source='static_assert(N < 3, "too large");\ny[0] = x[0];'
    )
    for n in range(4):
        call = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1), "output_shapes": [(8,)], "output_dtypes": [mx.float32]}
        kernel(inputs=[mx.zeros(8)], template=[("N", n)], **call)
        if n < 3:
            recorder.compile()
    assert (recorder.count, len(recorder.asked)) == (4, 1)
    with pytest.raises(MslError, match="too large"):
        recorder.compile()
