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

/// Adds the products of one run of x with `rows` runs of codes to `sums`. All pointers are at the run.
template <typename X, typename S, int group_size, int bits, int K, int rows>
MLXQ_FUNC void affine_qmv_step(
    const device uint* w,
    const device S* scales,
    const device S* biases,
    const device X* x,
    int last_row,
    thread float* sums) {
  constexpr int run = affine_qmv_run<bits>();
  constexpr int chunk = run < group_size ? run : group_size;
  constexpr int n_words = affine_words<bits, run>();
  float v[run];
  load_floats<run>(x, v);
  float totals[run / chunk];
  MLXQ_UNROLL
  for (int c = 0; c < run / chunk; c++) {
    totals[c] = v[c * chunk];
    MLXQ_UNROLL
    for (int i = 1; i < chunk; i++) {
      totals[c] += v[c * chunk + i];
    }
  }
  MLXQ_UNROLL
  for (int i = 0; i < run; i++) {
    v[i] *= affine_place<bits>(i);
  }
  MLXQ_UNROLL
  for (int r = 0; r < rows; r++) {
    const int row = min(r, last_row);
    uint codes[n_words];
    load_words<n_words>(w + row * (K * bits / 32), codes);
    MLXQ_UNROLL
    for (int c = 0; c < run / chunk; c++) {
      const int group = row * (K / group_size) + c;
      float dot = 0.0f;
      MLXQ_UNROLL
      for (int i = c * chunk; i < (c + 1) * chunk; i++) {
        dot = fma(v[i], affine_masked<bits>(codes, i), dot);
      }
      sums[r] = fma(float(scales[group]), dot, fma(float(biases[group]), totals[c], sums[r]));
    }
  }
}

/// One row of x; `block` counts the threadgroups' blocks of QMV_SIMD_GROUPS * 4 outputs.
template <typename X, typename S, typename Y, int group_size, int bits, int N, int K>
MLXQ_FUNC void affine_qmv(
    const device uint* w,
    const device S* scales,
    const device S* biases,
    const device X* x,
    device Y* y,
    uint block,
    uint simd_group,
    uint lane) {
  constexpr int rows = affine_qmv_rows(1);
  constexpr int run = affine_qmv_run<bits>();
  constexpr int step = SIMD_LANES * run;
  const int row = int(block * QMV_SIMD_GROUPS + simd_group) * rows;
  if (row >= N) {
    return;
  }
  // Past the last row, a SIMD-group computes that row again and does not store it.
  const int last_row = N % rows ? min(rows - 1, N - 1 - row) : rows - 1;
  const int k = int(lane) * run;
  w += size_t(row) * (K * bits / 32) + k * bits / 32;
  scales += size_t(row) * (K / group_size) + k / group_size;
  biases += size_t(row) * (K / group_size) + k / group_size;
  x += k;
  float sums[rows] = {};
  for (int i = 0; i < K / step; i++) {
    affine_qmv_step<X, S, group_size, bits, K, rows>(w, scales, biases, x, last_row, sums);
    w += step * bits / 32;
    scales += step / group_size;
    biases += step / group_size;
    x += step;
  }
  if (K % step != 0 && k < K % step) {
    affine_qmv_step<X, S, group_size, bits, K, rows>(w, scales, biases, x, last_row, sums);
  }
  const float total = sum_lanes<rows>(sums, lane);
  const int r = int(lane) / (SIMD_LANES / rows);
  if (lane % (SIMD_LANES / rows) == 0 && r <= last_row) {
    y[row + r] = Y(total);
  }
}

/// Adds the products of M rows of x with `rows` runs of codes to `sums` [M, rows]: codes become weights eight at a
/// time, which all rows of x use.
template <typename X, typename S, int group_size, int bits, int K, int M, int rows>
MLXQ_FUNC void affine_qmv_rows_step(
    const device uint* w,
    const device S* scales,
    const device S* biases,
    const device X* x,
    int last_row,
    thread float* sums) {
  constexpr int run = affine_qmv_run<bits>();
  constexpr int n_words = affine_words<bits, run>();
  constexpr int per_group = run < group_size ? run : group_size;
  uint codes[rows][n_words];
  MLXQ_UNROLL
  for (int r = 0; r < rows; r++) {
    load_words<n_words>(w + min(r, last_row) * (K * bits / 32), codes[r]);
  }
  float scale[rows], bias[rows];
  MLXQ_UNROLL
  for (int i = 0; i < run; i += 8) {
    float v[rows][8];
    MLXQ_UNROLL
    for (int r = 0; r < rows; r++) {
      if (i % per_group == 0) {
        const int group = min(r, last_row) * (K / group_size) + i / per_group;
        scale[r] = float(scales[group]);
        bias[r] = float(biases[group]);
      }
      MLXQ_UNROLL
      for (int j = 0; j < 8; j++) {
        v[r][j] = fma(scale[r], affine_float<bits>(codes[r], i + j), bias[r]);
      }
    }
    MLXQ_UNROLL
    for (int m = 0; m < M; m++) {
      float u[8];
      load_floats<8>(x + m * K + i, u);
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

/// M rows of x, 2 to 16, at once.
template <typename X, typename S, typename Y, int group_size, int bits, int N, int K, int M>
MLXQ_FUNC void affine_qmv_rows(
    const device uint* w,
    const device S* scales,
    const device S* biases,
    const device X* x,
    device Y* y,
    uint block,
    uint simd_group,
    uint lane) {
  constexpr int rows = affine_qmv_rows(M);
  constexpr int run = affine_qmv_run<bits>();
  constexpr int step = SIMD_LANES * run;
  const int row = int(block * QMV_SIMD_GROUPS + simd_group) * rows;
  if (row >= N) {
    return;
  }
  const int last_row = N % rows ? min(rows - 1, N - 1 - row) : rows - 1;
  const int k = int(lane) * run;
  w += size_t(row) * (K * bits / 32) + k * bits / 32;
  scales += size_t(row) * (K / group_size) + k / group_size;
  biases += size_t(row) * (K / group_size) + k / group_size;
  x += k;
  constexpr int held = next_power_of_two(M * rows);
  float sums[held] = {};
  for (int i = 0; i < K / step; i++) {
    affine_qmv_rows_step<X, S, group_size, bits, K, M, rows>(w, scales, biases, x, last_row, sums);
    w += step * bits / 32;
    scales += step / group_size;
    biases += step / group_size;
    x += step;
  }
  if (K % step != 0 && k < K % step) {
    affine_qmv_rows_step<X, S, group_size, bits, K, M, rows>(w, scales, biases, x, last_row, sums);
  }
  const float total = sum_lanes<held>(sums, lane);
  const int m = int(lane) / (SIMD_LANES / held) / rows;
  const int r = int(lane) / (SIMD_LANES / held) % rows;
  if (lane % (SIMD_LANES / held) == 0 && m < M && r <= last_row) {
    y[size_t(m) * N + row + r] = Y(total);
  }
}
