// y = x @ w_hat.T for up to 16 rows of x: every SIMD-group owns a few weight rows and reads each weight once.
//
// A lane reads a run of codes, its neighbour the next run: one load of a SIMD-group is one contiguous piece of a row.
// Names: X, S, Y are the dtypes of x, of scales and biases, and of y.
#pragma once
#include "affine.h"

constant constexpr int QMV_SIMD_GROUPS = 2;

/// Codes a lane reads at a time: 8 or 12 bytes, 16 for 8 bits, 20 for 5 bits.
template <int bits>
constexpr int affine_qmv_run() {
  return bits == 4 || bits == 6 || bits == 8 ? 16 : 32;
}

/// Weight rows of a SIMD-group for M rows of x: what the registers hold.
constexpr int affine_qmv_rows(int M) {
  return M <= 8 ? 4 : 2;
}

/// Where rows of weights are read: `row(r)` counts from one of them. Past the last row, it is read again.
template <typename S, int group_size, int bits, int K>
struct AffineRows {
  const device uint* w;
  const device S* scales;
  const device S* biases;
  int last_row;

  AffineRows(const device uint* w_, const device S* scales_, const device S* biases_, int row, int last) thread
      : w(w_ + size_t(row) * (K * bits / 32)),
        scales(scales_ + size_t(row) * (K / group_size)),
        biases(biases_ + size_t(row) * (K / group_size)),
        last_row(last) {}

  MLXQ_FUNC const device uint* words(int r) const thread {
    return w + min(r, last_row) * (K * bits / 32);
  }
  /// Group `c` of the run.
  MLXQ_FUNC float scale(int r, int c) const thread {
    return float(scales[min(r, last_row) * (K / group_size) + c]);
  }
  MLXQ_FUNC float bias(int r, int c) const thread {
    return float(biases[min(r, last_row) * (K / group_size) + c]);
  }
  MLXQ_FUNC void advance(int codes) thread {
    w += codes * bits / 32;
    scales += codes / group_size;
    biases += codes / group_size;
  }
};

/// Adds the products of a run of M rows of x with `rows` runs of codes to `sums` [M, rows]: codes are multiplied as they
/// are, grids their sums. For one or two rows of x, beyond which it is less to make weights of codes first.
template <int group_size, int bits, int K, int M, int rows, typename Rows, typename P>
MLXQ_FUNC void affine_qmv_step(const thread Rows& weights, P x, thread float* sums) {
  constexpr int run = affine_qmv_run<bits>();
  constexpr int chunk = run < group_size ? run : group_size;
  float v[M][run];
  float totals[M][run / chunk];
  MLXQ_UNROLL
  for (int m = 0; m < M; m++) {
    load_floats<run>(rows_at(x, m * K), v[m]);
    MLXQ_UNROLL
    for (int c = 0; c < run / chunk; c++) {
      totals[m][c] = v[m][c * chunk];
      MLXQ_UNROLL
      for (int i = 1; i < chunk; i++) {
        totals[m][c] += v[m][c * chunk + i];
      }
    }
    MLXQ_UNROLL
    for (int i = 0; i < run; i++) {
      v[m][i] *= affine_place<bits>(i);
    }
  }
  MLXQ_UNROLL
  for (int r = 0; r < rows; r++) {
    typename affine_piece<bits>::type codes[affine_pieces<bits, run>()];
    affine_load<bits, run>(weights.words(r), codes);
    MLXQ_UNROLL
    for (int c = 0; c < run / chunk; c++) {
      float dots[M] = {};
      MLXQ_UNROLL
      for (int i = c * chunk; i < (c + 1) * chunk; i++) {
        const float code = affine_masked<bits>(codes, i);
        MLXQ_UNROLL
        for (int m = 0; m < M; m++) {
          dots[m] = fma(v[m][i], code, dots[m]);
        }
      }
      const float scale = weights.scale(r, c), bias = weights.bias(r, c);
      MLXQ_UNROLL
      for (int m = 0; m < M; m++) {
        sums[m * rows + r] = fma(scale, dots[m], fma(bias, totals[m][c], sums[m * rows + r]));
      }
    }
  }
}

/// Adds the products of M rows of x with `rows` runs of codes to `sums` [M, rows]: codes become weights eight at a
/// time, which all rows of x use.
template <int group_size, int bits, int K, int M, int rows, typename Rows, typename P>
MLXQ_FUNC void affine_qmv_rows_step(const thread Rows& weights, P x, thread float* sums) {
  constexpr int run = affine_qmv_run<bits>();
  constexpr int per_group = run < group_size ? run : group_size;
  typename affine_piece<bits>::type codes[rows][affine_pieces<bits, run>()];
  MLXQ_UNROLL
  for (int r = 0; r < rows; r++) {
    affine_load<bits, run>(weights.words(r), codes[r]);
  }
  float scale[rows], bias[rows];
  MLXQ_UNROLL
  for (int i = 0; i < run; i += 8) {
    float v[rows][8];
    MLXQ_UNROLL
    for (int r = 0; r < rows; r++) {
      if (i % per_group == 0) {
        scale[r] = weights.scale(r, i / per_group);
        bias[r] = weights.bias(r, i / per_group);
      }
      MLXQ_UNROLL
      for (int j = 0; j < 8; j++) {
        v[r][j] = fma(scale[r], affine_float<bits>(codes[r], i + j), bias[r]);
      }
    }
    MLXQ_UNROLL
    for (int m = 0; m < M; m++) {
      float u[8];
      load_floats<8>(rows_at(x, m * K) + i, u);
      MLXQ_UNROLL
      for (int r = 0; r < rows; r++) {
        MLXQ_UNROLL
        for (int j = 0; j < 8; j++) {
          sums[m * rows + r] = fma(u[j], v[r][j], sums[m * rows + r]);
        }
      }
    }
  }
}

/// Adds a lane's part of the products of M rows of x with `rows` rows of weights to `sums` [M, rows].
template <int group_size, int bits, int K, int M, int rows, typename Rows, typename P>
MLXQ_FUNC void affine_qmv_sums(Rows weights, P x, uint lane, thread float* sums) {
  constexpr int step = SIMD_LANES * affine_qmv_run<bits>();
  const int k = int(lane) * affine_qmv_run<bits>();
  weights.advance(k);
  x += k;
  for (int i = 0; i < K / step; i++) {
    if constexpr (M <= 2) {
      affine_qmv_step<group_size, bits, K, M, rows>(weights, x, sums);
    } else {
      affine_qmv_rows_step<group_size, bits, K, M, rows>(weights, x, sums);
    }
    weights.advance(step);
    x += step;
  }
  if (K % step != 0 && k < K % step) {
    if constexpr (M <= 2) {
      affine_qmv_step<group_size, bits, K, M, rows>(weights, x, sums);
    } else {
      affine_qmv_rows_step<group_size, bits, K, M, rows>(weights, x, sums);
    }
  }
}

/// M rows of x, 1 to 16, at once; x is a pointer or `Permuted<X>`. `block` counts the threadgroups' blocks of
/// QMV_SIMD_GROUPS * affine_qmv_rows(M) outputs.
template <
    typename X, typename S, typename Y, int group_size, int bits, int N, int K, int M, typename P = const device X*>
MLXQ_FUNC void affine_qmv_rows(
    const device uint* w,
    const device S* scales,
    const device S* biases,
    P x,
    device Y* y,
    uint block,
    uint simd_group,
    uint lane) {
  constexpr int rows = affine_qmv_rows(M);
  constexpr int held = next_power_of_two(M * rows);
  const int row = int(block * QMV_SIMD_GROUPS + simd_group) * rows;
  if (row >= N) {
    return;
  }
  const int last_row = N % rows ? min(rows - 1, N - 1 - row) : rows - 1;
  float sums[held] = {};
  const AffineRows<S, group_size, bits, K> weights(w, scales, biases, row, last_row);
  affine_qmv_sums<group_size, bits, K, M, rows>(weights, x, lane, sums);
  const float total = sum_lanes<held>(sums, lane);
  const int m = int(lane) / (SIMD_LANES / held) / rows;
  const int r = int(lane) / (SIMD_LANES / held) % rows;
  if (lane % (SIMD_LANES / held) == 0 && m < M && r <= last_row) {
    y[size_t(m) * N + row + r] = Y(total);
  }
}

/// One row of x.
template <typename X, typename S, typename Y, int group_size, int bits, int N, int K, typename P = const device X*>
MLXQ_FUNC void affine_qmv(
    const device uint* w,
    const device S* scales,
    const device S* biases,
    P x,
    device Y* y,
    uint block,
    uint simd_group,
    uint lane) {
  affine_qmv_rows<X, S, Y, group_size, bits, N, K, 1>(w, scales, biases, x, y, block, simd_group, lane);
}
