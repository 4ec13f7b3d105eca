// y = x @ w.T for many rows of x, with w in ggml's blocks.
//
// A threadgroup of four SIMD-groups computes 32 rows of x by 64 outputs, 8 x 8 at a time with simdgroup_matrix. The
// bytes of 256 weights (a span) of each of its rows of w are copied to threadgroup memory, each once. A lane decodes from
// there just the weights that its elements of the fragments are: columns are taken in an order that makes them octets.
// The eight k of a fragment are weight i of octet j of the eight shares of a span; i and j run over the fragments. So
// a lane has one share of two rows, whose scales it unpacks once a span. x is copied in the same order.
//
// Fragments are float for all types of x: decoded weights have up to 23 significant bits, and rounding them to half
// floats would cost as much as rounding the result.
#pragma once
#include <metal_simdgroup_matrix>

#include "ggml_qmv.h"

constant constexpr int GGML_QMM_SIMDGROUPS = 4;
constant constexpr int GGML_QMM_BM = 32;         // rows of x of a threadgroup
constant constexpr int GGML_QMM_BN = 64;         // outputs of a threadgroup
constant constexpr int GGML_QMM_SPAN = 256;      // weights of a row copied at a time
constant constexpr int GGML_QMM_STRIDE = 64 + 8; // floats from row to row of the tile of x

/// Bytes of a span of a row, and of its place in threadgroup memory.
template <typename Q>
constexpr int ggml_span() {
  return GGML_QMM_SPAN / Q::block * Q::bytes;
}
template <typename Q>
constexpr int ggml_span_slot() {
  return (ggml_span<Q>() + 2 + 15) / 16 * 16;
}

/// Threadgroup memory of `ggml_qmm`, as `uint4`.
template <typename Q>
constexpr int ggml_qmm_room() {
  return (4 * GGML_QMM_STRIDE * GGML_QMM_BM + GGML_QMM_BN * ggml_span_slot<Q>()) / 16;
}

/// Copy `n_bytes` of each row of w from byte `start` on, in pieces that begin at a multiple of WIDTH bytes: in a slot
/// `start % WIDTH` bytes of the row come first. WIDTH divides the rows; where it does not divide the span it is 4 at
/// most, which loads two bytes in a hundred twice.
///
/// A SIMD-group has the same rows each time, so that it comes back to the lines of which it left a part.
template <typename Q, int WIDTH>
MLXQ_FUNC void ggml_stage_span(const device uchar* w, ulong row_bytes, ulong start, int n_rows, int n_bytes,
                               threadgroup uchar* spans, uint simdgroup, uint lane) {
  static_assert(WIDTH <= 4 || ggml_span<Q>() % WIDTH == 0, "slots have room for two bytes before a span");
  constexpr int pieces = (ggml_span<Q>() + (ggml_span<Q>() % WIDTH == 0 ? 0 : 2) + WIDTH - 1) / WIDTH;
  constexpr int rows = GGML_QMM_BN / GGML_QMM_SIMDGROUPS;
  using piece = typename ggml_piece<WIDTH>::type;
  const int before = int(start % WIDTH);
  const device uchar* from = w + (start - ulong(before));
  for (int i = int(lane); i < rows * pieces; i += SIMD_LANES) {
    const int row = int(simdgroup) * rows + i / pieces, at = i % pieces * WIDTH;
    if (row < n_rows && at < before + n_bytes) {
      *(threadgroup piece*)(spans + row * ggml_span_slot<Q>() + at) =
          *(const device piece*)(from + ulong(row) * row_bytes + ulong(at));
    }
  }
}

/// Octet `j` of each share of rows of x, as floats [row][weight of the octet][share]; zeros where there are none.
template <typename Q, typename T>
MLXQ_FUNC void ggml_load_octets(const device T* x, int K, int n_rows, int n_shares, int j, threadgroup float* tile,
                                uint thread_index) {
  constexpr int threads = GGML_QMM_SIMDGROUPS * SIMD_LANES;
  const int quad = int(thread_index) % 2, share = int(thread_index) / 2 % 8;
  const int column = share / Q::shares * Q::block + 8 * Q::octet(share % Q::shares, j) + 4 * quad;
  MLXQ_UNROLL
  for (int i = 0; i < GGML_QMM_BM * 16 / threads; i++) {
    const int row = i * (threads / 16) + int(thread_index) / 16;
    float4 v = float4(0.0f);
    if (row < n_rows && share < n_shares) {
      v = load4(x + ulong(row) * ulong(K) + ulong(column));
    }
    threadgroup float* out = tile + row * GGML_QMM_STRIDE + 32 * quad + share;
    out[0] = v.x;
    out[8] = v.y;
    out[16] = v.z;
    out[24] = v.w;
  }
}

/// Add the products of all octets `j`: `weights` are the lane's, of two rows of w in each column of fragments.
///
/// They are summed by themselves first: the error of one sum over all of K would grow with its root.
MLXQ_FUNC void ggml_multiply(const threadgroup float* from, thread const float (*weights)[2][8],
                             thread simdgroup_float8x8 (*acc)[2]) {
  constexpr int m_fragments = GGML_QMM_BM / 8;
  simdgroup_float8x8 sums[m_fragments][2];
  MLXQ_UNROLL
  for (int i = 0; i < 8; i++) {
    simdgroup_float8x8 b[2];
    MLXQ_UNROLL
    for (int n = 0; n < 2; n++) {
      b[n].thread_elements()[0] = weights[n][0][i];
      b[n].thread_elements()[1] = weights[n][1][i];
    }
    MLXQ_UNROLL
    for (int m = 0; m < m_fragments; m++) {
      const float2 v = *(const threadgroup float2*)(from + m * 8 * GGML_QMM_STRIDE + 8 * i);
      simdgroup_float8x8 a;
      a.thread_elements()[0] = v.x;
      a.thread_elements()[1] = v.y;
      MLXQ_UNROLL
      for (int n = 0; n < 2; n++) {
        if (i == 0) {
          simdgroup_multiply(sums[m][n], a, b[n]);
        } else {
          simdgroup_multiply_accumulate(sums[m][n], a, b[n], sums[m][n]);
        }
      }
    }
  }
  MLXQ_UNROLL
  for (int m = 0; m < m_fragments; m++) {
    MLXQ_UNROLL
    for (int n = 0; n < 2; n++) {
      acc[m][n].thread_elements()[0] += sums[m][n].thread_elements()[0];
      acc[m][n].thread_elements()[1] += sums[m][n].thread_elements()[1];
    }
  }
}

/// Up to 32 rows of x times up to 64 rows of w, to rows of y that are N apart.
///
/// x, w, y: at the first row each. `room`: `ggml_qmm_room` pieces of 16 bytes.
template <typename T, typename Q, int WIDTH>
MLXQ_FUNC void ggml_qmm_tile(const device T* x, const device uchar* w, device T* y, int x_rows, int w_rows, int N,
                             int K, threadgroup uint4* room, uint simdgroup, uint lane) {
  constexpr int m_fragments = GGML_QMM_BM / 8;
  threadgroup float* tile = (threadgroup float*)room;
  threadgroup uchar* spans = (threadgroup uchar*)(tile + GGML_QMM_BM * GGML_QMM_STRIDE);
  const ulong row_bytes = ulong(K / Q::block) * Q::bytes;
  const int slot = fragment_row(lane), column = fragment_column(lane);
  const int first = int(simdgroup) * 16 + column;  // the lane's outputs: this and the next, and both + 8
  simdgroup_float8x8 acc[m_fragments][2];
  MLXQ_UNROLL
  for (int m = 0; m < m_fragments; m++) {
    acc[m][0] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    acc[m][1] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
  for (int start = 0; start < K; start += GGML_QMM_SPAN) {
    const int n_shares = min(GGML_QMM_SPAN, K - start) / 32;
    const ulong at = ulong(start / Q::block) * Q::bytes;
    const threadgroup uchar* blocks =
        spans + first * ggml_span_slot<Q>() + (int(at % WIDTH) + slot / Q::shares * Q::bytes);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    ggml_stage_span<Q, WIDTH>(w, row_bytes, at, w_rows, n_shares / Q::shares * Q::bytes, spans, simdgroup, lane);
    float scale[2][2][Q::groups] = {}, minimum[2][2][Q::groups] = {};
    MLXQ_UNROLL
    for (int j = 0; j < 4; j++) {
      if (j > 0) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
      }
      ggml_load_octets<Q>(x + start, K, x_rows, n_shares, j, tile, simdgroup * SIMD_LANES + lane);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      float weights[2][2][8] = {};
      MLXQ_UNROLL
      for (int n = 0; n < 2; n++) {
        MLXQ_UNROLL
        for (int e = 0; e < 2; e++) {
          if (slot < n_shares && first + 8 * n + e < w_rows) {
            const threadgroup uchar* block = blocks + (8 * n + e) * ggml_span_slot<Q>();
            if (j == 0) {
              ggml_scales<Q>(block, slot % Q::shares, scale[n][e], minimum[n][e]);
            }
            ggml_decode<Q>(block, slot % Q::shares, j, scale[n][e], minimum[n][e], weights[n][e]);
          }
        }
      }
      ggml_multiply(tile + slot * GGML_QMM_STRIDE + column, weights, acc);
    }
  }
  MLXQ_UNROLL
  for (int m = 0; m < m_fragments; m++) {
    MLXQ_UNROLL
    for (int n = 0; n < 2; n++) {
      const int row = 8 * m + slot, out = first + 8 * n;
      device T* to = y + ulong(row) * ulong(N) + ulong(out);
      if (row < x_rows && out < w_rows) {
        to[0] = T(acc[m][n].thread_elements()[0]);
      }
      if (row < x_rows && out + 1 < w_rows) {
        to[1] = T(acc[m][n].thread_elements()[1]);
      }
    }
  }
}

/// y[M, N] = x[M, K] @ w[N, K].T; a grid of threadgroups, x for 64 outputs and y for 32 rows of x.
template <typename T, typename Q, int WIDTH>
MLXQ_FUNC void ggml_qmm(const device T* x, const device uchar* w, device T* y, int M, int N, int K,
                        threadgroup uint4* room, uint3 group, uint simdgroup, uint lane) {
  const int m = int(group.y) * GGML_QMM_BM, n = int(group.x) * GGML_QMM_BN;
  const ulong row_bytes = ulong(K / Q::block) * Q::bytes;
  ggml_qmm_tile<T, Q, WIDTH>(x + ulong(m) * ulong(K), w + ulong(n) * row_bytes, y + ulong(m) * ulong(N) + ulong(n),
                             min(GGML_QMM_BM, M - m), min(GGML_QMM_BN, N - n), N, K, room, simdgroup, lane);
}

/// y[M, N]: row m of x[M, K] times expert `experts[m]` of w[E, N, K]; rows of one expert follow one another.
///
/// Grid as in `ggml_qmm`. Where the rows of a threadgroup have several experts, they are taken one after another. A row
/// whose expert is not there becomes NaN.
template <typename T, typename Q, int WIDTH, typename Index>
MLXQ_FUNC void ggml_gather_qmm(const device T* x, const device uchar* w, Index experts, device T* y, int M, int E,
                               int N, int K, threadgroup uint4* room, uint3 group, uint simdgroup, uint lane) {
  const int n = int(group.x) * GGML_QMM_BN, end = min(M, int(group.y + 1) * GGML_QMM_BM);
  const int w_rows = min(GGML_QMM_BN, N - n);
  const ulong row_bytes = ulong(K / Q::block) * Q::bytes;
  int next = int(group.y) * GGML_QMM_BM;
  while (next < end) {
    const int m = next;
    const uint expert = experts[m];
    for (next++; next < end && experts[next] == expert; next++) {
    }
    device T* out = y + ulong(m) * ulong(N) + ulong(n);
    if (expert < uint(E)) {
      ggml_qmm_tile<T, Q, WIDTH>(x + ulong(m) * ulong(K), w + (ulong(expert) * ulong(N) + ulong(n)) * row_bytes, out,
                                 next - m, w_rows, N, K, room, simdgroup, lane);
    } else {
      const int step = GGML_QMM_SIMDGROUPS * SIMD_LANES;
      for (int i = int(simdgroup * SIMD_LANES + lane); i < (next - m) * w_rows; i += step) {
        out[ulong(i / w_rows) * ulong(N) + ulong(i % w_rows)] = T(NAN);
      }
    }
  }
}
