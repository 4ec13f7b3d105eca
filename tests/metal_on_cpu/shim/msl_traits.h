// Type traits, bfloat and numeric limits of metal_stdlib.
#pragma once
#pragma clang system_header
#include "msl_base.h"

namespace metal {
// ---- type traits ------------------------------------------------------------------------
template <class T, T v>
struct integral_constant {
  static constexpr __constant T value = v;
  typedef T value_type;
  typedef integral_constant type;
  constexpr operator T() const { return v; }
  constexpr T operator()() const { return v; }
};
template <bool B>
using bool_constant = integral_constant<bool, B>;
typedef bool_constant<true> true_type;
typedef bool_constant<false> false_type;
template <bool C, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool C, class T = void>
using enable_if_t = typename enable_if<C, T>::type;
template <bool C, class A, class B>
struct conditional {
  typedef A type;
};
template <class A, class B>
struct conditional<false, A, B> {
  typedef B type;
};
template <bool C, class A, class B>
using conditional_t = typename conditional<C, A, B>::type;
template <class T>
struct remove_const {
  typedef T type;
};
template <class T>
struct remove_const<const T> {
  typedef T type;
};
template <class T>
struct remove_addrspace {
  typedef T type;
};
template <class T>
struct remove_addrspace<__global T> {
  typedef T type;
};
template <class T>
struct remove_addrspace<__local T> {
  typedef T type;
};
template <class T>
struct remove_addrspace<__private T> {
  typedef T type;
};
template <class T>
struct remove_addrspace<__constant T> {
  typedef T type;
};
template <class T>
struct remove_addrspace<__generic T> {
  typedef T type;
};
template <class T>
using remove_addrspace_t = typename remove_addrspace<T>::type;
template <class T>
struct remove_cv {
  typedef T type;
};
template <class T>
struct remove_cv<const T> {
  typedef T type;
};
template <class T>
struct remove_cv<volatile T> {
  typedef T type;
};
template <class T>
struct remove_cv<const volatile T> {
  typedef T type;
};
template <class T>
using remove_cv_t = remove_addrspace_t<typename remove_cv<T>::type>;
template <class T>
using remove_const_t = typename remove_const<T>::type;
template <class T>
struct remove_reference {
  typedef T type;
};
template <class T>
struct remove_reference<T&> {
  typedef T type;
};
template <class T>
struct remove_reference<__private T&> {
  typedef T type;
};
template <class T>
struct remove_reference<__global T&> {
  typedef T type;
};
template <class T>
struct remove_reference<__local T&> {
  typedef T type;
};
template <class T>
struct remove_reference<__constant T&> {
  typedef T type;
};
template <class T>
using remove_reference_t = typename remove_reference<T>::type;
template <class A, class B>
struct is_same : false_type {};
template <class A>
struct is_same<A, A> : true_type {};
template <class A, class B>
constexpr __constant bool is_same_v = is_same<remove_addrspace_t<A>, remove_addrspace_t<B>>::value;
template <class A, class B>
struct is_convertible : bool_constant<__is_convertible(A, B)> {};
template <class A, class B>
constexpr __constant bool is_convertible_v = __is_convertible(A, B);
template <class T>
struct is_integral : bool_constant<__is_integral(T)> {};
template <class T>
constexpr __constant bool is_integral_v = __is_integral(T);
template <class T>
struct is_floating_point : bool_constant<__is_floating_point(T)> {};
template <class T>
constexpr __constant bool is_floating_point_v = __is_floating_point(T);
template <class T>
struct is_arithmetic : bool_constant<__is_arithmetic(T)> {};
template <class T>
constexpr __constant bool is_arithmetic_v = __is_arithmetic(T);
template <class T>
struct is_signed : bool_constant<__is_signed(T)> {};
template <class T>
constexpr __constant bool is_signed_v = __is_signed(T);
template <class T>
struct is_unsigned : bool_constant<__is_unsigned(T)> {};
template <class T>
constexpr __constant bool is_unsigned_v = __is_unsigned(T);
template <class T>
struct make_unsigned {
  typedef __make_unsigned(T) type;
};
template <class T>
using make_unsigned_t = __make_unsigned(T);
template <class T>
using make_signed_t = __make_signed(T);
template <class T>
T declval();
template <class...>
struct disjunction : false_type {};
template <class A, class... B>
struct disjunction<A, B...> : conditional_t<A::value, A, disjunction<B...>> {};
template <class...>
struct conjunction : true_type {};
template <class A, class... B>
struct conjunction<A, B...> : conditional_t<A::value, conjunction<B...>, A> {};
template <class... T>
using _disjunction = disjunction<T...>;
template <class... T>
using _conjunction = conjunction<T...>;
template <class... A>
constexpr __constant bool disjunction_v = disjunction<A...>::value;

// bfloat: a class, so that MSL's rule holds (float and half never convert to it implicitly; it converts to float)
}  // namespace metal
struct bfloat {
  ushort bits;
  bfloat() = default;
  template <class U, class = metal::enable_if_t<__is_floating_point(U)>>
  explicit constexpr bfloat(U x) : bits(__round((float)x)) {}
  template <class U, class = metal::enable_if_t<__is_integral(U)>, class = void>
  constexpr bfloat(U x) : bits(__round((float)x)) {}
  template <class U, class = metal::enable_if_t<__is_same(U, bfloat)>>
  constexpr bfloat(const __constant U& o) : bits(o.bits) {}
  template <class U, class = metal::enable_if_t<__is_same(U, bfloat)>>
  constexpr bfloat(const __constant U& o) __constant : bits(o.bits) {}
  template <class U, class = metal::enable_if_t<__is_same(U, bfloat)>>
  bfloat& operator=(const __constant U& o) {
    bits = o.bits;
    return *this;
  }
  constexpr operator float() const { return __builtin_bit_cast(float, (uint)bits << 16); }
  constexpr operator float() const __constant { return __builtin_bit_cast(float, (uint)bits << 16); }
  static constexpr ushort __round(float f) {
    uint u = __builtin_bit_cast(uint, f);
    return (u & 0x7fffffffu) > 0x7f800000u ? (ushort)((u >> 16) | 64) : (ushort)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
  }
#define __BF(op) \
  friend constexpr bfloat operator op(bfloat a, bfloat b) { return bfloat((float)a op(float) b); } \
  template <class U, class = metal::enable_if_t<__is_integral(U)>> \
  friend constexpr bfloat operator op(U a, bfloat b) { \
    return bfloat((float)a op(float) b); \
  } \
  template <class U, class = metal::enable_if_t<__is_integral(U)>> \
  friend constexpr bfloat operator op(bfloat a, U b) { \
    return bfloat((float)a op(float) b); \
  } \
  bfloat& operator op##=(bfloat b) { \
    *this = *this op b; \
    return *this; \
  }
  __BF(+)
  __BF(-) __BF(*) __BF(/)
#undef __BF
      friend constexpr bfloat
      operator-(bfloat a) {
    bfloat r = a;
    r.bits ^= 0x8000;
    return r;
  }
};
namespace metal {
template <>
struct is_floating_point<bfloat> : true_type {};
template <>
constexpr __constant bool is_floating_point_v<bfloat> = true;

template <class T>
struct numeric_limits;
#define __MSL_ILIM(T, S, MX, DIG) \
  template <> \
  struct numeric_limits<T> { \
    static constexpr __constant bool is_specialized = true; \
    static constexpr __constant bool is_signed = S; \
    static constexpr __constant bool is_integer = true; \
    static constexpr __constant int digits = DIG; \
    static constexpr T max() { return (T)(MX); } \
    static constexpr T min() { return S ? (T)(-(long)(MX) - 1) : (T)0; } \
    static constexpr T lowest() { return min(); } \
    static constexpr T infinity() { return 0; } \
  };
__MSL_ILIM(char, true, 127, 7)
__MSL_ILIM(signed char, true, 127, 7) __MSL_ILIM(uchar, false, 255, 8) __MSL_ILIM(short, true, 32767, 15)
    __MSL_ILIM(ushort, false, 65535, 16) __MSL_ILIM(int, true, 2147483647, 31) __MSL_ILIM(uint, false, 4294967295u, 32)
        __MSL_ILIM(long, true, 9223372036854775807L, 63) __MSL_ILIM(ulong, false, 18446744073709551615UL, 64)
            __MSL_ILIM(bool, false, 1, 1)
#define __MSL_FLIM(T, MX, MN, EPS, DIG, DEN) \
  template <> \
  struct numeric_limits<T> { \
    static constexpr __constant bool is_specialized = true; \
    static constexpr __constant bool is_signed = true; \
    static constexpr __constant bool is_integer = false; \
    static constexpr __constant int digits = DIG; \
    static constexpr T max() { return (T)(MX); } \
    static constexpr T lowest() { return (T)(-(MX)); } \
    static constexpr T min() { return (T)(MN); } \
    static constexpr T epsilon() { return (T)(EPS); } \
    static constexpr T denorm_min() { return (T)(DEN); } \
    static constexpr T infinity() { return (T)__builtin_inff(); } \
    static constexpr T quiet_NaN() { return (T)__builtin_nanf(""); } \
  };
                __MSL_FLIM(float, 3.402823466e+38f, 1.175494351e-38f, 1.192092896e-07f, 24, 1.4e-45f)
                    __MSL_FLIM(half, 65504.0f, 6.103515625e-05f, 9.765625e-04f, 11, 5.9604645e-08f)
                        __MSL_FLIM(bfloat, 3.38953139e+38f, 1.175494351e-38f, 7.8125e-03f, 8, 9.1835e-41f)
}  // namespace metal
