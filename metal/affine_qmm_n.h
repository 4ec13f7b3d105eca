// x @ w_hat in tiles of many rows of x: gradients of x, mostly.
//
// As in affine_qmm.h, codes go from their load to the matrix unit in registers; here the order of y's columns is permuted
// to suit the lanes.
#pragma once
#include "affine_qmm.h"

/// Codes of a lane's run, its columns of y.
constant constexpr int QMM_N_RUN = 16;
constant constexpr int QMM_N_TILE_M = 32;
constant constexpr int QMM_N_TILE_K = 4 * QMM_SIMD_GROUPS * QMM_N_RUN;
/// Columns of x in threadgroup memory at a time.
constant constexpr int QMM_N_DEPTH = 64;
constant constexpr int QMM_N_STRIDE = QMM_N_DEPTH + 8;

/// Sixteen codes from the half word where they begin; half words where they fill no words.
template <int bits>
MLXQ_FUNC void affine_load16(const device ushort* from, thread typename affine_piece<bits>::type* codes) {
  if constexpr (bits % 2 == 0) {
    affine_load<bits, 16>((const device uint*)from, codes);
  } else {
    MLXQ_UNROLL
    for (int i = 0; i < bits; i += 2) {
      codes[i / 2] = i + 1 < bits ? uint(from[i]) | (uint(from[i + 1]) << 16) : uint(from[i]);
    }
  }
}

/// Copies a tile of x, `rows` rows and columns `start` to `start + QMM_N_DEPTH - 1`, to threadgroup memory; zeros where x
/// ends.
template <typename X, int N>
MLXQ_FUNC void affine_qmm_n_load_x(const device X* x, int rows, int start, threadgroup X* tile, int thread_index) {
  // Rows are loaded by quads where they are aligned.
  constexpr int width = N % 4 == 0 ? 4 : 1;
  constexpr int per_row = QMM_N_DEPTH / width;
  constexpr int rows_at_once = QMM_SIMD_GROUPS * SIMD_LANES / per_row;
  const int column = thread_index % per_row * width;
  const int first_row = thread_index / per_row;
  const bool inside = N % QMM_N_DEPTH == 0 || start + column < N;
  const int left = rows - first_row;
  x += size_t(first_row) * N + start + column;
  tile += first_row * QMM_N_STRIDE + column;
  MLXQ_UNROLL
  for (int i = 0; i < QMM_N_TILE_M; i += rows_at_once) {
    const bool wanted = inside && i < left;
    if constexpr (width == 4) {
      vec<X, 4> v = vec<X, 4>(X(0));
      if (wanted) {
        v = *(const device vec<X, 4>*)(x + size_t(i) * N);
      }
      *(threadgroup vec<X, 4>*)(tile + i * QMM_N_STRIDE) = v;
    } else {
      X v = X(0);
      if (wanted) {
        v = x[size_t(i) * N];
      }
      tile[i * QMM_N_STRIDE] = v;
    }
  }
}

/// y = x @ w_hat: `x` [M, N], `w` [N, K], tile (`at.y`, `at.x`) of y.
///
/// Four lanes share a weight row, each with a run of columns; fragment f of a SIMD-group's columns takes codes 2 f and
/// 2 f + 1 of each. Long float32 sums are chained as in `affine_qmm_t`, with the totals in y.
template <typename X, typename S, typename Y, int group_size, int bits, int N, int K>
MLXQ_FUNC void affine_qmm_n(
    const device uint* w,
    const device S* scales,
    const device S* biases,
    const device X* x,
    device Y* y,
    threadgroup X* tile,
    int M,
    uint3 at,
    uint simd_group,
    uint lane) {
  constexpr int m_fragments = QMM_N_TILE_M / 8;
  constexpr int k_fragments = QMM_N_RUN / 2;
  constexpr int chain = sizeof(Y) == 4 ? QMM_CHAIN : N;
  const int first_m = int(at.y) * QMM_N_TILE_M;
  const int rows = min(M - first_m, QMM_N_TILE_M);
  const int row = fragment_row(lane);
  const int column = fragment_column(lane);
  const int k = int(at.x) * QMM_N_TILE_K + (int(simd_group) * 4 + column / 2) * QMM_N_RUN;
  const bool inside = K % QMM_N_TILE_K == 0 || k < K;
  x += size_t(first_m) * N;
  y += size_t(first_m + row) * K + k;
  // The lane's run of the row it holds, and its grid.
  const device ushort* from = (const device ushort*)w + size_t(row) * (K * bits / 16) + k * bits / 16;
  scales += size_t(row) * (K / group_size) + k / group_size;
  biases += size_t(row) * (K / group_size) + k / group_size;
  const threadgroup X* x_from = tile + row * QMM_N_STRIDE + column;

  for (int first = 0; first < N; first += chain) {
    Fragments<m_fragments, k_fragments, false> sums;
    sums.clear();
    const int last = min(first + chain, N);
    for (int start = first; start < last; start += QMM_N_DEPTH) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      affine_qmm_n_load_x<X, N>(x, rows, start, tile, int(simd_group * SIMD_LANES + lane));
      threadgroup_barrier(mem_flags::mem_threadgroup);
      const int depth = N % QMM_N_DEPTH == 0 ? QMM_N_DEPTH : min(QMM_N_DEPTH, last - start);
      _Pragma("clang loop unroll_count(2)")
      for (int n = 0; n < depth; n += 8) {
        typename affine_piece<bits>::type codes[bits == 8 ? 8 : (bits + 1) / 2] = {};
        float scale = 0.0f;
        float bias = 0.0f;
        if (inside && (N % 8 == 0 || n + row < depth)) {
          affine_load16<bits>(from, codes);
          scale = float(*scales);
          bias = float(*biases);
        }
        from += 8 * (K * bits / 16);
        scales += 8 * (K / group_size);
        biases += 8 * (K / group_size);
        simdgroup_matrix<float, 8, 8> a[m_fragments];
        MLXQ_UNROLL
        for (int m = 0; m < m_fragments; m++) {
          const vec<X, 2> v = *(const threadgroup vec<X, 2>*)(x_from + m * 8 * QMM_N_STRIDE + n);
          a[m].thread_elements()[0] = float(v.x);
          a[m].thread_elements()[1] = float(v.y);
        }
        MLXQ_UNROLL
        for (int f = 0; f < k_fragments; f++) {
          simdgroup_matrix<float, 8, 8> b;
          b.thread_elements()[0] = fma(scale, affine_float<bits>(codes, 2 * f), bias);
          b.thread_elements()[1] = fma(scale, affine_float<bits>(codes, 2 * f + 1), bias);
          MLXQ_UNROLL
          for (int m = 0; m < m_fragments; m++) {
            simdgroup_multiply_accumulate(sums.part[m][f], a[m], b, sums.part[m][f]);
          }
        }
      }
    }
    MLXQ_UNROLL
    for (int m = 0; m < m_fragments; m++) {
      if (inside && m * 8 + row < rows) {
        device Y* to = y + size_t(m) * 8 * K;
        MLXQ_UNROLL
        for (int i = 0; i < QMM_N_RUN; i++) {
          const float sum = sums.at(m, i / 2, i % 2);
          to[i] = Y(N > chain && first > 0 ? float(to[i]) + sum : sum);
        }
      }
    }
  }
}
