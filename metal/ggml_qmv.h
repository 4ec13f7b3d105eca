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

/// x for a share, as floats; the sums of its groups are taken from `less`.
template <typename Q, typename P>
MLXQ_FUNC void ggml_load_x(P x, int share, thread float* v, thread float* less) {
  MLXQ_UNROLL
  for (int j = 0; j < 4; j++) {
    load_floats<8>(x + 8 * Q::octet(share, j), v + 8 * j);
    if (Q::has_min || Q::offset != 0) {
      MLXQ_UNROLL
      for (int i = 8 * j; i < 8 * j + 8; i += 4) {
        less[j * Q::groups / 4] -= (v[i] + v[i + 1]) + (v[i + 2] + v[i + 3]);
      }
    }
  }
}

/// Adds the products of a share's codes with x to `dots`, one for each part. Codes are cut out of their words by two, one
/// of each half, and stay where they are: those of part p 2^bit too large, those of odd bytes (`dots[p][1]`) another 2^8.
template <typename Q>
MLXQ_FUNC void ggml_add_codes(const threadgroup uchar* block, int share, thread const float* v,
                              thread float (*dots)[2]) {
  // Octets have words in common: compilers see that if nothing lies between.
  uint2 words[4];
  MLXQ_UNROLL
  for (int j = 0; j < 4; j++) {
    words[j] = Q::words(block, share, j);
  }
  MLXQ_UNROLL
  for (int j = 0; j < 4; j++) {
    const int p = j * Q::parts / 4;
    MLXQ_UNROLL
    for (int h = 0; h < 2; h++) {
      const uint word = h == 0 ? words[j].x : words[j].y;
      thread const float* u = v + 8 * j + 4 * h;
      if constexpr (Q::in_place) {
        const uint mask = Q::mask * 0x00010001u << uint(Q::bit(j));
        const float2 even = halves(word & mask), odd = halves(word & mask << 8);
        dots[p][0] = fma(even.y, u[2], fma(even.x, u[0], dots[p][0]));
        dots[p][1] = fma(odd.y, u[3], fma(odd.x, u[1], dots[p][1]));
      } else {
        MLXQ_UNROLL
        for (int i = 0; i < 4; i++) {
          dots[p][i % 2] = fma(Q::code(word, i), u[i], dots[p][i % 2]);
        }
      }
    }
  }
}

/// `total` and the product of weights with x that follows from that of their codes; `less` is of `ggml_load_x`.
template <typename Q>
MLXQ_FUNC float ggml_scaled(const threadgroup uchar* block, int share, thread const float (*dots)[2],
                            thread const float* less, float total) {
  float scale[Q::groups], minimum[Q::groups], dot = 0.0f, least = 0.0f;
  Q::scales(block, share, scale, minimum);
  MLXQ_UNROLL
  for (int g = 0; g < Q::groups; g++) {
    float sum = Q::offset == 0 ? 0.0f : float(Q::offset) * less[g];
    MLXQ_UNROLL
    for (int p = g * Q::parts / Q::groups; p < (g + 1) * Q::parts / Q::groups; p++) {
      const float place = 1.0f / float(1u << uint(Q::in_place ? Q::bit(p * 4 / Q::parts) : 0));
      sum = fma(dots[p][0], place, fma(dots[p][1], Q::in_place ? place / 256.0f : 1.0f, sum));
    }
    dot = fma(scale[g], sum, dot);
    if (Q::has_min) {
      least = fma(minimum[g], less[g], least);
    }
  }
  const float2 unit = Q::unit(block);
  total = fma(unit.x, dot, total);
  return Q::has_min ? fma(unit.y, least, total) : total;
}

/// Adds the products of ROWS rows with one row of x to `sums`: those of a run of shares, `share` the first, of the block
/// at byte `at` of each row. `x` is at the block.
template <typename Q, int ROWS, typename P>
MLXQ_FUNC void ggml_dot(const threadgroup uchar* const thread* blocks, int at, int share, P x, thread float* sums) {
  float dots[ROWS][Q::parts][2] = {}, less[Q::groups] = {};
  MLXQ_UNROLL
  for (int s = 0; s < Q::run; s++) {
    float v[32];
    ggml_load_x<Q>(x, share + s, v, less);
    MLXQ_UNROLL
    for (int r = 0; r < ROWS; r++) {
      ggml_add_codes<Q>(blocks[r] + at, share + s, v, dots[r]);
    }
  }
  MLXQ_UNROLL
  for (int r = 0; r < ROWS; r++) {
    sums[r] = ggml_scaled<Q>(blocks[r] + at, share, dots[r], less, sums[r]);
  }
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
    constexpr int run = M == 1 ? Q::run : 1, runs = Q::shares / run;
    for (int i = int(lane); i < count * runs; i += SIMD_LANES) {
      const int block = int(uint(i) / runs), share = int(uint(i) % runs) * run;
      const P part = x + ulong(start + block) * Q::block;
      if constexpr (M == 1) {
        ggml_dot<Q, ROWS>(blocks, block * Q::bytes, share, part, acc[0]);
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
