// Encoders of Q2_K, Q4_K and Q5_K: a scale and a min for each sub-block.
//
// The search is that of mlxq/quantizers/ggml/line_search.py, step by step and under its names; only the order of sums
// differs.
#pragma once
#include "ggml_quantize.h"

/// A sub-block's sums whatever the codes (`_Sums`); the weights are counted from `low`.
struct ggml_sums {
  float low;
  float total;
  float x;
};

/// Sums of w q, w q^2 and w q x.
struct ggml_moments {
  float q;
  float qq;
  float qx;
};

/// A line s q + b.
struct ggml_line {
  float s;
  float b;
};

MLXQ_FUNC float ggml_inverse(float s) {
  return s > 0.0f ? 1.0f / max(s, GGML_TINY) : 0.0f;
}

/// Codes of the lane's weights, `x * inverse + offset` rounded, between 0 and `top`; and the sub-block's moments.
template <int lanes, int top>
MLXQ_FUNC ggml_moments ggml_round(thread const float* x, thread const float* w, float inverse, float offset,
                                  thread float* q) {
  ggml_moments m = {0.0f, 0.0f, 0.0f};
  MLXQ_UNROLL
  for (int i = 0; i < 8; i++) {
    q[i] = clamp(rint(x[i] * inverse + offset), 0.0f, float(top));
    const float wq = w[i] * q[i];
    m.q += wq;
    m.qq += wq * q[i];
    m.qx += wq * x[i];
  }
  m.q = sum_over<lanes>(m.q);
  m.qq = sum_over<lanes>(m.qq);
  m.qx = sum_over<lanes>(m.qx);
  return m;
}

MLXQ_FUNC ggml_line ggml_optimum(ggml_sums sums, ggml_moments m) {
  const float total_qq = sums.total * m.qq;
  const float s = (sums.total * m.qx - m.q * sums.x) / max(total_qq - m.q * m.q, 1e-6f * total_qq + GGML_TINY);
  return {s, (sums.x - s * m.q) / sums.total};
}

/// The best line whose offset is not above 0 and whose scale is not below it.
MLXQ_FUNC ggml_line ggml_best_line(ggml_sums sums, ggml_moments m) {
  const float b = min(ggml_optimum(sums, m).b, -sums.low);
  return {max((m.qx - b * m.q) / max(m.qq, GGML_TINY), 0.0f), b};
}

MLXQ_FUNC float ggml_error(ggml_sums sums, ggml_moments m, ggml_line line) {
  return line.s * (line.s * m.qq + 2.0f * (line.b * m.q - m.qx)) + line.b * (line.b * sums.total - 2.0f * sums.x);
}

/// `ggml_error` of a line that is `ds`, `db` from the optimum, less the optimum's.
MLXQ_FUNC float ggml_excess(ggml_sums sums, ggml_moments m, float ds, float db) {
  return ds * (ds * m.qq + 2.0f * db * m.q) + db * db * sums.total;
}

/// A float16 step near `full`, not rounded to 0.
MLXQ_FUNC float ggml_step(float full, float factor) {
  return full > 0.0f ? max(float(half(full * factor)), 5.9604645e-8f) : 0.0f;
}

/// The integer min that goes best with scale `s`.
MLXQ_FUNC float ggml_min_for(ggml_sums sums, ggml_moments m, float s, float inverse_dmin, int largest) {
  const float least = -(sums.low + (sums.x - s * m.q) / sums.total);
  return clamp(rint(least * inverse_dmin), 0.0f, float(largest));
}

/// What a super-block stores, in each lane of a sub-block its own `sc` and `m`; and whether float16 steps reach it.
struct ggml_parts {
  float d;
  float dmin;
  float sc;
  float m;
  bool fits;
};

/// Step 1: the line of each sub-block alone, and its moments.
template <int lanes, int top, int n_levels, int n_shifts, typename P>
MLXQ_FUNC ggml_moments ggml_fit_group(thread const float* x, thread const float* w, ggml_sums sums, float high,
                                      P search, thread ggml_line& line, thread float* q) {
  const float inverse = ggml_inverse(high);
  float least = INFINITY;
  for (int i = 0; i < n_levels * n_shifts; i++) {
    const ggml_moments m =
        ggml_round<lanes, top>(x, w, inverse * search[i / n_shifts], search[n_levels + i % n_shifts], q);
    const ggml_line tried = ggml_best_line(sums, m);
    const float error = ggml_error(sums, m, tried);
    if (error <= least) {
      least = error;
      line = tried;
    }
  }
  const float refined = ggml_inverse(line.s);
  const ggml_moments m = ggml_round<lanes, top>(x, w, refined, -line.b * refined, q);
  line = ggml_best_line(sums, m);
  return m;
}

/// Step 2: steps and integers of the block for these lines.
template <int largest, int n_factors, typename P>
MLXQ_FUNC ggml_parts ggml_fit_block(ggml_sums sums, ggml_moments m, ggml_line line, P factors) {
  const ggml_line best = ggml_optimum(sums, m);
  ggml_parts out = {0.0f, 0.0f, 0.0f, 0.0f, false};
  const float full_d = simd_max(line.s) / float(largest);
  float least = INFINITY, b = 0.0f;
  for (int i = 0; i < n_factors; i++) {
    const float d = ggml_step(full_d, factors[i]);
    const float sc = min(rint(line.s * ggml_inverse(d)), float(largest));
    const float offset = min((sums.x - d * sc * m.q) / sums.total, -sums.low);
    const float excess = simd_sum(ggml_excess(sums, m, d * sc - best.s, offset - best.b));
    if (excess <= least) {
      least = excess;
      out.d = d;
      out.sc = sc;
      b = offset;
    }
  }
  const float full_dmin = simd_max(-(sums.low + b)) / float(largest);
  least = INFINITY;
  for (int i = 0; i < n_factors; i++) {
    const float dmin = ggml_step(full_dmin, factors[i]);
    const float integer = ggml_min_for(sums, m, out.d * out.sc, ggml_inverse(dmin), largest);
    const float db = -sums.low - dmin * integer - best.b;
    const float excess = simd_sum(ggml_excess(sums, m, out.d * out.sc - best.s, db));
    if (excess <= least) {
      least = excess;
      out.dmin = dmin;
      out.m = integer;
    }
  }
  // An infinite step has no error that compares, and is never taken.
  out.fits = (out.d > 0.0f || full_d <= 0.0f) && (out.dmin > 0.0f || full_dmin <= 0.0f);
  return out;
}

/// Step 3, for the codes of `m`: `d` and `dmin` by least squares over the block, then `sc` among its neighbours.
template <int largest>
MLXQ_FUNC ggml_parts ggml_refine_block(ggml_sums sums, ggml_moments m, ggml_parts in) {
  const float s = in.d * in.sc, b = -sums.low - in.dmin * in.m;
  const float a = simd_sum(in.sc * in.sc * m.qq), c = simd_sum(in.m * in.m * sums.total);
  const float ac = -simd_sum(in.sc * in.m * m.q);
  const float u = simd_sum(in.sc * (m.qx - b * m.q - s * m.qq));
  const float v = -simd_sum(in.m * (sums.x - b * sums.total - s * m.q));
  const float determinant = a * c - ac * ac;
  const bool regular = determinant > 1e-6f * a * c;
  ggml_parts out = in;
  out.d = float(half(max(in.d + (regular ? (c * u - ac * v) / determinant : u / max(a, GGML_TINY)), 0.0f)));
  out.dmin = float(half(max(in.dmin + (regular ? (a * v - ac * u) / determinant : 0.0f), 0.0f)));
  const ggml_line best = ggml_optimum(sums, m);
  const float inverse_dmin = ggml_inverse(out.dmin);
  float least = INFINITY;
  for (int i = -1; i <= 1; i++) {
    const float sc = clamp(in.sc + float(i), 0.0f, float(largest));
    const float integer = ggml_min_for(sums, m, out.d * sc, inverse_dmin, largest);
    const float excess =
        ggml_excess(sums, m, out.d * sc - best.s, -sums.low - out.dmin * integer - best.b);
    if (excess <= least) {
      least = excess;
      out.sc = sc;
      out.m = integer;
    }
  }
  return out;
}

/// Write the scales and mins of a block of Q4_K or Q5_K, six bits each.
MLXQ_FUNC void ggml_write_sixes(device uchar* out, uint sc, uint m, uint lane) {
  const uint sc4 = simd_shuffle_xor(sc, ushort(16)), m4 = simd_shuffle_xor(m, ushort(16));
  if (lane < 16 && lane % 4 == 0) {
    out[lane / 4] = uchar(sc | sc4 >> 4 << 6);
    out[4 + lane / 4] = uchar(m | m4 >> 4 << 6);
    out[8 + lane / 4] = uchar((sc4 & 15u) | (m4 & 15u) << 4);
  }
}

/// Encode block `at` of `w` (weights, row after row) in `bits` bits: Q2_K, Q4_K, Q5_K. One SIMD-group a block.
///
/// `search` has the levels, then the shifts, then the factors of `LineSearch`; `importance` one weight a column, or one
/// in all. K: columns of a row.
template <int bits, int n_levels, int n_shifts, int n_factors, bool weighted, typename P, typename I>
MLXQ_FUNC void ggml_quantize_lines(const device float* w, I importance, P search, device uchar* out, int K, uint at,
                             uint lane) {
  constexpr int lanes = bits == 2 ? 2 : 4, top = (1 << bits) - 1, largest = bits == 2 ? 15 : 63;
  constexpr int bytes = bits == 2 ? Q2_K::bytes : bits == 4 ? Q4_K::bytes : Q5_K::bytes;
  float x[8], v[8], q[8];
  ggml_load<weighted>(w, importance, K, at, lane, x, v);
  float low = 0.0f, high = x[0];
  MLXQ_UNROLL
  for (int i = 0; i < 8; i++) {
    low = min(low, x[i]);
    high = max(high, x[i]);
  }
  MLXQ_UNROLL
  for (int step = 1; step < lanes; step *= 2) {
    low = min(low, simd_shuffle_xor(low, ushort(step)));
    high = max(high, simd_shuffle_xor(high, ushort(step)));
  }
  ggml_sums sums = {low, 0.0f, 0.0f};
  MLXQ_UNROLL
  for (int i = 0; i < 8; i++) {
    x[i] -= low;
    sums.total += v[i];
    sums.x += v[i] * x[i];
  }
  sums.total = sum_over<lanes>(sums.total);
  sums.x = sum_over<lanes>(sums.x);
  ggml_line line = {0.0f, 0.0f};
  ggml_moments m = ggml_fit_group<lanes, top, n_levels, n_shifts>(x, v, sums, high - low, search, line, q);
  ggml_parts parts = ggml_fit_block<largest, n_factors>(sums, m, line, search + (n_levels + n_shifts));
  // Far beyond that, sums overflow before steps do.
  parts.fits = parts.fits && simd_max(high - low) <= 2.0f * 65504.0f * float(largest * top);
  MLXQ_UNROLL
  for (int round = 0; round < 2; round++) {
    const float s = parts.d * parts.sc, inverse = ggml_inverse(s);
    m = ggml_round<lanes, top>(x, v, inverse, -(-sums.low - parts.dmin * parts.m) * inverse, q);
    if (round == 0) {
      parts = ggml_refine_block<largest>(sums, m, parts);
    }
  }
  const uint2 codes = ggml_bytes(q, 0.0f);
  device uchar* block = out + ulong(at) * bytes;
  if constexpr (bits == 2) {
    ggml_write_quarters<4>(block + 16, codes, lane);
    if (lane % 2 == 0) {
      block[lane / 2] = uchar(uint(parts.sc) | uint(parts.m) << 4);
    }
  } else {
    ggml_write_nibbles<4, 32>(block + (bits == 5 ? 48 : 16), ggml_masked(codes, 15u), lane);
    if (bits == 5) {
      ggml_write_ones<4>(block + 16, ggml_masked(uint2(codes.x >> 4, codes.y >> 4), 1u), lane);
    }
    ggml_write_sixes(block + 4, uint(parts.sc), uint(parts.m), lane);
  }
  if (lane == 0) {
    device half* steps = (device half*)(block + (bits == 2 ? 80 : 0));
    steps[0] = half(parts.fits ? parts.d : INFINITY);
    steps[1] = half(parts.dmin);
  }
}
