// What the encoders of super-blocks share: one SIMD-group a super-block, everything in registers.
//
// A lane has eight weights that follow one another, an octet, so a sub-block of 16 or 32 weights is 2 or 4 lanes, which
// all hold its sums, scale and min. Weights are read once, blocks are written once. The searches are in
// ggml_quantize_lines.h and ggml_quantize_scales.h; planes of codes are drawn in mlxq/formats/kquants.py.
#pragma once
#include "ggml_blocks.h"

constant constexpr float GGML_TINY = 1e-30f;

/// The lane's eight weights, and the importance of their columns. `importance` has one number a column, or one in all.
template <bool weighted, typename I>
MLXQ_FUNC void ggml_load(const device float* w, I importance, int K, uint at, uint lane, thread float* x,
                         thread float* v) {
  load_floats<8>(w + ulong(at) * 256 + 8 * lane, x);
  MLXQ_UNROLL
  for (int i = 0; i < 8; i++) {
    v[i] = weighted ? importance[at % uint(K / 256) * 256 + 8 * lane + uint(i)] : 1.0f;
  }
}

/// Eight codes counted from `low`, one in each byte.
MLXQ_FUNC uint2 ggml_bytes(thread const float* q, float low) {
  uint2 bytes = uint2(0u);
  MLXQ_UNROLL
  for (int i = 0; i < 4; i++) {
    bytes.x |= uint(q[i] - low) << uint(8 * i);
    bytes.y |= uint(q[4 + i] - low) << uint(8 * i);
  }
  return bytes;
}

/// Some bits of each byte.
MLXQ_FUNC uint2 ggml_masked(uint2 q, uint mask) {
  return uint2(q.x & mask * 0x01010101u, q.y & mask * 0x01010101u);
}

/// Bytes moved up by `at` bits, which they leave free.
MLXQ_FUNC uint2 ggml_raised(uint2 q, uint at) {
  return uint2(q.x << at, q.y << at);
}

/// The bits of all lanes that differ from this one in the bits of `mask`, joined.
MLXQ_FUNC uint2 ggml_join(uint2 bits, int mask) {
  MLXQ_UNROLL
  for (int step = 1; step < SIMD_LANES; step *= 2) {
    if (mask & step) {
      bits.x |= simd_shuffle_xor(bits.x, ushort(step));
      bits.y |= simd_shuffle_xor(bits.y, ushort(step));
    }
  }
  return bits;
}

/// Eight bytes at a multiple of `align`.
template <int align>
MLXQ_FUNC void ggml_store(device uchar* out, uint2 bytes) {
  if constexpr (align >= 4) {
    ((device uint*)out)[0] = bytes.x;
    ((device uint*)out)[1] = bytes.y;
  } else {
    device ushort* shorts = (device ushort*)out;
    shorts[0] = ushort(bytes.x & 0xFFFFu);
    shorts[1] = ushort(bytes.x >> 16);
    shorts[2] = ushort(bytes.y & 0xFFFFu);
    shorts[3] = ushort(bytes.y >> 16);
  }
}

/// Two bits of each weight: byte i of plane p holds weights 128 p + i, + 32, + 64, + 96.
template <int align>
MLXQ_FUNC void ggml_write_quarters(device uchar* plane, uint2 twos, uint lane) {
  const uint quarter = lane / 4 % 4;
  const uint2 bytes = ggml_join(ggml_raised(twos, 2 * quarter), 4 | 8);
  if (quarter == 0) {
    ggml_store<align>(plane + lane / 16 * 32 + lane % 4 * 8, bytes);
  }
}

/// Four bits of each weight: byte i of plane p holds weights 2 * half p + i and + half.
template <int align, int half_plane>
MLXQ_FUNC void ggml_write_nibbles(device uchar* plane, uint2 nibbles, uint lane) {
  constexpr uint lanes = half_plane / 8;
  const uint upper = lane / lanes % 2;
  const uint2 bytes = ggml_join(ggml_raised(nibbles, 4 * upper), int(lanes));
  if (upper == 0) {
    ggml_store<align>(plane + lane / (2 * lanes) * half_plane + lane % lanes * 8, bytes);
  }
}

/// One bit of each weight: byte i holds weights i, + 32, ... + 224.
template <int align>
MLXQ_FUNC void ggml_write_ones(device uchar* plane, uint2 ones, uint lane) {
  const uint2 bytes = ggml_join(ggml_raised(ones, lane / 4), 4 | 8 | 16);
  if (lane < 4) {
    ggml_store<align>(plane + 8 * lane, bytes);
  }
}
