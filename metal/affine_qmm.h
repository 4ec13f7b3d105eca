// x @ w_hat.T in tiles of many rows of x, on 8 x 8 matrices of a SIMD-group.
//
// Codes go from their load to the matrix unit in registers: a lane loads a run of codes, and the order of a sum's terms is
// permuted so that the codes which a fragment needs from a lane are the ones it holds. Only x passes through threadgroup
// memory, in the same order.
#pragma once
#include <metal_simdgroup_matrix>

#include "affine.h"

constant constexpr int QMM_SIMD_GROUPS = 4;

/// Accumulators of `rows` x `columns` fragments. With `chained` the sums of QMM_CHAIN terms are added to totals, which
/// keeps the error of a long float32 sum near that of a short one; other results round away more than that error.
template <int rows, int columns, bool chained>
struct Fragments {
  simdgroup_matrix<float, 8, 8> part[rows][columns];
  float total[chained ? rows : 1][chained ? columns : 1][2];

  MLXQ_FUNC void clear() thread {
    MLXQ_UNROLL
    for (int m = 0; m < rows; m++) {
      MLXQ_UNROLL
      for (int n = 0; n < columns; n++) {
        part[m][n] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        if constexpr (chained) {
          total[m][n][0] = 0.0f;
          total[m][n][1] = 0.0f;
        }
      }
    }
  }

  MLXQ_FUNC void fold() thread {
    if constexpr (chained) {
      MLXQ_UNROLL
      for (int m = 0; m < rows; m++) {
        MLXQ_UNROLL
        for (int n = 0; n < columns; n++) {
          total[m][n][0] += part[m][n].thread_elements()[0];
          total[m][n][1] += part[m][n].thread_elements()[1];
          part[m][n] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        }
      }
    }
  }

  MLXQ_FUNC float at(int m, int n, int element) thread {
    if constexpr (chained) {
      return total[m][n][element];
    } else {
      return part[m][n].thread_elements()[element];
    }
  }
};

/// Terms of a float32 sum in one chain: one or two blocks of eight runs.
constant constexpr int QMM_CHAIN = 256;

/// Removes the first eight codes of a run.
template <int bits, int n_words>
MLXQ_FUNC void affine_drop8(thread typename affine_piece<bits>::type* w) {
  constexpr int words = bits / int(sizeof(typename affine_piece<bits>::type));
  constexpr int shift = bits * 8 % 32;
  MLXQ_UNROLL
  for (int i = 0; i < n_words; i++) {
    const uint low = i + words < n_words ? w[i + words] : 0u;
    const uint high = i + words + 1 < n_words ? w[i + words + 1] : 0u;
    w[i] = shift == 0 ? low : (low >> shift) | (high << ((32 - shift) & 31));
  }
}

/// Codes of a lane's run: 16 bytes for 4 and 8 bits, so that the eight lanes of a row load 128. Half of that where K
/// does not divide into eight such runs, so that fewer lanes of the last block have none (3 and 5 bits: no half words).
template <int bits, int K>
constexpr int affine_qmm_run() {
  return bits == 8 || (bits % 2 == 0 && K % 256 != 0) ? 16 : 32;
}

constant constexpr int QMM_TILE_M = 32;
constant constexpr int QMM_TILE_N = 64;
/// Columns of x in threadgroup memory at a time, eight runs' worth of QMM_DEPTH / 8.
constant constexpr int QMM_DEPTH = 128;
/// Elements of a row of x there; not a multiple of a fragment's rows, to spread the banks.
constant constexpr int QMM_STRIDE = QMM_DEPTH + 8;

/// Rows of a tile of y that are computed: `begin` to `end`, counted from the tile's first.
struct QmmRows {
  int begin;
  int end;
};

/// Copies columns `first + run * slot + (0 ... QMM_DEPTH / 8 - 1)` of a tile of x, slot 0 ... 7, to threadgroup memory as
/// [row][column within the run][slot]; zeros for other rows and where x ends.
template <typename X, int K, int run, bool all_rows>
MLXQ_FUNC void affine_qmm_load_x(const device X* x, QmmRows rows, int first, threadgroup X* tile, uint thread_index) {
  // A SIMD-group copies a row in quads of columns: 4 of a run, of 8 runs.
  static_assert(QMM_DEPTH == 4 * SIMD_LANES, "a quad for each lane");
  const int lane = int(thread_index) % SIMD_LANES;
  const int first_row = int(thread_index) / SIMD_LANES;
  const int column = lane % 4 * 4;
  const int slot = lane / 4;
  const int k = first + run * slot + column;
  const bool inside = K % (8 * run) == 0 || k < K;
  const int begin = rows.begin - first_row;
  const int end = rows.end - first_row;
  x += size_t(first_row) * K + k;
  tile += first_row * QMM_STRIDE + column * 8 + slot;
  MLXQ_UNROLL
  for (int i = 0; i < QMM_TILE_M; i += QMM_SIMD_GROUPS) {
    vec<X, 4> v = vec<X, 4>(X(0));
    if (inside && (all_rows || (i >= begin && i < end))) {
      v = *(const device vec<X, 4>*)(x + size_t(i) * K);
    }
    threadgroup X* out = tile + i * QMM_STRIDE;
    out[0] = v.x;
    out[8] = v.y;
    out[16] = v.z;
    out[24] = v.w;
  }
}

/// y = x @ w_hat.T for a tile of y: `x` and `y` at the tile's first row, `w` [N, K].
///
/// Eight lanes share a weight row, each with a run of codes; fragment f of a block of eight runs takes code f of each.
template <typename X, typename S, typename Y, int group_size, int bits, int N, int K>
MLXQ_FUNC void affine_qmm_t_tile(
    const device uint* w,
    const device S* scales,
    const device S* biases,
    const device X* x,
    device Y* y,
    threadgroup X* tile,
    QmmRows computed,
    uint tile_n,
    uint simd_group,
    uint lane) {
  constexpr int run = affine_qmm_run<bits, K>();
  constexpr int n_pieces = affine_pieces<bits, run>();
  constexpr int depth = QMM_DEPTH / 8;
  constexpr int m_fragments = QMM_TILE_M / 8;
  constexpr int n_fragments = QMM_TILE_N / 8 / QMM_SIMD_GROUPS;
  constexpr bool all_columns = N % QMM_TILE_N == 0;
  const int first_n = int(tile_n) * QMM_TILE_N + int(simd_group) * n_fragments * 8;
  const int slot = fragment_row(lane);
  const int column = fragment_column(lane);

  // The lane's run of two rows a fragment, and their grids; past the last row, that row again.
  const device uint* from[n_fragments][2];
  const device S* scales_from[n_fragments][2];
  const device S* biases_from[n_fragments][2];
  MLXQ_UNROLL
  for (int n = 0; n < n_fragments; n++) {
    MLXQ_UNROLL
    for (int e = 0; e < 2; e++) {
      const int n_row = first_n + n * 8 + column + e;
      const size_t row = size_t(all_columns ? n_row : min(n_row, N - 1));
      from[n][e] = w + row * (K * bits / 32) + slot * run * bits / 32;
      scales_from[n][e] = scales + row * (K / group_size) + slot * run / group_size;
      biases_from[n][e] = biases + row * (K / group_size) + slot * run / group_size;
    }
  }
  Fragments<m_fragments, n_fragments, sizeof(Y) == 4 && (K > QMM_CHAIN)> sums;
  sums.clear();

  const bool all_rows = computed.begin == 0 && computed.end == QMM_TILE_M;
  for (int block = 0; block < K; block += 8 * run) {
    const int k = block + slot * run;
    const bool inside = K % (8 * run) == 0 || k < K;
    typename affine_piece<bits>::type codes[n_fragments][2][n_pieces] = {};
    float scale[n_fragments][2] = {};
    float bias[n_fragments][2] = {};
    if (inside) {
      MLXQ_UNROLL
      for (int n = 0; n < n_fragments; n++) {
        MLXQ_UNROLL
        for (int e = 0; e < 2; e++) {
          affine_load<bits, run>(from[n][e], codes[n][e]);
          from[n][e] += 8 * run * bits / 32;
        }
      }
    }
    for (int start = 0; start < run; start += depth) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (all_rows) {
        affine_qmm_load_x<X, K, run, true>(x, computed, block + start, tile, simd_group * SIMD_LANES + lane);
      } else {
        affine_qmm_load_x<X, K, run, false>(x, computed, block + start, tile, simd_group * SIMD_LANES + lane);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (inside && (group_size < run || start == 0)) {
        MLXQ_UNROLL
        for (int n = 0; n < n_fragments; n++) {
          MLXQ_UNROLL
          for (int e = 0; e < 2; e++) {
            scale[n][e] = float(scales_from[n][e][(block + start) / group_size]);
            bias[n][e] = float(biases_from[n][e][(block + start) / group_size]);
          }
        }
      }
      const threadgroup X* x_from = tile + slot * QMM_STRIDE + column;
      for (int f = 0; f < depth; f += 8) {
        MLXQ_UNROLL
        for (int j = 0; j < 8; j++) {
          simdgroup_matrix<float, 8, 8> a[m_fragments];
          MLXQ_UNROLL
          for (int m = 0; m < m_fragments; m++) {
            const vec<X, 2> v = *(const threadgroup vec<X, 2>*)(x_from + m * 8 * QMM_STRIDE + j * 8);
            a[m].thread_elements()[0] = float(v.x);
            a[m].thread_elements()[1] = float(v.y);
          }
          MLXQ_UNROLL
          for (int n = 0; n < n_fragments; n++) {
            simdgroup_matrix<float, 8, 8> b;
            b.thread_elements()[0] = fma(scale[n][0], affine_float<bits>(codes[n][0], j), bias[n][0]);
            b.thread_elements()[1] = fma(scale[n][1], affine_float<bits>(codes[n][1], j), bias[n][1]);
            MLXQ_UNROLL
            for (int m = 0; m < m_fragments; m++) {
              simdgroup_multiply_accumulate(sums.part[m][n], a[m], b, sums.part[m][n]);
            }
          }
        }
        x_from += 64;
        MLXQ_UNROLL
        for (int n = 0; n < n_fragments; n++) {
          affine_drop8<bits, n_pieces>(codes[n][0]);
          affine_drop8<bits, n_pieces>(codes[n][1]);
        }
      }
    }
    if (8 * run == QMM_CHAIN || block % QMM_CHAIN != 0) {
      sums.fold();
    }
  }
  if (8 * run != QMM_CHAIN && (K - 1) % QMM_CHAIN < 8 * run) {
    sums.fold();
  }

  MLXQ_UNROLL
  for (int m = 0; m < m_fragments; m++) {
    const int row = m * 8 + slot;
    const bool wanted = row >= computed.begin && row < computed.end;
    MLXQ_UNROLL
    for (int n = 0; n < n_fragments; n++) {
      const int out = first_n + n * 8 + column;
      device Y* to = y + size_t(row) * N + out;
      if (wanted && (all_columns || out < N)) {
        to[0] = Y(sums.at(m, n, 0));
      }
      if (wanted && (all_columns || out + 1 < N)) {
        to[1] = Y(sums.at(m, n, 1));
      }
    }
  }
}

/// y = x @ w_hat.T: `x` [M, K], `w` [N, K], tile (`at.y`, `at.x`) of y; matrix `at.z` of a batch.
template <typename X, typename S, typename Y, int group_size, int bits, int N, int K>
MLXQ_FUNC void affine_qmm_t(
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
  const int first = int(at.y) * QMM_TILE_M;
  const QmmRows rows = {0, min(M - first, QMM_TILE_M)};
  affine_qmm_t_tile<X, S, Y, group_size, bits, N, K>(
      w, scales, biases, x + size_t(first) * K, y + size_t(first) * N, tile, rows, at.x, simd_group, lane);
}
