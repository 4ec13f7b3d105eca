// Several products with the same rows of x in one launch, with weights in ggml's blocks: q, k and v; gate and up with
// the function between them. The cores are those of ggml_qmv.h. x is a pointer, or `Permuted`.
#pragma once
#include "activations.h"
#include "ggml_qmv.h"

/// One product of several: blocks `[N, row_bytes]`, and y `[M, N]`.
template <typename T_, typename Q_, int STEPS_, int WIDTH_>
struct ggml_product {
  using T = T_;
  using Q = Q_;
  static constant constexpr const int STEPS = STEPS_;
  static constant constexpr const int WIDTH = WIDTH_;

  const device uchar* w;
  device T_* y;
  int N;
};

/// Pieces of 16 bytes of threadgroup memory that the largest of the products needs.
template <int ROWS, typename First, typename... Rest>
constexpr int ggml_each_room() {
  constexpr int own = ggml_qmv_room<typename First::Q, ROWS, First::STEPS>();
  if constexpr (sizeof...(Rest) > 0) {
    constexpr int others = ggml_each_room<ROWS, Rest...>();
    return own > others ? own : others;
  } else {
    return own;
  }
}

/// `group` counts the threadgroups of the first product, each of 2 * ROWS outputs, then those of the next, and so on.
template <int M, int ROWS, typename P, typename First, typename... Rest>
MLXQ_FUNC void ggml_qmv_each(P x, int K, threadgroup uint4* room, uint group, uint simdgroup, uint lane, First first,
                             Rest... rest) {
  constexpr uint outputs = GGML_QMV_SIMDGROUPS * ROWS;
  const uint groups = (uint(first.N) + outputs - 1) / outputs;
  if (group < groups) {
    ggml_qmv<typename First::T, typename First::Q, M, ROWS, First::STEPS, First::WIDTH>(
        x, first.w, first.y, K, first.N, room, group, simdgroup, lane);
  } else if constexpr (sizeof...(Rest) > 0) {
    ggml_qmv_each<M, ROWS>(x, K, room, group - groups, simdgroup, lane, rest...);
  }
}

/// How often `ggml_qmv_gated` fills its threadgroup memory for a chunk: with the gate's bytes and then with the up
/// projection's, while a lane keeps its part of x in registers; or once with both, where those would be too many.
template <int M, int STEPS>
constexpr int ggml_gated_passes() {
  return M == 1 && STEPS <= 2 ? 2 : 1;
}

/// Bytes of threadgroup memory of `ggml_qmv_gated`, as `uint4`.
template <typename Q, int M, int ROWS, int STEPS>
constexpr int ggml_gated_room() {
  return ggml_qmv_room<Q, 2 * ROWS / ggml_gated_passes<M, STEPS>(), STEPS>();
}

/// Adds to `total` the product of a run of shares with x, which `ggml_load_x` gave.
template <typename Q>
MLXQ_FUNC float ggml_dot_held(const threadgroup uchar* block, int share, thread const float (*v)[32],
                              thread const float* less, float total) {
  float dots[Q::parts][2] = {};
  MLXQ_UNROLL
  for (int s = 0; s < Q::run; s++) {
    ggml_add_codes<Q>(block, share + s, v[s], dots);
  }
  return ggml_scaled<Q>(block, share, dots, less, total);
}

/// y[M, N] = Activation(x[M, K] @ gate[N, K].T) * (x @ up[N, K].T); grid x counts threadgroups of 2 * ROWS outputs.
///
/// x is read once for both. `room`: `ggml_gated_room` pieces of 16 bytes.
template <typename T, typename Q, typename Activation, int M, int ROWS, int STEPS, int WIDTH, typename P>
MLXQ_FUNC void ggml_qmv_gated(P x, const device uchar* gate, const device uchar* up, device T* y, int K, int N,
                              threadgroup uint4* room, uint group, uint simdgroup, uint lane) {
  constexpr int slot = ggml_slot<Q, STEPS>(), chunk = GGML_STEP / Q::block * STEPS;
  constexpr int passes = ggml_gated_passes<M, STEPS>(), staged = 2 * ROWS / passes;
  constexpr int run = M == 1 ? Q::run : 1, runs = Q::shares / run;
  threadgroup uchar* slots = (threadgroup uchar*)room + simdgroup * (staged * slot);
  const int row = int(group * GGML_QMV_SIMDGROUPS + simdgroup) * ROWS;
  const int n_rows = min(ROWS, N - row);
  if (n_rows <= 0) {
    return;  // all lanes, and no barrier is of more than this SIMD-group
  }
  const int n_blocks = K / Q::block;
  const ulong row_bytes = ulong(n_blocks) * Q::bytes;
  float acc[passes][M][staged] = {};
  for (int start = 0; start < n_blocks; start += chunk) {
    const int count = min(chunk, n_blocks - start);
    float v[STEPS][32], less[STEPS / run][Q::groups] = {};
    if constexpr (passes == 2) {
      MLXQ_UNROLL
      for (int s = 0; s < STEPS; s++) {
        const int i = int(lane) + s / run * SIMD_LANES;
        if (i < count * runs) {
          ggml_load_x<Q>(x + ulong(start + i / runs) * Q::block, i % runs * run + s % run, v[s], less[s / run]);
        }
      }
    }
    MLXQ_UNROLL
    for (int pass = 0; pass < passes; pass++) {
      const threadgroup uchar* blocks[staged];
      MLXQ_UNROLL
      for (int r = 0; r < staged; r++) {
        const device uchar* w = pass * staged + r < ROWS ? gate : up;
        const ulong at = ulong(row + r % ROWS) * row_bytes + ulong(start) * Q::bytes;
        // Rows beyond the last are computed from the first one's bytes, and not stored.
        blocks[r] = r % ROWS < n_rows ? slots + (r * slot + int(at % GGML_LINE)) : blocks[0];
        if (r % ROWS < n_rows) {
          ggml_stage<WIDTH>(w, at, count * Q::bytes, slots + r * slot, lane);
        }
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
      MLXQ_UNROLL
      for (int s = 0; s < STEPS; s += run) {
        const int i = int(lane) + s / run * SIMD_LANES;
        if (i < count * runs) {
          const int at = i / runs * Q::bytes, share = i % runs * run;
          const P part = x + ulong(start + i / runs) * Q::block;
          if constexpr (passes == 2) {
            MLXQ_UNROLL
            for (int r = 0; r < staged; r++) {
              acc[pass][0][r] = ggml_dot_held<Q>(blocks[r] + at, share, v + s, less[s / run], acc[pass][0][r]);
            }
          } else if constexpr (M == 1) {
            ggml_dot<Q, staged>(blocks, at, share, part, acc[pass][0]);
          } else {
            ggml_dots<Q, M, staged>(blocks, at, share, part, K, acc[pass]);
          }
        }
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
    }
  }
  MLXQ_UNROLL
  for (int m = 0; m < M; m++) {
    MLXQ_UNROLL
    for (int r = 0; r < ROWS; r++) {
      const float g = simd_sum(acc[0][m][r]), u = simd_sum(acc[passes - 1][m][r + staged - ROWS]);
      if (lane == 0 && r < n_rows) {
        y[ulong(m) * ulong(N) + ulong(row + r)] = T(Activation::of(g) * u);
      }
    }
  }
}
