// Quantization to the min/max grid of mx.quantize, and back.
#pragma once
#include "affine.h"

/// Codes that a thread of `affine_dequantize` reads: the fewest that fill words, and at least 8.
template <int bits>
constexpr int affine_dequantize_run() {
  return bits == 2 || bits == 6 ? 16 : bits == 3 || bits == 5 ? 32 : 8;
}

/// Scale * q rounded to the dtype of the scales, then + bias rounded again: what mx.dequantize computes on the CPU.
/// A compiler that may fuse a product with a sum does not fuse a product that is fused already.
template <typename T>
MLXQ_FUNC T affine_reconstruct(uint q, T scale, T bias) {
#pragma METAL fp contract(off)
#pragma clang fp contract(off)
  if constexpr (sizeof(T) == 4) {
    return fma(scale, T(q), 0.0f) + bias;
  } else {
    const T product = scale * T(q);
    return product + bias;
  }
}

/// Thread `index` reconstructs its run of codes of the whole tensor, `out` as flat as `w`.
template <typename T, int group_size, int bits>
MLXQ_FUNC void affine_dequantize(
    const device uint* w, const device T* scales, const device T* biases, device T* out, uint index) {
  constexpr int run = affine_dequantize_run<bits>();
  constexpr int chunk = run < group_size ? run : group_size;
  constexpr int n_words = affine_words<bits, run>();
  uint codes[n_words];
  load_words<n_words>(w + size_t(index) * n_words, codes);
  const size_t first = size_t(index) * run;
  MLXQ_UNROLL
  for (int c = 0; c < run; c += chunk) {
    const T scale = scales[(first + c) / group_size];
    const T bias = biases[(first + c) / group_size];
    MLXQ_UNROLL
    for (int i = c; i < c + chunk; i += 4) {
      vec<T, 4> v;
      MLXQ_UNROLL
      for (int j = 0; j < 4; j++) {
        v[j] = affine_reconstruct<T>(affine_code<bits>(codes, i + j), scale, bias);
      }
      *(device vec<T, 4>*)(out + first + i) = v;
    }
  }
}

/// `bits` bytes, the codes of eight weights, in the widest stores that their address allows.
template <int bits>
MLXQ_FUNC void store_codes(device uchar* out, uint low, uint high) {
  if constexpr (bits == 8) {
    *(device uint2*)out = uint2(low, high);
  } else if constexpr (bits == 4) {
    *(device uint*)out = low;
  } else if constexpr (bits % 2 == 0) {
    MLXQ_UNROLL
    for (int i = 0; i < bits; i += 2) {
      *(device ushort*)(out + i) = ushort(i < 4 ? low >> (8 * i) : high >> (8 * (i - 4)));
    }
  } else {
    MLXQ_UNROLL
    for (int i = 0; i < bits; i++) {
      out[i] = uchar(i < 4 ? low >> (8 * i) : high >> (8 * (i - 4)));
    }
  }
}

/// The grid and the codes of mlx's Metal kernel (mlx/backend/metal/kernels/quantized.h, mlx 0.32.4): the edge of larger
/// magnitude is kept and 0 lies on the grid; the maximum starts at 0; halves round away from zero. Thread `index` holds
/// eight weights, group_size / 8 neighbours a group; all threads of a SIMD-group must call it.
template <typename T, int group_size, int bits>
MLXQ_FUNC void affine_quantize(
    const device T* w, device uint* w_q, device T* scales, device T* biases, uint index, uint n_runs) {
  constexpr int lanes = group_size / 8;
  constexpr float top = float((1 << bits) - 1);
  // The last SIMD-group's spare threads shadow the last run, so that shuffles find every lane.
  const bool spare = index >= n_runs;
  const size_t run = spare ? n_runs - 1 : index;
  float v[8];
  load_floats<8>(w + run * 8, v);
  float low = min(min(min(v[0], v[1]), min(v[2], v[3])), min(min(v[4], v[5]), min(v[6], v[7])));
  float high = max(max(max(v[0], v[1]), max(v[2], v[3])), max(max(v[4], v[5]), max(v[6], v[7])));
  MLXQ_UNROLL
  for (int step = lanes / 2; step > 0; step /= 2) {
    low = min(low, simd_shuffle_xor(low, ushort(step)));
    high = max(high, simd_shuffle_xor(high, ushort(step)));
  }
  high = max(high, 0.0f);
  const bool low_is_edge = abs(low) > abs(high);
  const float edge = low_is_edge ? low : high;
  const float magnitude = max((high - low) / top, 1e-7f);
  float scale = low_is_edge ? magnitude : -magnitude;
  const float steps = round(edge / scale);
  const bool at_zero = steps == 0.0f;
  scale = at_zero ? scale : edge / steps;
  const float bias = at_zero ? 0.0f : edge;
  if (spare) {
    return;
  }
  if (index % lanes == 0) {
    scales[run / lanes] = T(scale);
    biases[run / lanes] = T(bias);
  }
  uint2 codes = uint2(0u);
  MLXQ_UNROLL
  for (int i = 0; i < 8; i++) {
    const uint q = uint(min(round((v[i] - bias) / scale), top));
    const int at = i * bits;
    if (at < 32) {
      codes.x |= q << at;
    }
    if (at >= 32) {
      codes.y |= q << (at - 32);
    } else if (at + bits > 32) {
      codes.y |= q >> (32 - at);
    }
  }
  store_codes<bits>((device uchar*)w_q + run * bits, codes.x, codes.y);
}
