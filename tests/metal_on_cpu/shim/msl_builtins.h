// Apple's internal builtins that mlx's bf16_math.h names, and the names that Metal has globally.
#pragma once
#pragma clang system_header
#include "msl_matrix.h"
#include "msl_atomic.h"

using metal::as_type;  // a global function in Metal
// ---- Apple-internal builtins that MLX's bf16_math.h names ---------------------------------
#define __MSL_B1(n) \
  __MSL_INL float __metal_##n(float x, bool) { return metal::n(x); }
#define __MSL_B2(n) \
  __MSL_INL float __metal_##n(float x, float y, bool) { return metal::n(x, y); }
__MSL_B1(fabs)
__MSL_B1(acos) __MSL_B1(acosh) __MSL_B1(asin) __MSL_B1(asinh) __MSL_B1(atan) __MSL_B1(atanh) __MSL_B1(ceil)
    __MSL_B1(cos) __MSL_B1(cosh) __MSL_B1(cospi) __MSL_B1(exp) __MSL_B1(exp10) __MSL_B1(exp2) __MSL_B1(floor)
        __MSL_B1(fract) __MSL_B1(log) __MSL_B1(log10) __MSL_B1(log2) __MSL_B1(rint) __MSL_B1(round) __MSL_B1(rsqrt)
            __MSL_B1(sin) __MSL_B1(sinh) __MSL_B1(sinpi) __MSL_B1(sqrt) __MSL_B1(tan) __MSL_B1(tanh) __MSL_B1(tanpi)
                __MSL_B1(trunc) __MSL_B2(atan2) __MSL_B2(divide) __MSL_B2(fmax) __MSL_B2(fmin) __MSL_B2(fmod)
                    __MSL_B2(pow) __MSL_B2(powr) __MSL_INL float __metal_fma(float a, float b, float c) {
  return metal::fma(a, b, c);
}
__MSL_INL float __metal_nextafter(float a, float b) { return metal::nextafter(a, b); }
__MSL_INL float __metal_ldexp(float a, int k, bool) { return metal::ldexp(a, k); }
__MSL_INL float __metal_frexp(float a, __private int* e) { return metal::frexp(a, *e); }
__MSL_INL float __metal_fmax3(float a, float b, float c, bool) { return metal::max3(a, b, c); }
__MSL_INL float __metal_fmin3(float a, float b, float c, bool) { return metal::min3(a, b, c); }
__MSL_INL float __metal_fmedian3(float a, float b, float c, bool) {
  return metal::max(metal::min(a, b), metal::min(metal::max(a, b), c));
}
__MSL_INL ushort __metal_get_simdgroup_size(ushort) { return 32; }
__MSL_INL ushort __metal_get_thread_index_in_simdgroup(ushort) { return (ushort)__msl_lane(); }
#define __MSL_BS(n) \
  template <class T> \
  __MSL_INL T __metal_simd_##n(T x) { \
    return metal::simd_##n(x); \
  }
__MSL_BS(sum)
__MSL_BS(max) __MSL_BS(min) __MSL_BS(product) __MSL_BS(prefix_exclusive_product) __MSL_BS(prefix_exclusive_sum)
    __MSL_BS(prefix_inclusive_product) __MSL_BS(prefix_inclusive_sum) __MSL_INL float __metal_simd_xor(float x) {
  return as_type<float>(metal::simd_xor(as_type<uint>(x)));
}
#undef __MSL_BS
#define __MSL_BS(n) \
  template <class T> \
  __MSL_INL T __metal_simd_##n(T x, ushort l) { \
    return metal::simd_##n(x, l); \
  }
__MSL_BS(broadcast)
__MSL_BS(shuffle) __MSL_BS(shuffle_down) __MSL_BS(shuffle_up) __MSL_BS(shuffle_xor) __MSL_BS(shuffle_rotate_down)
    __MSL_BS(shuffle_rotate_up) template <class T>
    __MSL_INL T __metal_simd_shuffle_and_fill_down(T x, T f, ushort d, ushort m) {
  return metal::simd_shuffle_and_fill_down(x, f, d, m);
}
template <class T>
__MSL_INL T __metal_simd_shuffle_and_fill_up(T x, T f, ushort d, ushort m) {
  return metal::simd_shuffle_and_fill_up(x, f, d, m);
}
// vector type names are global in MSL (using namespace metal is not needed for them)
#define __MSL_GV(T) \
  using metal::T##2; \
  using metal::T##3; \
  using metal::T##4;
__MSL_GV(char)
__MSL_GV(uchar) __MSL_GV(short) __MSL_GV(ushort) __MSL_GV(int) __MSL_GV(uint) __MSL_GV(long) __MSL_GV(ulong)
    __MSL_GV(float) __MSL_GV(bfloat) __MSL_GV(bool) using metal::half2;
using metal::float2x2;
using metal::float2x4;
using metal::float3x3;
using metal::float4x2;
using metal::float4x4;
using metal::half2x4;
using metal::half3;
using metal::half4;
using metal::half4x4;
