// Atomics: the runtime runs one lane at a time, so that relaxed and plain operations do.
#pragma once
#pragma clang system_header
#include "msl_simd.h"

namespace metal {
template <class T>
struct atomic {
  T __a;
};
typedef atomic<int> atomic_int_msl;
typedef atomic<uint> atomic_uint_msl;
typedef atomic<float> atomic_float_msl;
typedef atomic<bool> atomic_bool_msl;
typedef atomic<ulong> atomic_ulong_msl;  // OpenCL has the plain names
enum {
  __A_LOAD,
  __A_STORE,
  __A_XCHG,
  __A_ADD,
  __A_SUB,
  __A_MAXS,
  __A_MINS,
  __A_MAXU,
  __A_MINU,
  __A_AND,
  __A_OR,
  __A_XOR,
  __A_FADD,
  __A_CAS
};
template <class T>
constexpr int __mx() {
  return is_signed_v<T> ? __A_MAXS : __A_MAXU;
}
template <class T>
constexpr int __mn() {
  return is_signed_v<T> ? __A_MINS : __A_MINU;
}
template <class T>
struct __id {
  typedef T type;
};
#define __MSL_AT(n, op) \
  template <class T> \
  __MSL_INL T atomic_##n##_explicit(volatile __generic atomic<T>* p, typename __id<T>::type v, memory_order, \
                                    thread_scope = thread_scope_device) { \
    static_assert(sizeof(T) == 4, "32-bit atomics only"); \
    return as_type<T>(__msl_atomic32(op, (void*)p, as_type<uint>(v), 0)); \
  }
__MSL_AT(exchange, __A_XCHG)
__MSL_AT(fetch_add, (is_floating_point_v<T> ? __A_FADD : __A_ADD)) __MSL_AT(fetch_sub, __A_SUB)
    __MSL_AT(fetch_max, __mx<T>()) __MSL_AT(fetch_min, __mn<T>()) __MSL_AT(fetch_and, __A_AND)
        __MSL_AT(fetch_or, __A_OR) __MSL_AT(fetch_xor, __A_XOR) template <class T>
        __MSL_INL void atomic_store_explicit(volatile __generic atomic<T>* p, typename __id<T>::type v, memory_order,
                                             thread_scope = thread_scope_device) {
  __msl_atomic32(__A_STORE, (void*)p, as_type<uint>(v), 0);
}
template <class T>
__MSL_INL T atomic_load_explicit(const volatile __generic atomic<T>* p, memory_order,
                                 thread_scope = thread_scope_device) {
  return as_type<T>(__msl_atomic32(__A_LOAD, (void*)p, 0, 0));
}
template <class T>
__MSL_INL bool atomic_compare_exchange_weak_explicit(volatile __generic atomic<T>* p, __private T* expected, T v,
                                                     memory_order, memory_order) {
  T e = *expected;
  T old = as_type<T>(__msl_atomic32(__A_CAS, (void*)p, as_type<uint>(v), as_type<uint>(e)));
  *expected = old;
  return as_type<uint>(old) == as_type<uint>(e);
}
__MSL_INL void atomic_thread_fence(mem_flags, memory_order, thread_scope = thread_scope_device) {}
struct os_log {
  constexpr os_log(const __constant char*, const __constant char*) __constant {}
  template <class... A>
  void log_debug(A...) const __constant {}
  template <class... A>
  void log_error(A...) const __constant {}
  template <class... A>
  void log_info(A...) const __constant {}
  template <class... A>
  void log(A...) const __constant {}
};
}  // namespace metal
