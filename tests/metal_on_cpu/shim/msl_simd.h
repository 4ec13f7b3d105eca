// Barriers, SIMD-group and quad-group functions.
#pragma once
#pragma clang system_header
#include "msl_math.h"

namespace metal {
enum class mem_flags : uint {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
  mem_object_data = 16
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((uint)a | (uint)b); }
enum memory_order {
  memory_order_relaxed = 0,
  memory_order_acquire,
  memory_order_release,
  memory_order_acq_rel,
  memory_order_seq_cst
};
enum thread_scope {
  thread_scope_thread,
  thread_scope_simdgroup,
  thread_scope_threadgroup,
  thread_scope_device,
  thread_scope_system
};
__MSL_INL void threadgroup_barrier(mem_flags f) { __msl_sync(__MSL_TGBAR, (const void*)0, 0, (uint)f); }
__MSL_INL void simdgroup_barrier(mem_flags f) { __msl_sync(__MSL_SGBAR, (const void*)0, 0, (uint)f); }
template <class T>
struct __simd_ok : false_type {};
#define __MSL_OK(T) \
  template <> \
  struct __simd_ok<T> : true_type {};
__MSL_OK(char)
__MSL_OK(uchar) __MSL_OK(short) __MSL_OK(ushort) __MSL_OK(int) __MSL_OK(uint) __MSL_OK(half)
    __MSL_OK(float) template <class T, int N>
    struct __simd_ok<vec<T, N>> : __simd_ok<T> {};
template <class T>
using __simd_t = enable_if_t<__simd_ok<T>::value, T>;  // Metal has no 64-bit, bool or bfloat SIMD functions
template <class T>
__MSL_INL T __peek(uint lane) {
  return *(const T*)__msl_peek(lane);
}
#define __MSL_PUB(K, x) __msl_sync(K, &x, sizeof(x), 0)
#define __MSL_SHUF(P, K, LO, W) \
  template <class T> \
  __MSL_SIMD_INL __simd_t<T> P##_shuffle(T x, ushort l) { \
    __MSL_PUB(K, x); \
    uint b = LO; \
    return __peek<T>(b + l); \
  } \
  template <class T> \
  __MSL_SIMD_INL __simd_t<T> P##_broadcast(T x, ushort l) { \
    __MSL_PUB(K, x); \
    uint b = LO; \
    return __peek<T>(b + l); \
  } \
  template <class T> \
  __MSL_SIMD_INL __simd_t<T> P##_broadcast_first(T x) { \
    __MSL_PUB(K, x); \
    uint b = LO; \
    return __peek<T>(b + (uint)__builtin_ctz(__msl_active() >> b)); \
  } \
  template <class T> \
  __MSL_SIMD_INL __simd_t<T> P##_shuffle_xor(T x, ushort m) { \
    __MSL_PUB(K, x); \
    return __peek<T>(__msl_lane() ^ m); \
  } \
  template <class T> \
  __MSL_SIMD_INL __simd_t<T> P##_shuffle_down(T x, ushort d) { \
    __MSL_PUB(K, x); \
    uint b = LO, i = __msl_lane() - b + d; \
    if (i < W) return __peek<T>(b + i); \
    return x; \
  } \
  template <class T> \
  __MSL_SIMD_INL __simd_t<T> P##_shuffle_up(T x, ushort d) { \
    __MSL_PUB(K, x); \
    uint b = LO, i = __msl_lane() - b; \
    if (i >= d) return __peek<T>(b + i - d); \
    return x; \
  } \
  template <class T> \
  __MSL_SIMD_INL __simd_t<T> P##_shuffle_rotate_down(T x, ushort d) { \
    __MSL_PUB(K, x); \
    uint b = LO; \
    return __peek<T>(b + (__msl_lane() - b + d) % W); \
  } \
  template <class T> \
  __MSL_SIMD_INL __simd_t<T> P##_shuffle_rotate_up(T x, ushort d) { \
    __MSL_PUB(K, x); \
    uint b = LO; \
    return __peek<T>(b + (__msl_lane() - b + W - d % W) % W); \
  } \
  template <class T> \
  __MSL_SIMD_INL __simd_t<T> P##_shuffle_and_fill_down(T x, T f, ushort d, ushort m = W) { \
    T xf[2] = {x, f}; \
    __MSL_PUB(K, xf); \
    uint b = LO, i = __msl_lane() - b, s = i / m * m, p = i - s + d; \
    if (p < m) return __peek<T>(b + s + p); \
    return ((const T*)__msl_peek(b + s + p - m))[1]; \
  } \
  template <class T> \
  __MSL_SIMD_INL __simd_t<T> P##_shuffle_and_fill_up(T x, T f, ushort d, ushort m = W) { \
    T xf[2] = {x, f}; \
    __MSL_PUB(K, xf); \
    uint b = LO, i = __msl_lane() - b, s = i / m * m, p = i - s; \
    if (p >= d) return __peek<T>(b + s + p - d); \
    return ((const T*)__msl_peek(b + s + p + m - d))[1]; \
  } \
  template <class T> \
  __MSL_SIMD_INL __simd_t<T> P##_sum(T x) { \
    return __red<T>(K, x, LO, W, [](T a, T b) { return (T)(a + b); }); \
  } \
  template <class T> \
  __MSL_SIMD_INL __simd_t<T> P##_product(T x) { \
    return __red<T>(K, x, LO, W, [](T a, T b) { return (T)(a * b); }); \
  } \
  template <class T> \
  __MSL_SIMD_INL __simd_t<T> P##_max(T x) { \
    return __red<T>(K, x, LO, W, [](T a, T b) { return max(a, b); }); \
  } \
  template <class T> \
  __MSL_SIMD_INL __simd_t<T> P##_min(T x) { \
    return __red<T>(K, x, LO, W, [](T a, T b) { return min(a, b); }); \
  } \
  template <class T> \
  __MSL_SIMD_INL __simd_t<T> P##_and(T x) { \
    return __red<T>(K, x, LO, W, [](T a, T b) { return (T)(a & b); }); \
  } \
  template <class T> \
  __MSL_SIMD_INL __simd_t<T> P##_or(T x) { \
    return __red<T>(K, x, LO, W, [](T a, T b) { return (T)(a | b); }); \
  } \
  template <class T> \
  __MSL_SIMD_INL __simd_t<T> P##_xor(T x) { \
    return __red<T>(K, x, LO, W, [](T a, T b) { return (T)(a ^ b); }); \
  } \
  template <class T> \
  __MSL_SIMD_INL __simd_t<T> P##_prefix_inclusive_sum(T x) { \
    return __scan<T>(K, x, LO, true, (T)0, [](T a, T b) { return (T)(a + b); }); \
  } \
  template <class T> \
  __MSL_SIMD_INL __simd_t<T> P##_prefix_exclusive_sum(T x) { \
    return __scan<T>(K, x, LO, false, (T)0, [](T a, T b) { return (T)(a + b); }); \
  } \
  template <class T> \
  __MSL_SIMD_INL __simd_t<T> P##_prefix_inclusive_product(T x) { \
    return __scan<T>(K, x, LO, true, (T)1, [](T a, T b) { return (T)(a * b); }); \
  } \
  template <class T> \
  __MSL_SIMD_INL __simd_t<T> P##_prefix_exclusive_product(T x) { \
    return __scan<T>(K, x, LO, false, (T)1, [](T a, T b) { return (T)(a * b); }); \
  } \
  template <class T> \
  enable_if_t<__is_arithmetic(T) && !__simd_ok<T>::value> P##_sum(T) = delete; \
  template <class T> \
  enable_if_t<__is_arithmetic(T) && !__simd_ok<T>::value> P##_max(T) = delete; \
  template <class T> \
  enable_if_t<__is_arithmetic(T) && !__simd_ok<T>::value> P##_min(T) = delete; \
  __MSL_SIMD_INL bool P##_all(bool x) { \
    uint t = x; \
    return P##_and(t); \
  } \
  __MSL_SIMD_INL bool P##_any(bool x) { \
    uint t = x; \
    return P##_or(t); \
  }
// Apple's reduction order is not documented: a butterfly (the tree a GPU most likely uses) by default,
// MSL_SIMD_ORDER=1 adds lanes in sequence, 2 in reverse, to see how far results depend on the order.
#ifndef MSL_SIMD_ORDER
#define MSL_SIMD_ORDER 0
#endif
template <class T, class F>
__MSL_INL T __red(uint K, T x, uint lo, uint W, F f) {
  __MSL_PUB(K, x);
  uint act = __msl_active();
  T t[32];
  bool on[32];
  for (uint i = 0; i < W; i++) {
    on[i] = (act >> (lo + i)) & 1;
    if (on[i]) t[i] = __peek<T>(lo + i);
  }
#if MSL_SIMD_ORDER == 0
  for (uint s = 1; s < W; s <<= 1)
    for (uint i = 0; i < W; i += 2 * s) {
      if (on[i] && on[i + s])
        t[i] = f(t[i], t[i + s]);
      else if (on[i + s]) {
        t[i] = t[i + s];
        on[i] = true;
      }
    }
  return t[0];
#else
  T r = x;
  bool have = false;
  for (uint k = 0; k < W; k++) {
    uint i = MSL_SIMD_ORDER == 1 ? k : W - 1 - k;
    if (on[i]) {
      r = have ? f(r, t[i]) : t[i];
      have = true;
    }
  }
  return r;
#endif
}
template <class T, class F>
__MSL_INL T __scan(uint K, T x, uint lo, bool incl, T id, F f) {
  __MSL_PUB(K, x);
  uint act = __msl_active(), me = __msl_lane();
  T r = id;
  for (uint i = lo; i < me; i++)
    if ((act >> i) & 1) r = f(r, __peek<T>(i));
  if (incl) r = f(r, x);
  return r;
}
__MSL_SHUF(simd, __MSL_SIMD, 0u, 32u)
__MSL_SHUF(quad, __MSL_QUAD, (__msl_lane() & ~3u), 4u)
struct simd_vote {
  ulong bits;
  explicit simd_vote(ulong b = 0) : bits(b) {}
  explicit operator ulong() const { return bits; }
  bool all() const { return bits == 0xffffffffUL; }
  bool any() const { return bits != 0; }
};
__MSL_SIMD_INL simd_vote simd_ballot(bool x) {
  uint t = x;
  __MSL_PUB(__MSL_SIMD, t);
  ulong r = 0;
  for (uint i = 0; i < 32; i++)
    if ((__msl_active() >> i) & 1) r |= (ulong)__peek<uint>(i) << i;
  return simd_vote(r);
}
__MSL_SIMD_INL simd_vote simd_active_threads_mask() {
  uint t = 0;
  __MSL_PUB(__MSL_SIMD, t);
  return simd_vote(__msl_active());
}
__MSL_SIMD_INL bool simd_is_first() {
  uint t = 0;
  __MSL_PUB(__MSL_SIMD, t);
  return (uint)__builtin_ctz(__msl_active()) == __msl_lane();
}
}  // namespace metal
