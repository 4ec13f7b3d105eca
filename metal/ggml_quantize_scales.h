// Encoders of Q3_K and Q6_K: a scale for each sub-block of 16, no min.
//
// The search is that of mlxq/quantizers/ggml/scale_search.py, step by step and under its names; only the order of sums
// differs. Blocks that lie on a grid already are left to the caller, as there.
#pragma once
#include "ggml_quantize.h"

/// An integer `sc` of a sub-block, the error that goes with it, and the sums of w v^2 and w v x over its values v.
struct ggml_choice {
  float sc;
  float error;
  float vv;
  float vx;
};

/// The nearest positive float16: never 0, since every scale is divided by.
MLXQ_FUNC float ggml_positive_half(float d) {
  return float(half(clamp(d, 5.9604645e-8f, 65504.0f)));
}

/// Values of the grid for the lane's weights.
template <int low, int high>
MLXQ_FUNC void ggml_nearest(thread const float* x, float inverse, thread float* q) {
  MLXQ_UNROLL
  for (int i = 0; i < 8; i++) {
    q[i] = clamp(rint(x[i] * inverse), float(low), float(high));
  }
}

template <int low, int high>
MLXQ_FUNC ggml_choice ggml_tried(thread const float* x, thread const float* w, float d, float sc) {
  const float s = d * sc;
  float q[8], vv = 0.0f, vx = 0.0f;
  ggml_nearest<low, high>(x, 1.0f / s, q);
  MLXQ_UNROLL
  for (int i = 0; i < 8; i++) {
    const float wq = w[i] * q[i];
    vv += wq * q[i];
    vx += wq * x[i];
  }
  vv = sum_over<2>(vv);
  vx = sum_over<2>(vx);
  return {sc, s * (s * vv - 2.0f * vx), vv, vx};
}

/// The choice of least error, `old` of equals.
MLXQ_FUNC ggml_choice ggml_least(ggml_choice old, ggml_choice tried) {
  if (tried.error < old.error) {
    return tried;
  }
  return old;
}

/// The `d` of least error for given values and `sc`; as it was where all values are zero.
MLXQ_FUNC float ggml_fit_d(ggml_choice best, float d) {
  // Both lanes of a sub-block hold its sums: these are twice the block's.
  const float vv = simd_sum(best.sc * best.sc * best.vv), vx = simd_sum(best.sc * best.vx);
  return ggml_positive_half(vv > 2.0f * GGML_TINY ? vx / vv : d);
}

/// Write the scales of a block of Q3_K, six bits each counted from -32.
MLXQ_FUNC void ggml_write_scales_3(device uchar* out, uint sc, uint lane) {
  const uint sc4 = simd_shuffle_xor(sc, ushort(8)), sc8 = simd_shuffle_xor(sc, ushort(16));
  const uint sc12 = simd_shuffle_xor(sc4, ushort(16));
  if (lane < 8 && lane % 2 == 0) {
    out[lane / 2] = uchar((sc & 15u) | (sc8 & 15u) << 4);
    out[4 + lane / 2] = uchar((sc4 & 15u) | (sc12 & 15u) << 4);
    out[8 + lane / 2] = uchar(sc >> 4 | sc4 >> 4 << 2 | sc8 >> 4 << 4 | sc12 >> 4 << 6);
  }
}

/// Encode block `at` of `w` (weights, row after row) in `bits` bits: Q3_K, Q6_K. One SIMD-group a block.
///
/// `search` has the part of the largest ideal scale that `d` is, then the steps, then the factors of the other sign of
/// `BlockSearch`; `importance` one weight a column, or one in all. K: columns of a row.
template <int bits, int n_steps, int n_opposite, int rounds, bool weighted, typename P, typename I>
MLXQ_FUNC void ggml_quantize_scales(const device float* w, I importance, P search, device uchar* out, int K, uint at,
                                    uint lane) {
  constexpr int high = (1 << (bits - 1)) - 1, low = -high - 1, bytes = bits == 3 ? Q3_K::bytes : Q6_K::bytes;
  constexpr float top = bits == 3 ? 31.0f : 127.0f;
  float x[8], v[8], q[8];
  ggml_load<weighted>(w, importance, K, at, lane, x, v);
  float most = x[0], least = x[0];
  MLXQ_UNROLL
  for (int i = 1; i < 8; i++) {
    most = max(most, x[i]);
    least = min(least, x[i]);
  }
  most = max(most, simd_shuffle_xor(most, ushort(1)));
  least = min(least, simd_shuffle_xor(least, ushort(1)));
  const float extreme = most > -least ? most : least;
  const float ideal = abs(extreme) * (1.0f / float(-low));
  const float largest = simd_max(ideal);
  float sign = extreme > 0.0f ? -1.0f : 1.0f;
  float d = ggml_positive_half(largest * search[0]);
  const float base = clamp(rint(ideal / d), 1.0f, top);
  ggml_choice best = {0.0f, INFINITY, 0.0f, 0.0f};
  for (int i = 0; i < n_steps + n_opposite; i++) {
    const float number = search[1 + i];
    const float sc = i < n_steps ? clamp(base + number, 1.0f, top) : -clamp(rint(base * number), 1.0f, top);
    best = ggml_least(best, ggml_tried<low, high>(x, v, d, sc * sign));
  }
  for (int round = 0; round < rounds; round++) {
    d = ggml_fit_d(best, d);
    sign = best.sc < 0.0f ? -1.0f : 1.0f;
    const float sc = sign * best.sc;
    best = ggml_tried<low, high>(x, v, d, best.sc);
    best = ggml_least(best, ggml_tried<low, high>(x, v, d, sign * max(sc - 1.0f, 1.0f)));
    best = ggml_least(best, ggml_tried<low, high>(x, v, d, sign * min(sc + 1.0f, top)));
  }
  d = ggml_fit_d(best, d);
  ggml_nearest<low, high>(x, 1.0f / (d * best.sc), q);
  const uint2 codes = ggml_bytes(q, float(low));
  device uchar* block = out + ulong(at) * bytes;
  if constexpr (bits == 3) {
    ggml_write_ones<2>(block, ggml_masked(uint2(codes.x >> 2, codes.y >> 2), 1u), lane);
    ggml_write_quarters<2>(block + 32, ggml_masked(codes, 3u), lane);
    ggml_write_scales_3(block + 96, uint(best.sc + 32.0f), lane);
  } else {
    ggml_write_nibbles<2, 64>(block, ggml_masked(codes, 15u), lane);
    ggml_write_quarters<2>(block + 128, ggml_masked(uint2(codes.x >> 4, codes.y >> 4), 3u), lane);
    if (lane % 2 == 0) {
      block[192 + lane / 2] = uchar(int(best.sc) & 255);
    }
  }
  if (lane == 0) {
    // Weights closer to 0 than to the smallest scale that there is.
    *(device half*)(block + bytes - 2) = half(largest * float(-low) > 0.5f * 5.9604645e-8f ? d : 0.0f);
  }
}
