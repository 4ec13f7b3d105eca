// ggml's blocks, decoded from the bytes of a GGUF file: what all types share. ggml_blocks.h has a struct for each.
//
// What the bytes mean is drawn in mlxq/formats/ggml.py, kquants.py and iq4.py. A weight is
//
//     w = scale * (q - offset)              w = scale * q - minimum
//
// A block is cut into shares of 32 weights, the work of one lane: four octets, each of 8 weights that follow one
// another. An octet's codes are 8 bytes of two words, in order; the octets of a share are chosen so that they lie in
// the same bytes of the block, at different bits. `groups` octets or runs of octets of a share have their own scale:
// `scales` (and minima) are small integers times the block's `unit`, one or two floats.
//
// Blocks lie at any multiple of `align` bytes: of 2, 4 or 8, by the size of the block. All arithmetic is float and
// exact but for the last subtraction, so weights are bit for bit those of ggml and of formats/ggml.py.
#pragma once
#include "common.h"

/// The loads that blocks allow, from device memory and from threadgroup memory.
#define GGML_LOADS(space)                                                    \
  MLXQ_FUNC uint ggml_byte(const space uchar* p) {                           \
    return *p;                                                               \
  }                                                                          \
  MLXQ_FUNC float ggml_signed(const space uchar* p) {                        \
    return float(*(const space int8_t*)p);                                   \
  }                                                                          \
  MLXQ_FUNC uint ggml_short(const space uchar* p) {                          \
    return *(const space ushort*)p;                                          \
  }                                                                          \
  MLXQ_FUNC float ggml_half(const space uchar* p) {                          \
    return float(*(const space half*)p);                                     \
  }                                                                          \
  template <int align>                                                       \
  MLXQ_FUNC uint ggml_word(const space uchar* p) {                           \
    if constexpr (align >= 4) {                                              \
      return *(const space uint*)p;                                          \
    } else {                                                                 \
      return as_type<uint>(ushort2(ushort(ggml_short(p)), ushort(ggml_short(p + 2))));                       \
    }                                                                        \
  }                                                                          \
  template <int align>                                                       \
  MLXQ_FUNC uint2 ggml_words(const space uchar* p) {                         \
    if constexpr (align >= 8) {                                              \
      return *(const space uint2*)p;                                         \
    } else {                                                                 \
      return uint2(ggml_word<align>(p), ggml_word<align>(p + 4));            \
    }                                                                        \
  }

GGML_LOADS(device)
#ifdef __METAL_VERSION__  // elsewhere they are the same
GGML_LOADS(threadgroup)
#endif

/// Bits `at` and up of each byte, as many as `mask` (of a byte) has.
MLXQ_FUNC uint2 ggml_bits(uint2 w, int at, uint mask) {
  return uint2(w.x >> uint(at) & mask * 0x01010101u, w.y >> uint(at) & mask * 0x01010101u);
}

/// The low four bits of a number, one in each byte.
MLXQ_FUNC uint ggml_spread(uint bits) {
  return (bits & 15u) * 0x00204081u & 0x01010101u;
}

/// What the types share: sizes, and codes that are unsigned bytes.
///
/// `unit` is d and, behind it, dmin (in Q4_1 and Q5_1 m, which is added): byte `d_at` and `d_at` + 2 of the block.
template <int block_, int bytes_, int groups_, int offset_, bool has_min_, int d_at = 0>
struct ggml_block {
  static constant constexpr const int block = block_;         // weights
  static constant constexpr const int bytes = bytes_;         // bytes
  static constant constexpr const int groups = groups_;       // scales of a share
  static constant constexpr const int offset = offset_;       // the code of zero
  static constant constexpr const bool has_min = has_min_;
  static constant constexpr const int align = bytes_ % 8 == 0 ? 8 : bytes_ % 4 == 0 ? 4 : 2;
  static constant constexpr const int shares = block_ / 32;
  /// Shares that follow one another and have their scales in common.
  static constant constexpr const int run = groups_ > 1 ? 2 : 1;
  /// Runs of octets of a share with one scale, and whose codes lie at one bit.
  static constant constexpr const int parts = groups_;
  /// Whether a mask cuts a code out of its word, and leaves it where it is: a number so many bits too large.
  static constant constexpr const bool in_place = true;
  /// The bits of a code in its byte of `words`, less the bit `bit(j)` at which they begin.
  static constant constexpr const uint mask = 255u;

  static MLXQ_FUNC float code(uint word, int i) {
    return float(word >> uint(8 * i) & 255u) - float(offset_);
  }
  static MLXQ_FUNC int bit(int) {
    return 0;
  }
  template <typename P>
  static MLXQ_FUNC float2 unit(P b) {
    return float2(ggml_half(b + d_at), has_min_ ? ggml_half(b + d_at + 2) : 0.0f);
  }
};
