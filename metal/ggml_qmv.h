// y = x @ w.T for few rows of x, with w in ggml's blocks.
//
// A SIMD-group computes ROWS neighbouring outputs. It takes chunks of its rows, STEPS times 1024 weights of each: first
// all lanes copy the bytes of a chunk to threadgroup memory as they lie, in whole aligned pieces of WIDTH bytes that
// begin at lines of 128 bytes; then each lane decodes shares of 32 weights from there. So every byte of w is
// loaded once, by one lane, in loads that fill their lines, although a block is 18 or 210 bytes long and the lanes of
// a super-block share its scales. Only lanes of one SIMD-group meet: threadgroup memory is cut into a part for each.
#pragma once
#include "ggml_blocks.h"

constant constexpr int GGML_LINE = 128;         // bytes of a cache line
constant constexpr int GGML_STEP = 32 * 32;     // weights of a row that the lanes decode at once
constant constexpr int GGML_QMV_SIMDGROUPS = 2; // of a threadgroup

/// A load of `width` bytes.
template <int width>
struct ggml_piece {};
template <>
struct ggml_piece<2> {
  using type = ushort;
};
template <>
struct ggml_piece<4> {
  using type = uint;
};
template <>
struct ggml_piece<8> {
  using type = uint2;
};
template <>
struct ggml_piece<16> {
  using type = uint4;
};

/// Bytes of threadgroup memory for a chunk: it begins anywhere within a line.
template <typename Q, int STEPS>
constexpr int ggml_slot() {
  return (GGML_STEP / Q::block * STEPS * Q::bytes + GGML_LINE - 1) / 16 * 16 + 16;
}

/// Bytes of threadgroup memory of `ggml_qmv`, as `uint4`.
template <typename Q, int ROWS, int STEPS>
constexpr int ggml_qmv_room() {
  return GGML_QMV_SIMDGROUPS * ROWS * ggml_slot<Q, STEPS>() / 16;
}

/// Copy bytes `start` to `start + count` of w, multiples of WIDTH; byte i of a line of w comes to byte i of a line.
template <int WIDTH>
MLXQ_FUNC void ggml_stage(const device uchar* w, ulong start, int count, threadgroup uchar* slot, uint lane) {
  using piece = typename ggml_piece<WIDTH>::type;
  const int first = int(start % GGML_LINE), end = first + count;
  const device uchar* line = w + (start - ulong(first));
  int at = int(lane) * WIDTH;
  // Lanes before the first byte sit out, so that every further load of the group begins at a line.
  if (at >= first && at < end) {
    *(threadgroup piece*)(slot + at) = *(const device piece*)(line + at);
  }
  for (at += SIMD_LANES * WIDTH; at < end; at += SIMD_LANES * WIDTH) {
    if (WIDTH * SIMD_LANES >= GGML_LINE || at >= first) {
      *(threadgroup piece*)(slot + at) = *(const device piece*)(line + at);
    }
  }
}

/// The bit of its word at which code `i` of octet `j` begins, if it is used where it lies.
template <typename Q>
MLXQ_FUNC int ggml_place(int i, int j) {
  return Q::in_place ? 8 * (i % 4) + Q::bit(j) : 0;
}

/// x for a share, divided by the powers of two by which codes are too large. `sums` are those of the groups, undivided.
template <typename Q, typename P>
MLXQ_FUNC void ggml_load_x(P x, int share, thread float* v, thread float* sums) {
  MLXQ_UNROLL
  for (int g = 0; g < Q::groups; g++) {
    sums[g] = 0.0f;
  }
  MLXQ_UNROLL
  for (int j = 0; j < 4; j++) {
    MLXQ_UNROLL
    for (int h = 0; h < 2; h++) {
      const float4 a = load4(x + 8 * Q::octet(share, j) + 4 * h);
      if (Q::has_min || Q::offset != 0) {
        sums[j * Q::groups / 4] += (a.x + a.y) + (a.z + a.w);
      }
      const float values[4] = {a.x, a.y, a.z, a.w};
      MLXQ_UNROLL
      for (int i = 0; i < 4; i++) {
        v[8 * j + 4 * h + i] = values[i] * (1.0f / float(1u << uint(ggml_place<Q>(i, j))));
      }
    }
  }
}

/// The product of a share with x as `ggml_load_x` gives it: codes are multiplied first, scales their sums.
template <typename Q>
MLXQ_FUNC float ggml_dot(const threadgroup uchar* block, int share, thread const float* v, thread const float* sums) {
  float scale[Q::groups], minimum[Q::groups], dots[Q::groups];
  Q::scales(block, share, scale, minimum);
  MLXQ_UNROLL
  for (int g = 0; g < Q::groups; g++) {
    dots[g] = Q::offset == 0 ? 0.0f : -float(Q::offset) * sums[g];
  }
  MLXQ_UNROLL
  for (int j = 0; j < 4; j++) {
    uint2 q;
    if constexpr (Q::mask != 255u) {
      q = Q::words(block, share, j);
    } else {
      q = Q::codes(block, share, j);
    }
    MLXQ_UNROLL
    for (int i = 0; i < 8; i++) {
      const uint word = i < 4 ? q.x : q.y;
      const float code = Q::in_place ? float(word & Q::mask << uint(ggml_place<Q>(i, j))) : Q::code(word, i % 4);
      dots[j * Q::groups / 4] = fma(code, v[8 * j + i], dots[j * Q::groups / 4]);
    }
  }
  float dot = 0.0f, least = 0.0f;
  MLXQ_UNROLL
  for (int g = 0; g < Q::groups; g++) {
    dot = fma(scale[g], dots[g], dot);
    if (Q::has_min) {
      least = fma(minimum[g], sums[g], least);
    }
  }
  const float2 unit = Q::unit(block);
  return Q::has_min ? fma(unit.x, dot, -unit.y * least) : unit.x * dot;
}

/// The products of a share of ROWS rows with M rows of x: every weight is decoded once.
template <typename Q, int M, int ROWS, typename P>
MLXQ_FUNC void ggml_dots(const threadgroup uchar* const thread* blocks, int at, int share, P x, int K,
                         thread float (*acc)[ROWS]) {
  float scale[ROWS][Q::groups], minimum[ROWS][Q::groups];
  MLXQ_UNROLL
  for (int r = 0; r < ROWS; r++) {
    ggml_scales<Q>(blocks[r] + at, share, scale[r], minimum[r]);
  }
  MLXQ_UNROLL
  for (int j = 0; j < 4; j++) {
    float w[ROWS][8];
    MLXQ_UNROLL
    for (int r = 0; r < ROWS; r++) {
      ggml_decode<Q>(blocks[r] + at, share, j, scale[r], minimum[r], w[r]);
    }
    MLXQ_UNROLL
    for (int m = 0; m < M; m++) {
      const P octet = rows_at(x, ulong(m) * ulong(K)) + 8 * Q::octet(share, j);
      const float4 a = load4(octet), b = load4(octet + 4);
      MLXQ_UNROLL
      for (int r = 0; r < ROWS; r++) {
        float s = fma(a.x, w[r][0], acc[m][r]);
        s = fma(a.y, w[r][1], s);
        s = fma(a.z, w[r][2], s);
        s = fma(a.w, w[r][3], s);
        s = fma(b.x, w[r][4], s);
        s = fma(b.y, w[r][5], s);
        s = fma(b.z, w[r][6], s);
        acc[m][r] = fma(b.w, w[r][7], s);
      }
    }
  }
}

/// y[M, N] = x[M, K] @ w[N, K].T; grid x counts threadgroups of 2 * ROWS outputs.
///
/// x, w, y: one matrix each; x a pointer or `Permuted`. `room`: `ggml_qmv_room` pieces of 16 bytes.
template <typename T, typename Q, int M, int ROWS, int STEPS, int WIDTH, typename P>
MLXQ_FUNC void ggml_qmv(P x, const device uchar* w, device T* y, int K, int N, threadgroup uint4* room,
                        uint group, uint simdgroup, uint lane) {
  constexpr int slot = ggml_slot<Q, STEPS>(), chunk = GGML_STEP / Q::block * STEPS;
  threadgroup uchar* slots = (threadgroup uchar*)room + simdgroup * (ROWS * slot);
  const int row = int(group * GGML_QMV_SIMDGROUPS + simdgroup) * ROWS;
  const int n_rows = min(ROWS, N - row);
  if (n_rows <= 0) {
    return;  // all lanes, and no barrier is of more than this SIMD-group
  }
  const int n_blocks = K / Q::block;
  const ulong row_bytes = ulong(n_blocks) * Q::bytes;
  float acc[M][ROWS];
  MLXQ_UNROLL
  for (int m = 0; m < M; m++) {
    MLXQ_UNROLL
    for (int r = 0; r < ROWS; r++) {
      acc[m][r] = 0.0f;
    }
  }
  for (int start = 0; start < n_blocks; start += chunk) {
    const int count = min(chunk, n_blocks - start);
    const threadgroup uchar* blocks[ROWS];
    MLXQ_UNROLL
    for (int r = 0; r < ROWS; r++) {
      const ulong at = ulong(row + r) * row_bytes + ulong(start) * Q::bytes;
      // Rows beyond the last are computed from the first one's bytes, and not stored.
      blocks[r] = r < n_rows ? slots + (r * slot + int(at % GGML_LINE)) : blocks[0];
      if (r < n_rows) {
        ggml_stage<WIDTH>(w, at, count * Q::bytes, slots + r * slot, lane);
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = int(lane); i < count * Q::shares; i += SIMD_LANES) {
      const int block = i / Q::shares, share = i % Q::shares;
      const P part = x + ulong(start + block) * Q::block;
      if constexpr (M == 1) {
        float v[32], sums[Q::groups];
        ggml_load_x<Q>(part, share, v, sums);
        MLXQ_UNROLL
        for (int r = 0; r < ROWS; r++) {
          acc[0][r] += ggml_dot<Q>(blocks[r] + block * Q::bytes, share, v, sums);
        }
      } else {
        ggml_dots<Q, M, ROWS>(blocks, block * Q::bytes, share, part, K, acc);
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
  MLXQ_UNROLL
  for (int m = 0; m < M; m++) {
    MLXQ_UNROLL
    for (int r = 0; r < ROWS; r++) {
      const float sum = simd_sum(acc[m][r]);
      if (lane == 0 && r < n_rows) {
        y[ulong(m) * ulong(N) + ulong(row + r)] = T(sum);
      }
    }
  }
}

/// y[b] [M, N] = x[rows[b]] [M, K] @ w[experts[b]] [N, K].T; grid z counts b. NaN where there is no such expert.
template <typename T, typename Q, int M, int ROWS, int STEPS, int WIDTH, typename Index>
MLXQ_FUNC void ggml_gather_qmv(const device T* x, const device uchar* w, Index rows, Index experts, device T* y, int E,
                               int K, int N, threadgroup uint4* room, uint3 group, uint simdgroup, uint lane) {
  y += ulong(group.z) * ulong(M) * ulong(N);
  const uint expert = experts[group.z];
  if (expert >= uint(E)) {
    const int n = int(group.x * GGML_QMV_SIMDGROUPS + simdgroup) * ROWS + int(lane);
    for (int m = 0; int(lane) < ROWS && n < N && m < M; m++) {
      y[ulong(m) * ulong(N) + ulong(n)] = T(NAN);
    }
    return;
  }
  ggml_qmv<T, Q, M, ROWS, STEPS, WIDTH>(x + ulong(rows[group.z]) * ulong(M) * ulong(K),
                                        w + ulong(expert) * ulong(N) * (ulong(K / Q::block) * Q::bytes), y, K, N, room,
                                        group.x, simdgroup, lane);
}
