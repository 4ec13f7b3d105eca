// Vectors with swizzles, packed vectors, arrays and small matrices of metal_stdlib.
#pragma once
#pragma clang system_header
#include "msl_traits.h"

namespace metal {
template <class T, int N>
struct __vst {
  typedef T type __attribute__((ext_vector_type(N)));
};
#define __MSL_VSTA(T) \
  template <int N> \
  struct __vst<T, N> { \
    struct alignas(sizeof(T) * (N == 3 ? 4 : N)) type { \
      T a[N == 3 ? 4 : N]; \
      constexpr T& operator[](int i) { return a[i]; } \
      constexpr const T& operator[](int i) const { return a[i]; } \
      constexpr T operator[](int i) const __constant { return a[i]; } \
    }; \
  };
__MSL_VSTA(bool)
__MSL_VSTA(bfloat) template <class T, int N>
struct vec;
#define __MSL_F2 \
  struct { \
    T x, y; \
  }; \
  struct { \
    T r, g; \
  };
#define __MSL_F3 \
  struct { \
    T x, y, z; \
  }; \
  struct { \
    T r, g, b; \
  };
#define __MSL_F4 \
  struct { \
    T x, y, z, w; \
  }; \
  struct { \
    T r, g, b, a; \
  };
#define __MSL_VEC_COMMON(N) \
  typedef T value_type; \
  union { \
    typename __vst<T, N>::type v; \
    __MSL_F##N \
  }; \
  vec() = default; \
  template <class U> \
  __MSL_INL explicit vec(const vec<U, N>& o) : v{} { \
    for (int i = 0; i < N; i++) v[i] = (T)o.v[i]; \
  } \
  template <class U> \
  __MSL_INL vec(const __constant vec<U, N>& o) : v{} { \
    for (int i = 0; i < N; i++) v[i] = (T)o.v[i]; \
  } \
  template <class U> \
  constexpr vec(const __constant vec<U, N>& o) __constant : v(o.v) {} \
  template <class U> \
  __MSL_INL vec& operator=(const __constant vec<U, N>& o) { \
    for (int i = 0; i < N; i++) v[i] = (T)o.v[i]; \
    return *this; \
  } \
  __MSL_INL T& operator[](int i) { return ((T*)&v)[i]; } \
  __MSL_INL const T& operator[](int i) const { return ((const T*)&v)[i]; } \
  __MSL_INL T operator[](int i) const __constant { return v[i]; } \
  friend __MSL_INL vec operator-(vec a) { \
    vec r; \
    for (int i = 0; i < N; i++) r.v[i] = -a.v[i]; \
    return r; \
  } \
  friend __MSL_INL vec operator+(vec a) { return a; } \
  friend __MSL_INL vec operator~(vec a) { \
    vec r; \
    for (int i = 0; i < N; i++) r.v[i] = (T)~a.v[i]; \
    return r; \
  } \
  friend __MSL_INL vec<bool, N> operator!(vec a) { \
    vec<bool, N> r; \
    for (int i = 0; i < N; i++) r.v[i] = !a.v[i]; \
    return r; \
  } \
  __MSL_VOP(+, N) \
  __MSL_VOP(-, N) __MSL_VOP(*, N) __MSL_VOP(/, N) __MSL_VOP(%, N) __MSL_VOP(&, N) __MSL_VOP(|, N) __MSL_VOP(^, N) \
      __MSL_VOP(<<, N) __MSL_VOP(>>, N) __MSL_VCMP(<, N) __MSL_VCMP(>, N) __MSL_VCMP(<=, N) __MSL_VCMP(>=, N) \
          __MSL_VCMP(==, N) __MSL_VCMP(!=, N) __MSL_VCMP(&&, N) __MSL_VCMP(||, N)
#define __MSL_VOP(op, N) \
  friend __MSL_INL vec operator op(vec a, vec b) { \
    vec r; \
    for (int i = 0; i < N; i++) r.v[i] = (T)(a.v[i] op b.v[i]); \
    return r; \
  } \
  __MSL_INL vec& operator op##=(vec b) { \
    for (int i = 0; i < N; i++) v[i] = (T)(v[i] op b.v[i]); \
    return *this; \
  }
#define __MSL_VCMP(op, N) \
  friend __MSL_INL vec<bool, N> operator op(vec a, vec b) { \
    vec<bool, N> r; \
    for (int i = 0; i < N; i++) r.v[i] = a.v[i] op b.v[i]; \
    return r; \
  }

template <class T>
struct vec<T, 2> {
  __MSL_VEC_COMMON(2)
  constexpr vec(T a) : v{a, a} {}
  constexpr vec(T a, T b) : v{a, b} {}
#include "msl_swizzle2.inc"
};
template <class T>
struct vec<T, 3> {
  __MSL_VEC_COMMON(3)
  constexpr vec(T a) : v{a, a, a} {}
  constexpr vec(T a, T b, T c) : v{a, b, c} {}
  constexpr vec(vec<T, 2> a, T c) : v{a.v[0], a.v[1], c} {}
  constexpr vec(T a, vec<T, 2> b) : v{a, b.v[0], b.v[1]} {}
#include "msl_swizzle3.inc"
};
template <class T>
struct vec<T, 4> {
  __MSL_VEC_COMMON(4)
  constexpr vec(T a) : v{a, a, a, a} {}
  constexpr vec(T a, T b, T c, T d) : v{a, b, c, d} {}
  constexpr vec(vec<T, 2> a, T c, T d) : v{a.v[0], a.v[1], c, d} {}
  constexpr vec(T a, vec<T, 2> b, T d) : v{a, b.v[0], b.v[1], d} {}
  constexpr vec(T a, T b, vec<T, 2> c) : v{a, b, c.v[0], c.v[1]} {}
  constexpr vec(vec<T, 2> a, vec<T, 2> b) : v{a.v[0], a.v[1], b.v[0], b.v[1]} {}
  constexpr vec(vec<T, 3> a, T d) : v{a.v[0], a.v[1], a.v[2], d} {}
  constexpr vec(T a, vec<T, 3> b) : v{a, b.v[0], b.v[1], b.v[2]} {}
#include "msl_swizzle4.inc"
};
#define __MSL_F8 \
  struct { \
    T s0, s1, s2, s3, s4, s5, s6, s7; \
  };
template <class T>
struct vec<T, 8> {
  __MSL_VEC_COMMON(8)
  constexpr vec(T a) : v{a, a, a, a, a, a, a, a} {}
  constexpr vec(T a, T b, T c, T d, T e, T f, T g, T h) : v{a, b, c, d, e, f, g, h} {}
};
#define __MSL_TV(T) \
  typedef vec<T, 2> T##2; \
  typedef vec<T, 3> T##3; \
  typedef vec<T, 4> T##4;
__MSL_TV(char)
__MSL_TV(uchar) __MSL_TV(short) __MSL_TV(ushort) __MSL_TV(int) __MSL_TV(uint) __MSL_TV(long) __MSL_TV(ulong)
    __MSL_TV(float) __MSL_TV(bfloat) __MSL_TV(bool) typedef vec<half, 2> half2;
typedef vec<half, 3> half3;
typedef vec<half, 4> half4;
template <class T, int N>
struct packed_vec;
#define __MSL_PK(N, ...) \
  template <class T> \
  struct packed_vec<T, N> { \
    T __VA_ARGS__; \
    packed_vec() = default; \
    __MSL_INL packed_vec(vec<T, N> b) { \
      for (int i = 0; i < N; i++) (&x)[i] = b.v[i]; \
    } \
    __MSL_INL packed_vec(T b) : packed_vec(vec<T, N>(b)) {} \
    template <class... A> \
    __MSL_INL packed_vec(T a, T b, A... r) : packed_vec(vec<T, N>(a, b, r...)) {} \
    __MSL_INL operator vec<T, N>() const { \
      vec<T, N> r; \
      for (int i = 0; i < N; i++) r.v[i] = (&x)[i]; \
      return r; \
    } \
    __MSL_INL T& operator[](int i) { return (&x)[i]; } \
    __MSL_INL const T& operator[](int i) const { return (&x)[i]; } \
  };
__MSL_PK(2, x, y)
__MSL_PK(3, x, y, z) __MSL_PK(4, x, y, z, w)
#define __MSL_PV(T) \
  typedef packed_vec<T, 2> packed_##T##2; \
  typedef packed_vec<T, 3> packed_##T##3; \
  typedef packed_vec<T, 4> packed_##T##4;
    __MSL_PV(char) __MSL_PV(uchar) __MSL_PV(short) __MSL_PV(ushort) __MSL_PV(int) __MSL_PV(uint) __MSL_PV(float)
        __MSL_PV(bfloat) typedef packed_vec<half, 2> packed_half2;
typedef packed_vec<half, 3> packed_half3;
typedef packed_vec<half, 4> packed_half4;

template <class T, size_t N>
struct array {
  T a[N];
  constexpr __MSL_INL T& operator[](size_t i) { return a[i]; }
  constexpr __MSL_INL const T& operator[](size_t i) const { return a[i]; }
  constexpr size_t size() const { return N; }
};

template <class T>
using uniform = T;
template <class T>
__MSL_INL constexpr T make_uniform(T x) {
  return x;
}
template <class T, int C, int R>
struct matrix {
  vec<T, R> c[C];  // columns
  matrix() = default;
  template <class... A>
  __MSL_INL explicit matrix(vec<T, R> a, A... r) : c{a, vec<T, R>(r)...} {}
  __MSL_INL explicit matrix(T d) {
    for (int i = 0; i < C; i++)
      for (int j = 0; j < R; j++) c[i].v[j] = i == j ? d : (T)0;
  }
  __MSL_INL __private vec<T, R>& operator[](int i) __private { return c[i]; }
  __MSL_INL const __private vec<T, R>& operator[](int i) const __private { return c[i]; }
  __MSL_INL const vec<T, R>& operator[](int i) const { return c[i]; }
  friend __MSL_INL vec<T, R> operator*(matrix m, vec<T, C> x) {
    vec<T, R> r((T)0);
    for (int i = 0; i < C; i++) r += m.c[i] * vec<T, R>((T)x.v[i]);
    return r;
  }
  friend __MSL_INL matrix operator*(matrix m, T s) {
    for (int i = 0; i < C; i++) m.c[i] = m.c[i] * vec<T, R>(s);
    return m;
  }
};
#define __MSL_MT(T) \
  typedef matrix<T, 2, 2> T##2x2; \
  typedef matrix<T, 3, 3> T##3x3; \
  typedef matrix<T, 4, 4> T##4x4; \
  typedef matrix<T, 2, 4> T##2x4; \
  typedef matrix<T, 4, 2> T##4x2;
__MSL_MT(float) typedef matrix<half, 4, 4> half4x4;
typedef matrix<half, 2, 4> half2x4;
typedef matrix<half, 2, 2> half2x2;
template <class To, class From>
__MSL_INL To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
  return __builtin_bit_cast(To, x);
}
}  // namespace metal
