// Math, integer and relational functions of metal_stdlib.
#pragma once
#pragma clang system_header
#include "msl_vector.h"

namespace metal {
#define __MSL_M1(n, e) \
  __MSL_INL float n(float x) { return e; } \
  __MSL_INL half n(half y) { \
    float x = (float)y; \
    return (half)(e); \
  } \
  template <int N> \
  __MSL_INL vec<float, N> n(vec<float, N> a) { \
    vec<float, N> r; \
    for (int i = 0; i < N; i++) { \
      float x = a.v[i]; \
      r.v[i] = e; \
    } \
    return r; \
  } \
  template <int N> \
  __MSL_INL vec<half, N> n(vec<half, N> a) { \
    vec<half, N> r; \
    for (int i = 0; i < N; i++) { \
      float x = (float)a.v[i]; \
      r.v[i] = (half)(e); \
    } \
    return r; \
  }
#define __MSL_M2(n, e) \
  __MSL_INL float n(float x, float y) { return e; } \
  __MSL_INL half n(half p, half q) { \
    float x = (float)p, y = (float)q; \
    return (half)(e); \
  } \
  template <class T, int N> \
  __MSL_INL vec<T, N> n(vec<T, N> a, vec<T, N> b) { \
    vec<T, N> r; \
    for (int i = 0; i < N; i++) { \
      float x = (float)a.v[i], y = (float)b.v[i]; \
      r.v[i] = (T)(e); \
    } \
    return r; \
  }
#define __MSL_MATH_ALL \
  __MSL_M1(acos, acosf(x)) \
  __MSL_M1(asin, asinf(x)) __MSL_M1(atan, atanf(x)) __MSL_M1(acosh, acoshf(x)) __MSL_M1(asinh, asinhf(x)) __MSL_M1( \
      atanh, atanhf(x)) __MSL_M1(sin, sinf(x)) __MSL_M1(cos, cosf(x)) __MSL_M1(tan, tanf(x)) __MSL_M1(sinh, sinhf(x)) \
      __MSL_M1(cosh, coshf(x)) __MSL_M1(tanh, tanhf(x)) __MSL_M1(sinpi, sinf(M_PI_F* x)) __MSL_M1( \
          cospi, cosf(M_PI_F* x)) __MSL_M1(tanpi, tanf(M_PI_F* x)) __MSL_M1(exp, expf(x)) __MSL_M1(exp2, exp2f(x)) \
          __MSL_M1(exp10, powf(10.0f, x)) __MSL_M1(log, logf(x)) __MSL_M1(log2, log2f(x)) __MSL_M1(log10, log10f(x)) \
              __MSL_M1(sqrt, __builtin_sqrtf(x)) __MSL_M1(rsqrt, 1.0f / __builtin_sqrtf(x)) \
                  __MSL_M1(ceil, __builtin_ceilf(x)) __MSL_M1(floor, __builtin_floorf(x)) \
                      __MSL_M1(trunc, __builtin_truncf(x)) __MSL_M1(rint, __builtin_rintf(x)) \
                          __MSL_M1(round, __builtin_roundf(x)) __MSL_M1(fabs, __builtin_fabsf(x)) \
                              __MSL_M1(fract, __builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f)) \
                                  __MSL_M1(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f)) \
                                      __MSL_M1(sign, x > 0 ? 1.0f : (x < 0 ? -1.0f : (x == x ? x : 0.0f))) \
                                          __MSL_M2(atan2, atan2f(x, y)) __MSL_M2(pow, powf(x, y)) \
                                              __MSL_M2(powr, powf(x, y)) __MSL_M2(fmod, fmodf(x, y)) \
                                                  __MSL_M2(fmin, __builtin_fminf(x, y)) \
                                                      __MSL_M2(fmax, __builtin_fmaxf(x, y)) \
                                                          __MSL_M2(fdim, x > y ? x - y : 0.0f) __MSL_M2(divide, x / y) \
                                                              __MSL_M2(copysign, __builtin_copysignf(x, y)) \
                                                                  __MSL_M2(nextafter, nextafterf(x, y)) \
                                                                      __MSL_M2(step, y < x ? 0.0f : 1.0f)
__MSL_MATH_ALL
namespace precise {
__MSL_MATH_ALL
}
namespace fast {
__MSL_MATH_ALL
}
__MSL_INL float abs(float x) { return __builtin_fabsf(x); }
__MSL_INL half abs(half x) { return (half)__builtin_fabsf((float)x); }
__MSL_INL float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
__MSL_INL half fma(half a, half b, half c) { return (half)__builtin_fma((double)a, (double)b, (double)c); }
__MSL_INL float mad(float a, float b, float c) { return a * b + c; }
__MSL_INL half mad(half a, half b, half c) { return a * b + c; }
template <class T, int N>
__MSL_INL vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r.v[i] = fma((T)a.v[i], (T)b.v[i], (T)c.v[i]);
  return r;
}
template <class T>
__MSL_INL T mix(T x, T y, T a) {
  return x + (y - x) * a;
}
__MSL_INL float ldexp(float x, int k) { return ldexpf(x, k); }
__MSL_INL half ldexp(half x, int k) { return (half)ldexpf((float)x, k); }
__MSL_INL float frexp(float x, __private int& e) {
  int t;
  float r = frexpf(x, &t);
  e = t;
  return r;
}
__MSL_INL float modf(float x, __private float& i) {
  i = __builtin_truncf(x);
  return x - i;
}
__MSL_INL int ilogb(float x) { return ilogbf(x); }
__MSL_INL bool isnan(float x) { return x != x; }
__MSL_INL bool isnan(half x) { return x != x; }
__MSL_INL bool isnan(bfloat x) { return x != x; }
__MSL_INL bool isinf(float x) { return __builtin_fabsf(x) == __builtin_inff(); }
__MSL_INL bool isinf(half x) { return isinf((float)x); }
__MSL_INL bool isfinite(float x) { return __builtin_fabsf(x) < __builtin_inff(); }
__MSL_INL bool isfinite(half x) { return isfinite((float)x); }
__MSL_INL bool isnormal(float x) { return __builtin_isnormal(x); }
__MSL_INL bool signbit(float x) { return __builtin_signbitf(x); }
__MSL_INL bool signbit(half x) { return __builtin_signbitf((float)x); }
namespace precise {
using metal::abs;
using metal::fma;
using metal::frexp;
using metal::ldexp;
}  // namespace precise
namespace fast {
using metal::abs;
using metal::fma;
using metal::frexp;
using metal::ldexp;
}  // namespace fast
// min/max/clamp/abs/select: one overload a scalar type, as Metal has, so mixed arguments resolve (or fail) alike
#define __MSL_INT(T) \
  __MSL_INL T min(T a, T b) { return b < a ? b : a; } \
  __MSL_INL T max(T a, T b) { return a < b ? b : a; } \
  __MSL_INL T clamp(T x, T a, T b) { return min(max(x, a), b); } \
  __MSL_INL T select(T a, T b, bool c) { return c ? b : a; } \
  __MSL_INL T min3(T a, T b, T c) { return min(a, min(b, c)); } \
  __MSL_INL T max3(T a, T b, T c) { return max(a, max(b, c)); } \
  __MSL_INL T absdiff(T a, T b) { return a < b ? b - a : a - b; } \
  __MSL_INL T popcount(T x) { return (T)__builtin_popcountl((ulong)x & (~0UL >> (64 - 8 * sizeof(T)))); } \
  __MSL_INL T clz(T x) { \
    ulong u = (ulong)x & (~0UL >> (64 - 8 * sizeof(T))); \
    return (T)(u ? __builtin_clzl(u) - (64 - 8 * sizeof(T)) : 8 * sizeof(T)); \
  } \
  __MSL_INL T ctz(T x) { return (T)(x ? __builtin_ctzl((ulong)x) : 8 * sizeof(T)); } \
  __MSL_INL T rotate(T v, T n) { \
    const uint w = 8 * sizeof(T); \
    ulong u = (ulong)v & (~0UL >> (64 - w)); \
    uint k = (uint)n & (w - 1); \
    return (T)(k ? (u << k) | (u >> (w - k)) : u); \
  } \
  __MSL_INL T extract_bits(T x, uint o, uint b) { \
    return (T)(b == 0 ? 0 : (T)(((T)((ulong)x << (8 * sizeof(T) - o - b))) >> (8 * sizeof(T) - b))); \
  } \
  __MSL_INL T insert_bits(T base, T ins, uint o, uint b) { \
    ulong m = (b >= 64 ? ~0UL : (1UL << b) - 1) << o; \
    return (T)(((ulong)base & ~m) | (((ulong)ins << o) & m)); \
  }
__MSL_INT(char)
__MSL_INT(uchar) __MSL_INT(short) __MSL_INT(ushort) __MSL_INT(int) __MSL_INT(uint) __MSL_INT(long) __MSL_INT(ulong)
#define __MSL_FLT(T) \
  __MSL_INL T min(T a, T b) { return b < a || a != a ? b : a; } \
  __MSL_INL T max(T a, T b) { return a < b || a != a ? b : a; } \
  __MSL_INL T clamp(T x, T a, T b) { return min(max(x, a), b); } \
  __MSL_INL T select(T a, T b, bool c) { return c ? b : a; } \
  __MSL_INL T min3(T a, T b, T c) { return min(a, min(b, c)); } \
  __MSL_INL T max3(T a, T b, T c) { return max(a, max(b, c)); }
    __MSL_FLT(float) __MSL_FLT(half) namespace precise {
  using metal::clamp;
  using metal::max;
  using metal::min;
}
namespace fast {
using metal::clamp;
using metal::max;
using metal::min;
}  // namespace fast
__MSL_INL char abs(char x) { return x < 0 ? -x : x; }
__MSL_INL short abs(short x) { return x < 0 ? -x : x; }
__MSL_INL int abs(int x) { return x < 0 ? -x : x; }
__MSL_INL long abs(long x) { return x < 0 ? -x : x; }
__MSL_INL uint abs(uint x) { return x; }
__MSL_INL ushort abs(ushort x) { return x; }
__MSL_INL uchar abs(uchar x) { return x; }
__MSL_INL ulong abs(ulong x) { return x; }
__MSL_INL uint mulhi(uint a, uint b) { return (uint)(((ulong)a * b) >> 32); }
__MSL_INL int mulhi(int a, int b) { return (int)(((long)a * b) >> 32); }
__MSL_INL int mad24(int a, int b, int c) { return a * b + c; }
__MSL_INL int mul24(int a, int b) { return a * b; }
__MSL_INL uint reverse_bits(uint x) { return __builtin_bitreverse32(x); }
template <class T, int N>
__MSL_INL vec<T, N> min(vec<T, N> a, vec<T, N> b) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r.v[i] = min((T)a.v[i], (T)b.v[i]);
  return r;
}
template <class T, int N>
__MSL_INL vec<T, N> max(vec<T, N> a, vec<T, N> b) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r.v[i] = max((T)a.v[i], (T)b.v[i]);
  return r;
}
template <class T, int N>
__MSL_INL vec<T, N> clamp(vec<T, N> x, vec<T, N> a, vec<T, N> b) {
  return min(max(x, a), b);
}
template <class T, int N>
__MSL_INL vec<T, N> clamp(vec<T, N> x, T a, T b) {
  return min(max(x, vec<T, N>(a)), vec<T, N>(b));
}
template <class T, int N>
__MSL_INL vec<T, N> abs(vec<T, N> a) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r.v[i] = abs((T)a.v[i]);
  return r;
}
template <class T, int N>
__MSL_INL vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<bool, N> c) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r.v[i] = c.v[i] ? b.v[i] : a.v[i];
  return r;
}
template <class T, int N>
__MSL_INL T dot(vec<T, N> a, vec<T, N> b) {
  T s = a.v[0] * b.v[0];
  for (int i = 1; i < N; i++) s = s + a.v[i] * b.v[i];
  return s;
}
template <class T, int N>
__MSL_INL T length(vec<T, N> a) {
  return sqrt(dot(a, a));
}
template <int N>
__MSL_INL bool any(vec<bool, N> a) {
  bool r = false;
  for (int i = 0; i < N; i++) r |= a.v[i];
  return r;
}
template <int N>
__MSL_INL bool all(vec<bool, N> a) {
  bool r = true;
  for (int i = 0; i < N; i++) r &= a.v[i];
  return r;
}
__MSL_INL bool any(bool a) { return a; }
__MSL_INL bool all(bool a) { return a; }
__MSL_INL float2 unpack_half2x16_to_float(uint x) { return float2(as_type<half2>(x)); }
__MSL_INL float4 unpack_unorm4x8_to_float(uint x) {
  uchar4 c = as_type<uchar4>(x);
  return float4(c) / 255.0f;
}
}  // namespace metal
