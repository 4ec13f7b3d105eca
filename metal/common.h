// What every kernel here stands on: vector loads, runs of packed words, reductions.
//
// The headers are plain Metal. mlxq/ops/metal_source.py joins the ones a kernel needs, in the order of their
// includes, and mlx compiles the text at run time behind its own prelude (which defines bfloat16_t, float16_t).
// Rules of these files: an address space on every pointer, float accumulators, 64-bit offsets for whole matrices,
// shapes and widths as template constants so that loops unroll. Elsewhere than in Metal, cuda_prelude.h comes first.
#pragma once
#ifdef __METAL_VERSION__
#include <metal_stdlib>

using namespace metal;

#define MLXQ_FUNC inline __attribute__((always_inline))
#define MLXQ_UNROLL _Pragma("clang loop unroll(full)")
#define MLXQ_TABLE constant
#endif

constant constexpr int SIMD_LANES = 32;

/// Four values that start at a multiple of four, widened to float: one load.
template <typename T>
MLXQ_FUNC float4 load4(const device T* p) {
  const vec<T, 4> v = *(const device vec<T, 4>*)p;
  return float4(float(v.x), float(v.y), float(v.z), float(v.w));
}

/// Rows of x whose columns are taken in another order: column k of a product is column `order[k]` of x. An index past
/// column `last` reads that one.
template <typename T>
struct Permuted {
  const device T* x;
  const device int* order;
  uint last;
};

/// Column k on.
template <typename T, typename I>
MLXQ_FUNC Permuted<T> operator+(Permuted<T> p, I k) {
  return {p.x, p.order + k, p.last};
}

template <typename T, typename I>
MLXQ_FUNC void operator+=(thread Permuted<T>& p, I k) {
  p.order += k;
}

/// x, `n` values further in memory: other rows.
template <typename T, typename I>
MLXQ_FUNC const device T* rows_at(const device T* x, I n) {
  return x + n;
}

template <typename T, typename I>
MLXQ_FUNC Permuted<T> rows_at(Permuted<T> p, I n) {
  return {p.x + n, p.order, p.last};
}

template <typename T>
MLXQ_FUNC float4 load4(Permuted<T> p) {
  const int4 at = *(const device int4*)p.order;
  return float4(float(p.x[min(uint(at.x), p.last)]), float(p.x[min(uint(at.y), p.last)]),
                float(p.x[min(uint(at.z), p.last)]), float(p.x[min(uint(at.w), p.last)]));
}

/// `n` values, `n` a multiple of four and `p` aligned to four values, widened to float.
template <int n, typename P>
MLXQ_FUNC void load_floats(P p, thread float* out) {
  MLXQ_UNROLL
  for (int i = 0; i < n; i += 4) {
    const float4 v = load4(p + i);
    out[i] = v.x;
    out[i + 1] = v.y;
    out[i + 2] = v.z;
    out[i + 3] = v.w;
  }
}

/// `n` consecutive words in as few loads as the alignment allows: `p` lies at a multiple of 4 * (n & -n) bytes, of
/// 16 at most.
template <int n>
MLXQ_FUNC void load_words(const device uint* p, thread uint* w) {
  if constexpr (n % 4 == 0) {
    MLXQ_UNROLL
    for (int i = 0; i < n; i += 4) {
      const uint4 v = *(const device uint4*)(p + i);
      w[i] = v.x;
      w[i + 1] = v.y;
      w[i + 2] = v.z;
      w[i + 3] = v.w;
    }
  } else if constexpr (n % 2 == 0) {
    MLXQ_UNROLL
    for (int i = 0; i < n; i += 2) {
      const uint2 v = *(const device uint2*)(p + i);
      w[i] = v.x;
      w[i + 1] = v.y;
    }
  } else if constexpr (n == 3) {
    const uint3 v = uint3(*(const device packed_uint3*)p);
    w[0] = v.x;
    w[1] = v.y;
    w[2] = v.z;
  } else {
    MLXQ_UNROLL
    for (int i = 0; i < n; i++) {
      w[i] = p[i];
    }
  }
}

/// Both halves of a word, which are registers of their own: nothing is shifted to convert them.
MLXQ_FUNC float2 halves(uint word) {
  const ushort2 both = as_type<ushort2>(word);
  return float2(float(both.x), float(both.y));
}

/// The word of two halves.
MLXQ_FUNC uint both_halves(uint low, uint high) {
  return as_type<uint>(ushort2(ushort(low), ushort(high)));
}

/// Sum over each aligned run of `width` lanes (a power of two), in all of its lanes.
template <int width>
MLXQ_FUNC float sum_over(float value) {
  if constexpr (width == SIMD_LANES) {
    return simd_sum(value);
  }
  MLXQ_UNROLL
  for (int step = width / 2; step > 0; step /= 2) {
    value += simd_shuffle_xor(value, ushort(step));
  }
  return value;
}

/// Four floats rounded to `T` and stored at a multiple of four values: one store.
template <typename T>
MLXQ_FUNC void store4(device T* p, float4 v) {
  *(device vec<T, 4>*)p = vec<T, 4>(T(v.x), T(v.y), T(v.z), T(v.w));
}

/// Sums over the lanes of `n` values a lane, `n` a power of two up to 32: lane L returns the sum of value
/// L / (32 / n). Each exchange halves the values that a lane still holds, so this takes fewer than n + 5 shuffles.
template <int n>
MLXQ_FUNC float sum_lanes(thread float* values, uint lane) {
  int held = n;
  MLXQ_UNROLL
  for (int step = SIMD_LANES / 2; step > 0; step /= 2) {
    if (held > 1) {
      held /= 2;
      const bool upper = (lane & uint(step)) != 0;
      MLXQ_UNROLL
      for (int i = 0; i < held; i++) {
        const float kept = upper ? values[i + held] : values[i];
        const float sent = upper ? values[i] : values[i + held];
        values[i] = kept + simd_shuffle_xor(sent, ushort(step));
      }
    } else {
      values[0] += simd_shuffle_xor(values[0], ushort(step));
    }
  }
  return values[0];
}

/// The smallest power of two that is at least `n`.
constexpr int next_power_of_two(int n) {
  int p = 1;
  while (p < n) {
    p *= 2;
  }
  return p;
}

/// Row of an 8 x 8 fragment of which this lane holds two elements, side by side. The places are those that mlx's own
/// kernels rely on (mlx/backend/metal/kernels/steel/gemm/mma.h, BaseMMAFrag).
MLXQ_FUNC int fragment_row(uint lane) {
  return int(((lane >> 2) & 4) | ((lane >> 1) & 3));
}

/// Column of the first of them.
MLXQ_FUNC int fragment_column(uint lane) {
  return int(((lane >> 1) & 4) | ((lane & 1) << 1));
}
