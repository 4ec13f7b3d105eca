// What the vector kernels take from Metal, for CUDA: `mx.fast.cuda_kernel` compiles their text behind this one, with a
// warp for a SIMD-group (its own prelude defines __half, __nv_bfloat16 and Shape: mlx/backend/cuda/custom_kernel.cpp).
//
// Threadgroups have one dimension. Threadgroup memory is declared in a kernel's body alone, and there by `__shared__`:
// bench/cuda_kernels.py replaces the word. Matrices of a SIMD-group (qmm) are not here.
#pragma once

#define MLXQ_FUNC __device__ __forceinline__
#define MLXQ_UNROLL _Pragma("unroll")
#define MLXQ_TABLE __device__

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;  // of 64 bits, as everywhere but on Windows
using int8_t = signed char;
static_assert(sizeof(ulong) == 8, "offsets have 64 bits");

/// Metal's vectors. CUDA's own of these names have no constructors, so the names become others.
template <typename T, int n>
struct vec;

template <typename T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  T x, y;
  vec() = default;
  MLXQ_FUNC explicit vec(T v) : x(v), y(v) {}
  MLXQ_FUNC vec(T x_, T y_) : x(x_), y(y_) {}
};

/// Three words as they lie in memory.
struct mlxq_packed_uint3 {
  uint x, y, z;
};

template <typename T>
struct vec<T, 3> {
  T x, y, z;
  vec() = default;
  MLXQ_FUNC vec(T x_, T y_, T z_) : x(x_), y(y_), z(z_) {}
  MLXQ_FUNC explicit vec(mlxq_packed_uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

template <typename T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  T x, y, z, w;
  vec() = default;
  MLXQ_FUNC explicit vec(T v) : x(v), y(v), z(v), w(v) {}
  MLXQ_FUNC vec(T x_, T y_, T z_, T w_) : x(x_), y(y_), z(z_), w(w_) {}
};

MLXQ_FUNC vec<uint, 2> operator|(vec<uint, 2> a, vec<uint, 2> b) {
  return {a.x | b.x, a.y | b.y};
}

#define ushort2 vec<ushort, 2>
#define ushort4 vec<ushort, 4>
#define uint2 vec<uint, 2>
#define uint3 vec<uint, 3>
#define uint4 vec<uint, 4>
#define int4 vec<int, 4>
#define float2 vec<float, 2>
#define float4 vec<float, 4>
#define packed_uint3 mlxq_packed_uint3

template <typename To, typename From>
MLXQ_FUNC To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

#define device
#define threadgroup
#define thread
#define constant

#define threadgroup_position_in_grid (uint3(blockIdx.x, blockIdx.y, blockIdx.z))
#define thread_position_in_grid (uint3(blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y, blockIdx.z))
#define simdgroup_index_in_threadgroup (threadIdx.x / 32)
#define thread_index_in_simdgroup (threadIdx.x % 32)

enum class mem_flags { mem_none, mem_device, mem_threadgroup };

MLXQ_FUNC void simdgroup_barrier(mem_flags) {
  __syncwarp(0xFFFFFFFFu);
}

MLXQ_FUNC void threadgroup_barrier(mem_flags) {
  __syncthreads();
}

template <typename T>
MLXQ_FUNC T simd_shuffle_xor(T value, ushort step) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, step);
}

MLXQ_FUNC float simd_sum(float value) {
  MLXQ_UNROLL
  for (int step = 16; step > 0; step /= 2) {
    value += simd_shuffle_xor(value, ushort(step));
  }
  return value;
}

#ifndef NAN
#define NAN (as_type<float>(0x7FC00000u))
#endif
