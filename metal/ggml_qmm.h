// y = x @ w.T for many rows of x, with w in ggml's blocks.
//
// A threadgroup of four SIMD-groups computes BM rows of x by 32 outputs, 8 x 8 at a time with simdgroup_matrix. The
// bytes of 256 weights of each of its 32 rows of w are copied to threadgroup memory, each once; from there they are
// decoded, 32 columns at a time, to a tile of floats beside one of x. Tiles are float for all types of x: decoded
// weights have up to 23 significant bits, and rounding them to half floats would cost as much as rounding the result.
#pragma once
#include "ggml_qmv.h"

constant constexpr int GGML_QMM_THREADS = 128;
constant constexpr int GGML_QMM_BN = 32;       // outputs of a threadgroup
constant constexpr int GGML_QMM_BK = 32;       // columns of a tile
constant constexpr int GGML_QMM_LD = 36;       // floats from row to row of a tile
constant constexpr int GGML_QMM_SPAN = 256;    // weights of a row copied at a time

/// Bytes of the 256 weights of a row, and of their place in threadgroup memory.
template <typename Q>
constexpr int ggml_span() {
  return GGML_QMM_SPAN / Q::block * Q::bytes;
}
template <typename Q>
constexpr int ggml_span_slot() {
  return (ggml_span<Q>() + 15) / 16 * 16;
}

/// Threadgroup memory of `ggml_qmm`, as `uint4`.
template <typename Q, int BM>
constexpr int ggml_qmm_room() {
  return (4 * GGML_QMM_LD * (BM + GGML_QMM_BN) + GGML_QMM_BN * ggml_span_slot<Q>()) / 16;
}

/// Tiles after which the octets of a thread lie at the same bits of other bytes again.
template <typename Q>
constexpr int ggml_tile_period() {
  return Q::block == 32 ? 1 : Q::groups;
}

/// Copy `n_blocks` blocks of each row of w, which begin `start` bytes into it. A SIMD-group has the same rows each time,
/// so that it comes back to the lines of which it left a part.
template <typename Q, int WIDTH>
MLXQ_FUNC void ggml_stage_span(const device uchar* w, ulong row_bytes, ulong start, int n_rows, int n_blocks,
                               threadgroup uchar* spans, uint simdgroup, uint lane) {
  static_assert(ggml_span<Q>() % WIDTH == 0, "spans begin at pieces");
  constexpr int pieces = ggml_span<Q>() / WIDTH, rows = GGML_QMM_BN * SIMD_LANES / GGML_QMM_THREADS;
  using piece = typename ggml_piece<WIDTH>::type;
  for (int i = int(lane); i < rows * pieces; i += SIMD_LANES) {
    const int row = int(simdgroup) * rows + i / pieces, at = i % pieces * WIDTH;
    if (row < n_rows && at < n_blocks * Q::bytes) {
      *(threadgroup piece*)(spans + row * ggml_span_slot<Q>() + at) =
          *(const device piece*)(w + ulong(row) * row_bytes + start + ulong(at));
    }
  }
}

/// Rows of x, 32 columns of each, as floats; zeros for rows that are not there.
template <int BM, typename T>
MLXQ_FUNC void ggml_load_tile(const device T* x, int K, int n_rows, threadgroup float* tile, uint thread_index) {
  MLXQ_UNROLL
  for (int i = 0; i < BM * GGML_QMM_BK / 4; i += GGML_QMM_THREADS) {
    const int row = (i + int(thread_index)) / 8, column = 4 * int(thread_index % 8);
    const float4 v = row < n_rows ? load4(x + ulong(row) * ulong(K) + ulong(column)) : float4(0.0f);
    *(threadgroup float4*)(tile + row * GGML_QMM_LD + column) = v;
  }
}

/// Decode one octet of a row of w: octet number `octet` from the beginning of the copied blocks.
template <typename Q>
MLXQ_FUNC void ggml_decode_octet(const threadgroup uchar* span, int octet, bool there, threadgroup float* out) {
  float v[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
  if (there) {
    const threadgroup uchar* block = span + octet / (Q::block / 8) * Q::bytes;
    const int within = octet % (Q::block / 8);
    float scale[Q::groups], minimum[Q::groups];
    ggml_scales<Q>(block, Q::share_of(within), scale, minimum);
    ggml_decode<Q>(block, Q::share_of(within), Q::index_of(within), scale, minimum, v);
  }
  *(threadgroup float4*)out = float4(v[0], v[1], v[2], v[3]);
  *(threadgroup float4*)(out + 4) = float4(v[4], v[5], v[6], v[7]);
}

/// Multiply the tiles and add the product to `acc`: each SIMD-group takes half of the rows of x and half of those of w.
///
/// The products of a tile are summed by themselves first: the error of one sum over all of K would grow with its root.
template <int BM>
MLXQ_FUNC void ggml_multiply(const threadgroup float* xs, const threadgroup float* ws, uint simdgroup,
                             thread simdgroup_float8x8 (*acc)[2]) {
  constexpr int LD = GGML_QMM_LD;
  const threadgroup float* a_rows = xs + (simdgroup / 2) * (BM / 2) * LD;
  const threadgroup float* b_rows = ws + (simdgroup % 2) * (GGML_QMM_BN / 2) * LD;
  simdgroup_float8x8 sums[BM / 16][2];
  MLXQ_UNROLL
  for (int k = 0; k < GGML_QMM_BK; k += 8) {
    simdgroup_float8x8 a[BM / 16], b[2];
    MLXQ_UNROLL
    for (int i = 0; i < BM / 16; i++) {
      simdgroup_load(a[i], a_rows + 8 * i * LD + k, LD);
    }
    MLXQ_UNROLL
    for (int j = 0; j < 2; j++) {
      simdgroup_load(b[j], b_rows + 8 * j * LD + k, LD, ulong2(0, 0), true);
    }
    MLXQ_UNROLL
    for (int i = 0; i < BM / 16; i++) {
      MLXQ_UNROLL
      for (int j = 0; j < 2; j++) {
        if (k == 0) {
          simdgroup_multiply(sums[i][j], a[i], b[j]);
        } else {
          simdgroup_multiply_accumulate(sums[i][j], a[i], b[j], sums[i][j]);
        }
      }
    }
  }
  MLXQ_UNROLL
  for (int i = 0; i < BM / 16; i++) {
    MLXQ_UNROLL
    for (int j = 0; j < 2; j++) {
      acc[i][j].thread_elements()[0] += sums[i][j].thread_elements()[0];
      acc[i][j].thread_elements()[1] += sums[i][j].thread_elements()[1];
    }
  }
}

/// Up to BM rows of x times up to 32 rows of w, to rows of y that are N apart.
///
/// x, w, y: at the first row each. `room`: `ggml_qmm_room` pieces of 16 bytes.
template <typename T, typename Q, int BM, int WIDTH>
MLXQ_FUNC void ggml_qmm_tiles(const device T* x, const device uchar* w, device T* y, int x_rows, int w_rows, int N,
                              int K, threadgroup uint4* room, uint thread_index, uint simdgroup) {
  constexpr int period = ggml_tile_period<Q>(), LD = GGML_QMM_LD;
  threadgroup float* xs = (threadgroup float*)room;
  threadgroup float* ws = xs + BM * LD;
  threadgroup uchar* spans = (threadgroup uchar*)(ws + GGML_QMM_BN * LD);
  const ulong row_bytes = ulong(K / Q::block) * Q::bytes;
  const int row = int(thread_index / 4), column = int(thread_index % 4);  // of the octet to decode
  simdgroup_float8x8 acc[BM / 16][2];
  MLXQ_UNROLL
  for (int i = 0; i < BM / 16; i++) {
    acc[i][0] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    acc[i][1] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
  for (int start = 0; start < K; start += GGML_QMM_SPAN) {
    const int n_tiles = min(GGML_QMM_SPAN, K - start) / GGML_QMM_BK;
    ggml_stage_span<Q, WIDTH>(w, row_bytes, ulong(start / Q::block) * Q::bytes, w_rows,
                              n_tiles * GGML_QMM_BK / Q::block, spans, simdgroup, thread_index % SIMD_LANES);
    for (int t = 0; t < n_tiles / period; t++) {
      MLXQ_UNROLL
      for (int u = 0; u < period; u++) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        ggml_load_tile<BM>(x + start + (t * period + u) * GGML_QMM_BK, K, x_rows, xs, thread_index);
        ggml_decode_octet<Q>(spans + row * ggml_span_slot<Q>(), 4 * period * t + 4 * u + column, row < w_rows,
                             ws + row * LD + 8 * column);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        ggml_multiply<BM>(xs, ws, simdgroup, acc);
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  MLXQ_UNROLL
  for (int i = 0; i < BM / 16; i++) {
    MLXQ_UNROLL
    for (int j = 0; j < 2; j++) {
      threadgroup float* out = xs + (int(simdgroup / 2) * (BM / 2) + 8 * i) * LD + int(simdgroup % 2) * 16 + 8 * j;
      simdgroup_store(acc[i][j], out, LD);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = int(thread_index); i < BM * GGML_QMM_BN; i += GGML_QMM_THREADS) {
    const int m = i / GGML_QMM_BN, n = i % GGML_QMM_BN;
    if (m < x_rows && n < w_rows) {
      y[ulong(m) * ulong(N) + ulong(n)] = T(xs[m * LD + n]);
    }
  }
}

/// y[M, N] = x[M, K] @ w[N, K].T; a grid of threadgroups, x for 32 outputs and y for BM rows of x.
template <typename T, typename Q, int BM, int WIDTH>
MLXQ_FUNC void ggml_qmm(const device T* x, const device uchar* w, device T* y, int M, int N, int K,
                        threadgroup uint4* room, uint3 group, uint thread_index, uint simdgroup) {
  const int m = int(group.y) * BM, n = int(group.x) * GGML_QMM_BN;
  const ulong row_bytes = ulong(K / Q::block) * Q::bytes;
  ggml_qmm_tiles<T, Q, BM, WIDTH>(x + ulong(m) * ulong(K), w + ulong(n) * row_bytes,
                                  y + ulong(m) * ulong(N) + ulong(n), min(BM, M - m), min(GGML_QMM_BN, N - n), N, K,
                                  room, thread_index, simdgroup);
}

/// y[M, N]: row m of x[M, K] times expert `experts[m]` of w[E, N, K]; rows of one expert follow one another.
///
/// Grid as in `ggml_qmm`. Where the rows of a threadgroup have several experts, they are taken one after another. A row
/// whose expert is not there becomes NaN.
template <typename T, typename Q, int BM, int WIDTH, typename Index>
MLXQ_FUNC void ggml_gather_qmm(const device T* x, const device uchar* w, Index experts, device T* y, int M, int E,
                               int N, int K, threadgroup uint4* room, uint3 group, uint thread_index, uint simdgroup) {
  const int n = int(group.x) * GGML_QMM_BN, end = min(M, int(group.y + 1) * BM);
  const int w_rows = min(GGML_QMM_BN, N - n);
  const ulong row_bytes = ulong(K / Q::block) * Q::bytes;
  int next = int(group.y) * BM;
  while (next < end) {
    const int m = next;
    const uint expert = experts[m];
    for (next++; next < end && experts[next] == expert; next++) {
    }
    device T* out = y + ulong(m) * ulong(N) + ulong(n);
    if (expert < uint(E)) {
      ggml_qmm_tiles<T, Q, BM, WIDTH>(x + ulong(m) * ulong(K), w + (ulong(expert) * ulong(N) + ulong(n)) * row_bytes,
                                      out, next - m, w_rows, N, K, room, thread_index, simdgroup);
      threadgroup_barrier(mem_flags::mem_threadgroup);
    } else {
      for (int i = int(thread_index); i < (next - m) * w_rows; i += GGML_QMM_THREADS) {
        out[ulong(i / w_rows) * ulong(N) + ulong(i % w_rows)] = T(NAN);
      }
    }
  }
}
