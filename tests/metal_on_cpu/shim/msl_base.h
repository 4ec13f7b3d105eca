// Metal's words, scalar types and constants, and what the runtime offers to a kernel.
#pragma once
#pragma clang system_header

typedef char int8_t;
typedef unsigned char uint8_t, uchar;
typedef short int16_t;
typedef unsigned short uint16_t, ushort;
typedef int int32_t;
typedef unsigned int uint32_t, uint;
typedef long int64_t;
typedef unsigned long uint64_t, ulong, size_t, uintptr_t;
typedef long ptrdiff_t, intptr_t;
#define half _Float16
struct bfloat;

// MSL words (threadgroup stays a word until translate.py has seen the variables)
#define device __global
#define constant __constant
#define thread __private
#define ray_data __private
#define coherent(scope)
#define kernel __msl_kernel
#define METAL_FUNC inline __attribute__((always_inline))
#define METAL_CONST
#define METAL_INTERNAL inline
#define __METAL_MAYBE_FAST_MATH__ false
#define __METAL_FAST_MATH__ true
#define __METAL_PRECISE_MATH__ false
#define __METAL_MEMORY_SCOPE_SYSTEM__ 4
#define __METAL_MEMORY_SCOPE_DEVICE__ 3
#define __METAL_MEMORY_SCOPE_THREADGROUP__ 2
#define __METAL_MEMORY_SCOPE_SIMDGROUP__ 1
#define __MSL_CONST_M __constant
#define __MSL_INL METAL_FUNC
// SIMD-group functions stay calls where instructions are counted: their insides are not the kernel's (counting.py).
#if MSL_COUNT
#define __MSL_SIMD_INL inline __attribute__((noinline))
#else
#define __MSL_SIMD_INL METAL_FUNC
#endif
#define M_PI_F 3.14159274101257324219f
#define M_E_F 2.71828174591064453125f
#define M_LN2_F 0.693147182464599609375f
#define M_LOG2E_F 1.44269502162933349609f
#define M_LN10_F 2.30258509299404568402f
#define M_PI_2_F 1.57079637050628662109375f
#define M_PI_4_F 0.785398185253143310546875f
#define M_SQRT1_2_F 0.707106769084930419922f
#define M_SQRT2_F 1.41421353816986083984f
#define INFINITY (__builtin_inff())
#define NAN (__builtin_nanf(""))
#define HUGE_VALF (__builtin_inff())
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define HALF_MAX ((half)65504.0f)
#define HALF_MIN ((half)6.103515625e-05f)
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define assert(x) ((void)0)
#define is_function_constant_defined(x) true
#pragma OPENCL EXTENSION __cl_clang_function_pointers : enable

// ---- runtime; unqualified pointers are __generic, i.e. flat -----------------
template <class T>
constexpr __attribute__((always_inline)) T __rv(T x) {
  return x;
}  // see translate.py, 6
struct __msl_u3 {
  uint x, y, z;
};
struct __msl_tid {
  __msl_u3 thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
  __msl_u3 threads_per_grid, threads_per_threadgroup, threadgroups_per_grid;
  __msl_u3 dispatch_threads_per_threadgroup;
  uint thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
  uint simdgroups_per_threadgroup;
};
extern "C" {
void __msl_sync(uint kind, const void* payload, uint size, uint arg) __attribute__((convergent));
const void* __msl_peek(uint lane);
uint __msl_active(void);
uint __msl_lane(void);
void* __msl_tg_alloc(uint id, uint size, uint align);
uint __msl_atomic32(uint op, void* p, uint value, uint extra);
float acosf(float);
float asinf(float);
float atanf(float);
float atan2f(float, float);
float acoshf(float);
float asinhf(float);
float atanhf(float);
float sinf(float);
float cosf(float);
float tanf(float);
float sinhf(float);
float coshf(float);
float tanhf(float);
float expf(float);
float exp2f(float);
float logf(float);
float log2f(float);
float log10f(float);
float powf(float, float);
float fmodf(float, float);
float nextafterf(float, float);
float ldexpf(float, int);
float frexpf(float, int*);
float erff(float);
float modff(float, float*);
int ilogbf(float);
}
enum { __MSL_TGBAR = 1, __MSL_SGBAR = 2, __MSL_SIMD = 3, __MSL_QUAD = 4 };
