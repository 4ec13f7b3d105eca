// simdgroup_matrix: two elements a lane, in the layout that mlx's BaseMMAFrag::get_coord relies on.
#pragma once
#pragma clang system_header
#include "msl_simd.h"

namespace metal {
template <class T, int R, int C>
struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "only 8x8");
  vec<T, 2> e;
  simdgroup_matrix() = default;
  __MSL_INL explicit simdgroup_matrix(T d) {
    uint r, c;
    __rc(r, c);
    e.v[0] = r == c ? d : (T)0;
    e.v[1] = r == c + 1 ? d : (T)0;
  }
  __MSL_INL __private vec<T, 2>& thread_elements() __private { return e; }
  __MSL_INL const __private vec<T, 2>& thread_elements() const __private { return e; }
  static __MSL_INL void __rc(uint& r, uint& c) {
    uint l = __msl_lane(), q = l / 4;
    r = (q & 4) + (l / 2) % 4;
    c = (q & 2) * 2 + (l % 2) * 2;
  }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
template <class T, int R, int C>
__MSL_INL simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T x) {
  simdgroup_matrix<T, R, C> m;
  m.e = vec<T, 2>(x, x);
  return m;
}
#define __MSL_MATIO(AS) \
  template <class T> \
  __MSL_INL void simdgroup_load(__private simdgroup_matrix<T, 8, 8>& m, const AS T* p, ulong ld = 8, \
                                ulong2 o = ulong2(0), bool tr = false) { \
    uint r, c; \
    m.__rc(r, c); \
    p += o.v[1] * ld + o.v[0]; \
    if (tr) { \
      m.e.v[0] = p[c * ld + r]; \
      m.e.v[1] = p[(c + 1) * ld + r]; \
    } else { \
      m.e.v[0] = p[r * ld + c]; \
      m.e.v[1] = p[r * ld + c + 1]; \
    } \
  } \
  template <class T> \
  __MSL_INL void simdgroup_store(simdgroup_matrix<T, 8, 8> m, AS T* p, ulong ld = 8, ulong2 o = ulong2(0), \
                                 bool tr = false) { \
    uint r, c; \
    m.__rc(r, c); \
    p += o.v[1] * ld + o.v[0]; \
    if (tr) { \
      p[c * ld + r] = m.e.v[0]; \
      p[(c + 1) * ld + r] = m.e.v[1]; \
    } else { \
      p[r * ld + c] = m.e.v[0]; \
      p[r * ld + c + 1] = m.e.v[1]; \
    } \
  }
__MSL_MATIO(__global)
__MSL_MATIO(__local) template <class D, class A, class B>
__MSL_INL void __mma(__private vec<D, 2>& d, vec<A, 2> a, vec<B, 2> b, float c0, float c1) {
  float ab[4] = {(float)a.v[0], (float)a.v[1], (float)b.v[0], (float)b.v[1]};
  __msl_sync(__MSL_SIMD, &ab, sizeof(ab), 1);
  uint l = __msl_lane(), q = l / 4, r = (q & 4) + (l / 2) % 4, c = (q & 2) * 2 + (l % 2) * 2;
  for (uint k = 0; k < 8; k++) {  // lane holding (row, col): inverse of __rc
    uint la = ((r >> 2) << 4) | ((k >> 2) << 3) | ((r & 3) << 1) | ((k & 3) >> 1);
    uint lb = ((k >> 2) << 4) | ((c >> 2) << 3) | ((k & 3) << 1) | ((c & 3) >> 1);
    float av = ((const float*)__msl_peek(la))[k & 1];
    const float* bp = (const float*)__msl_peek(lb);
    c0 = __builtin_fmaf(av, bp[2], c0);
    c1 = __builtin_fmaf(av, bp[3], c1);
  }
  d.v[0] = (D)c0;
  d.v[1] = (D)c1;
}
template <class D, class A, class B, class C>
__MSL_SIMD_INL void simdgroup_multiply_accumulate(__private simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                             simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c) {
  __mma(d.e, a.e, b.e, (float)c.e.v[0], (float)c.e.v[1]);
}
template <class D, class A, class B>
__MSL_SIMD_INL void simdgroup_multiply(__private simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                  simdgroup_matrix<B, 8, 8> b) {
  __mma(d.e, a.e, b.e, 0.0f, 0.0f);
}
}  // namespace metal
