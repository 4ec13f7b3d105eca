// Several products with the same rows of x in one launch: q, k and v; gate and up with the function between them.
//
// The cores are those of affine_qmv.h. x is a pointer, or `Permuted`.
#pragma once
#include "activations.h"
#include "affine_qmv.h"

/// One product of several: packed weights `[N, K]`, and y `[M, N]`.
template <typename S_, typename Y_, int group_size_, int bits_, int N_>
struct AffineProduct {
  using S = S_;
  using Y = Y_;
  static constant constexpr const int group_size = group_size_;
  static constant constexpr const int bits = bits_;
  static constant constexpr const int N = N_;

  const device uint* w;
  const device S_* scales;
  const device S_* biases;
  device Y_* y;
};

/// `block` counts the threadgroups' blocks of outputs of the first product, then of the next, and so on.
template <typename X, int K, int M, typename P, typename First, typename... Rest>
MLXQ_FUNC void affine_qmv_each(P x, uint block, uint simd_group, uint lane, First first, Rest... rest) {
  constexpr int outputs = QMV_SIMD_GROUPS * affine_qmv_rows(M);
  constexpr uint blocks = (First::N + outputs - 1) / outputs;
  if (block < blocks) {
    affine_qmv_rows<X, typename First::S, typename First::Y, First::group_size, First::bits, First::N, K, M>(
        first.w, first.scales, first.biases, x, first.y, block, simd_group, lane);
  } else if constexpr (sizeof...(Rest) > 0) {
    affine_qmv_each<X, K, M>(x, block - blocks, simd_group, lane, rest...);
  }
}

/// Outputs of a SIMD-group of `affine_qmv_gated`, each of two weight rows: what the registers hold.
constexpr int affine_gated_rows(int M) {
  return M == 1 ? 4 : M <= 8 ? 2 : 1;
}

/// `each` rows of the gate, then as many of the up projection.
template <typename Rows, int each>
struct AffinePair {
  Rows gate;
  Rows up;

  MLXQ_FUNC const device uint* words(int r) const thread {
    return r < each ? gate.words(r) : up.words(r - each);
  }
  MLXQ_FUNC float scale(int r, int c) const thread {
    return r < each ? gate.scale(r, c) : up.scale(r - each, c);
  }
  MLXQ_FUNC float bias(int r, int c) const thread {
    return r < each ? gate.bias(r, c) : up.bias(r - each, c);
  }
  MLXQ_FUNC void advance(int codes) thread {
    gate.advance(codes);
    up.advance(codes);
  }
};

/// y = Activation(x @ gate.T) * (x @ up.T), for 1 to 16 rows of x, which are read once for both.
///
/// `block` counts the threadgroups' blocks of QMV_SIMD_GROUPS * affine_gated_rows(M) outputs.
template <
    typename X, typename S, typename Y, int group_size, int bits, int N, int K, int M, typename Activation,
    typename P = const device X*>
MLXQ_FUNC void affine_qmv_gated(
    const device uint* gate_w,
    const device S* gate_scales,
    const device S* gate_biases,
    const device uint* up_w,
    const device S* up_scales,
    const device S* up_biases,
    P x,
    device Y* y,
    uint block,
    uint simd_group,
    uint lane) {
  using Rows = AffineRows<S, group_size, bits, K>;
  constexpr int rows = affine_gated_rows(M);
  constexpr int held = next_power_of_two(M * 2 * rows);
  constexpr int lanes = SIMD_LANES / held;  // that hold one sum
  const int row = int(block * QMV_SIMD_GROUPS + simd_group) * rows;
  if (row >= N) {
    return;
  }
  const int last_row = N % rows ? min(rows - 1, N - 1 - row) : rows - 1;
  const AffinePair<Rows, rows> pair = {
      Rows(gate_w, gate_scales, gate_biases, row, last_row), Rows(up_w, up_scales, up_biases, row, last_row)};
  float sums[held] = {};
  affine_qmv_sums<group_size, bits, K, M, 2 * rows>(pair, x, lane, sums);
  const float total = sum_lanes<held>(sums, lane);
  const float up = simd_shuffle_xor(total, ushort(rows * lanes));
  const int m = int(lane) / lanes / (2 * rows);
  const int r = int(lane) / lanes % (2 * rows);
  if (lane % lanes == 0 && m < M && r <= last_row) {
    y[size_t(m) * N + row + r] = Y(Activation::of(total) * up);
  }
}
