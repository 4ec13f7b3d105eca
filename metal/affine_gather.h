// Products with chosen matrices of a stack (mixture of experts): `w` [experts, N, K], `scales` and `biases`
// [experts, N, K / group_size]. Matrix z of a batch multiplies rows of x `sources[z]` with expert `experts[z]`.
//
// The two index arrays are pointers of any address space: mlx passes short ones as constants. An expert that the stack
// does not have is read as its last one, never past the stack's end.
#pragma once
#include "affine_qmm_n.h"
#include "affine_qmv.h"

/// Where expert `expert` of a stack begins, in words and in groups.
template <int group_size, int bits, int N, int K, int n_experts>
struct AffineExpert {
  size_t words;
  size_t groups;
  AffineExpert(uint expert) thread
      : words(size_t(min(expert, uint(n_experts - 1))) * N * (K * bits / 32)),
        groups(size_t(min(expert, uint(n_experts - 1))) * N * (K / group_size)) {}
};

/// Up to 16 rows of x a matrix.
template <
    typename X, typename S, typename Y, int group_size, int bits, int N, int K, int M, int n_experts, typename Indices>
MLXQ_FUNC void affine_gather_qmv(
    const device uint* w,
    const device S* scales,
    const device S* biases,
    const device X* x,
    Indices experts,
    Indices sources,
    device Y* y,
    uint3 at,
    uint simd_group,
    uint lane) {
  const AffineExpert<group_size, bits, N, K, n_experts> expert(experts[at.y]);
  w += expert.words;
  scales += expert.groups;
  biases += expert.groups;
  x += size_t(sources[at.y]) * (M * K);
  y += size_t(at.y) * (M * N);
  if constexpr (M == 1) {
    affine_qmv<X, S, Y, group_size, bits, N, K>(w, scales, biases, x, y, at.x, simd_group, lane);
  } else {
    affine_qmv_rows<X, S, Y, group_size, bits, N, K, M>(w, scales, biases, x, y, at.x, simd_group, lane);
  }
}

/// Many rows of x a matrix, transposed or not.
template <
    typename X, typename S, typename Y, int group_size, int bits, int N, int K, int n_experts, bool transpose,
    typename Indices>
MLXQ_FUNC void affine_gather_qmm(
    const device uint* w,
    const device S* scales,
    const device S* biases,
    const device X* x,
    Indices experts,
    Indices sources,
    device Y* y,
    threadgroup X* tile,
    int M,
    uint3 at,
    uint simd_group,
    uint lane) {
  const AffineExpert<group_size, bits, N, K, n_experts> expert(experts[at.z]);
  w += expert.words;
  scales += expert.groups;
  biases += expert.groups;
  x += size_t(sources[at.z]) * size_t(M) * (transpose ? K : N);
  y += size_t(at.z) * size_t(M) * (transpose ? N : K);
  if constexpr (transpose) {
    affine_qmm_t<X, S, Y, group_size, bits, N, K>(w, scales, biases, x, y, tile, M, at, simd_group, lane);
  } else {
    affine_qmm_n<X, S, Y, group_size, bits, N, K>(w, scales, biases, x, y, tile, M, at, simd_group, lane);
  }
}

/// One row of x a matrix, `rows` of them in ascending order of their experts: a tile computes, expert after expert, the
/// rows that it has of each, and reads that expert's weights once for all of them.
template <typename X, typename S, typename Y, int group_size, int bits, int N, int K, int n_experts, typename Indices>
MLXQ_FUNC void affine_gather_qmm_sorted(
    const device uint* w,
    const device S* scales,
    const device S* biases,
    const device X* x,
    Indices experts,
    device Y* y,
    threadgroup X* tile,
    int rows,
    uint3 at,
    uint simd_group,
    uint lane) {
  const int first = int(at.y) * QMM_TILE_M;
  const int count = min(rows - first, QMM_TILE_M);
  x += size_t(first) * K;
  y += size_t(first) * N;
  for (int begin = 0; begin < count;) {
    const uint chosen = experts[first + begin];
    int end = begin + 1;
    while (end < count && experts[first + end] == chosen) {
      end++;
    }
    const AffineExpert<group_size, bits, N, K, n_experts> expert(chosen);
    const QmmRows computed = {begin, end};
    affine_qmm_t_tile<X, S, Y, group_size, bits, N, K>(
        w + expert.words, scales + expert.groups, biases + expert.groups, x, y, tile, computed, at.x, simd_group, lane);
    begin = end;
  }
}
