"""A tiled product with one thing wrong at a time: the checker names it, or the numbers show it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from metal_on_cpu import MslError, metal_kernel

pytestmark = pytest.mark.usefixtures("checker")

_M, _N, _K = 16, 21, 40

# y[M, N] = x[M, K] @ w[N, K].T by 16 x 16 tiles: four SIMD-groups, 8 columns of K a step, rows of w guarded.
_HEADER = """
constant constexpr int STRIDE = 12;  // 8 columns and padding

inline void load_tile(const device float* from, threadgroup float* to, int rows, int K, int k0, uint lid) {
  for (int at = int(lid); at < 16 * 8; at += 128) {
    const int row = at / 8;
    const int column = at % 8;
    to[row * STRIDE + column] = row < rows ? from[row * K + k0 + column] : 0.0f;
  }
}
"""
_SOURCE = """
threadgroup float a_tile[16 * STRIDE];
threadgroup float b_tile[16 * STRIDE];
threadgroup float c_tile[16 * 16];
const int M = x_shape[0], K = x_shape[1], N = w_shape[0];
const int row0 = int(threadgroup_position_in_grid.y) * 16;
const int col0 = int(threadgroup_position_in_grid.x) * 16;
const uint lid = thread_index_in_threadgroup;
const int sg_row = int(simdgroup_index_in_threadgroup) / 2 * 8;
const int sg_col = int(simdgroup_index_in_threadgroup) % 2 * 8;
simdgroup_matrix<float, 8, 8> a, b;
simdgroup_matrix<float, 8, 8> c = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
for (int k0 = 0; k0 < K; k0 += 8) {
  threadgroup_barrier(mem_flags::mem_threadgroup);  // before
  load_tile(x + row0 * K, a_tile, M - row0, K, k0, lid);
  load_tile(w + col0 * K, b_tile, N - col0, K, k0, lid);
  threadgroup_barrier(mem_flags::mem_threadgroup);  // after
  simdgroup_load(a, a_tile + sg_row * STRIDE, STRIDE);
  simdgroup_load(b, b_tile + sg_col * STRIDE, STRIDE, ulong2(0), true);
  simdgroup_multiply_accumulate(c, a, b, c);
}
simdgroup_store(c, c_tile + sg_row * 16 + sg_col, 16);
threadgroup_barrier(mem_flags::mem_threadgroup);  // stored
for (int at = int(lid); at < 256; at += 128)
  if (row0 + at / 16 < M && col0 + at % 16 < N) y[(row0 + at / 16) * N + col0 + at % 16] = c_tile[at];
"""

# What is replaced, by what, and the finding, or None where only the numbers show it.
MUTANTS = {
    "no barrier before the loads": ("threadgroup_barrier(mem_flags::mem_threadgroup);  // before", "", "unordered"),
    "no barrier after the loads": ("threadgroup_barrier(mem_flags::mem_threadgroup);  // after", "", "unordered"),
    "no barrier after the stores": ("threadgroup_barrier(mem_flags::mem_threadgroup);  // stored", "", "unordered"),
    "weaker barrier": (
        "threadgroup_barrier(mem_flags::mem_threadgroup);  // after",
        "simdgroup_barrier(mem_flags::mem_threadgroup);",
        "unordered",
    ),
    "barrier in one SIMD-group": (
        "threadgroup_barrier(mem_flags::mem_threadgroup);  // stored",
        "if (simdgroup_index_in_threadgroup == 0) threadgroup_barrier(mem_flags::mem_threadgroup);",
        "after some threads returned|unordered",
    ),
    "tile too small": ("b_tile[16 * STRIDE]", "b_tile[15 * STRIDE]", "write out of bounds"),
    "rows not guarded": ("row < rows ?", "row < 16 ?", "read out of bounds"),
    "columns not guarded": ("&& col0 + at % 16 < N)", ")", "out of bounds|unordered"),
    "last step of K beyond the row": ("k0 < K; k0 += 8", "k0 < K + 8; k0 += 8", "read out of bounds"),
    "half of the outputs": ("at < 256; at += 128", "at < 128; at += 128", "never written"),
    "two writers of each output": ("int at = int(lid); at < 256", "int at = int(lid) / 2; at < 256", "unordered"),
    "one row of the tile left out": ("at < 16 * 8", "at < 15 * 8", "uninitialized threadgroup"),
    "accumulator not set": (" = make_filled_simdgroup_matrix<float, 8, 8>(0.0f)", "", None),
    "wrong leading dimension": (
        "sg_row * STRIDE, STRIDE);",
        "sg_row * STRIDE, STRIDE - 4);",
        "uninitialized|unordered",
    ),
    "b not transposed": ("ulong2(0), true", "ulong2(0), false", None),
}


def _product(header: str, source: str) -> float:
    """Runs the product and returns its error relative to the largest output."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((_M, _K)).astype(np.float32), rng.standard_normal((_N, _K)).astype(np.float32)
    kernel = metal_kernel("product", ["x", "w"], ["y"], source, header)
    (y,) = kernel(
        inputs=[mx.array(x), mx.array(w)],
        grid=(-(-_N // 16) * 128, -(-_M // 16), 1),
        threadgroup=(128, 1, 1),
        output_shapes=[(_M, _N)],
        output_dtypes=[mx.float32],
    )
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    return float(np.abs(np.array(y) - exact).max() / np.abs(exact).max())


def test_kernel_is_correct() -> None:
    # float32 sums of 40 products: some units of 2^-24 each, far below 1e-5.
    assert _product(_HEADER, _SOURCE) < 1e-6


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_found(name: str) -> None:
    old, new, kind = MUTANTS[name]
    assert (_HEADER + _SOURCE).count(old) == 1
    header, source = _HEADER.replace(old, new), _SOURCE.replace(old, new)
    if kind:
        with pytest.raises(MslError, match=kind):
            _product(header, source)
    else:
        assert not _product(header, source) < 1e-3  # or it is nan
