// The types of ggml's blocks, what each adds to `ggml_block`; and weights decoded with their scales.
#pragma once
#include "ggml_block.h"

/// Blocks of 32 weights: one share, octets in order.
template <int bytes_, int offset_, bool has_min_>
struct ggml_block32 : ggml_block<32, bytes_, 1, offset_, has_min_> {
  static MLXQ_FUNC int octet(int, int j) {
    return j;
  }
  static MLXQ_FUNC int share_of(int) {
    return 0;
  }
  static MLXQ_FUNC int index_of(int octet) {
    return octet;
  }
  template <typename P>
  static MLXQ_FUNC void scales(P, int, thread float* scale, thread float* minimum) {
    scale[0] = 1.0f;
    minimum[0] = -1.0f;
  }
};

/// Nibbles of 32 weights in 16 bytes: byte i holds weights i and i + 16.
template <int align, typename P>
MLXQ_FUNC uint2 ggml_nibbles(P qs, int j) {
  return ggml_bits(ggml_words<align>(qs + 8 * (j & 1)), 4 * (j >> 1), 15u);
}

/// What types add whose codes are such nibbles and nothing else, from byte `at` of the block on.
#define GGML_ONLY_NIBBLES(at)                                                \
  static constant constexpr const uint mask = 15u;                           \
  static constant constexpr const int parts = 2;                             \
  static MLXQ_FUNC int bit(int j) {                                          \
    return 4 * (j >> 1);                                                     \
  }                                                                          \
  template <typename P>                                                      \
  static MLXQ_FUNC uint2 words(P b, int share, int j) {                      \
    return ggml_words<align>(b + at + 16 * share + 8 * (j & 1));             \
  }

struct Q4_0 : ggml_block32<18, 8, false> {
  GGML_ONLY_NIBBLES(2)
};

struct Q4_1 : ggml_block32<20, 0, true> {
  GGML_ONLY_NIBBLES(4)
};

struct Q5_0 : ggml_block32<22, 16, false> {
  template <typename P>
  static MLXQ_FUNC uint2 words(P b, int, int j) {
    const uint high = ggml_byte(b + 2 + j);
    return ggml_nibbles<align>(b + 6, j) | uint2(ggml_spread(high) << 4, ggml_spread(high >> 4) << 4);
  }
};

struct Q5_1 : ggml_block32<24, 0, true> {
  template <typename P>
  static MLXQ_FUNC uint2 words(P b, int, int j) {
    const uint high = ggml_byte(b + 4 + j);
    return ggml_nibbles<align>(b + 8, j) | uint2(ggml_spread(high) << 4, ggml_spread(high >> 4) << 4);
  }
};

struct Q8_0 : ggml_block32<34, 0, false> {
  static constant constexpr const bool in_place = false;

  static MLXQ_FUNC float code(uint word, int i) {
    return float(int8_t(word >> uint(8 * i)));
  }
  template <typename P>
  static MLXQ_FUNC uint2 words(P b, int, int j) {
    return ggml_words<align>(b + 2 + 8 * j);
  }
};

/// The values that the codes of IQ4 mean, and what is the same in both of its types.
MLXQ_TABLE constexpr float GGML_IQ4_VALUES[16] = {-127.0f, -104.0f, -83.0f, -65.0f, -49.0f, -35.0f, -22.0f, -10.0f,
                                                  1.0f,    13.0f,   25.0f,  38.0f,  53.0f,  69.0f,  89.0f,  113.0f};

MLXQ_FUNC float ggml_iq4_value(uint word, int i) {
  return GGML_IQ4_VALUES[word >> uint(8 * i) & 15u];
}

struct IQ4_NL : ggml_block32<18, 0, false> {
  static constant constexpr const bool in_place = false;

  static MLXQ_FUNC float code(uint word, int i) {
    return ggml_iq4_value(word, i);
  }
  template <typename P>
  static MLXQ_FUNC uint2 words(P b, int, int j) {
    return ggml_nibbles<align>(b + 2, j);
  }
};

struct IQ4_XS : ggml_block<256, 136, 1, 0, false> {
  static constant constexpr const bool in_place = false;

  static MLXQ_FUNC float code(uint word, int i) {
    return ggml_iq4_value(word, i);
  }
  static MLXQ_FUNC int octet(int share, int j) {
    return 4 * share + j;
  }
  static MLXQ_FUNC int share_of(int octet) {
    return octet / 4;
  }
  static MLXQ_FUNC int index_of(int octet) {
    return octet % 4;
  }
  template <typename P>
  static MLXQ_FUNC uint2 words(P b, int share, int j) {
    return ggml_nibbles<align>(b + 8 + 16 * share, j);
  }
  template <typename P>
  static MLXQ_FUNC void scales(P b, int share, thread float* scale, thread float*) {
    const uint low = ggml_byte(b + 4 + share / 2) >> uint(4 * (share & 1)) & 15u;
    const uint high = ggml_short(b + 2) >> uint(2 * share) & 3u;
    scale[0] = float(low | high << 4) - 32.0f;
  }
};

/// Super-blocks whose byte holds weights 32 apart: share 4 * p + i has octets 16 * p + i, + 4, + 8, + 12. Octet `j` of a
/// share lies in sub-block 8 * p + 2 * j + i / 2 of 16 weights.
template <int bytes_, int offset_, bool has_min_, int d_at>
struct ggml_quarters : ggml_block<256, bytes_, 4, offset_, has_min_, d_at> {
  static MLXQ_FUNC int octet(int share, int j) {
    return share / 4 * 16 + 4 * j + share % 4;
  }
  static MLXQ_FUNC int share_of(int octet) {
    return octet / 16 * 4 + octet % 4;
  }
  static MLXQ_FUNC int index_of(int octet) {
    return octet / 4 % 4;
  }
};

struct Q2_K : ggml_quarters<84, 0, true, 80> {
  static constant constexpr const uint mask = 3u;

  static MLXQ_FUNC int bit(int j) {
    return 2 * j;
  }
  template <typename P>
  static MLXQ_FUNC uint2 words(P b, int share, int) {
    return ggml_words<align>(b + 16 + 8 * share);
  }
  template <typename P>
  static MLXQ_FUNC void scales(P b, int share, thread float* scale, thread float* minimum) {
    const uint2 w = ggml_words<align>(b + share / 4 * 8);
    const uint at = share % 4 / 2 * 8;
    MLXQ_UNROLL
    for (int j = 0; j < 4; j += 2) {
      const uint both = (j == 0 ? w.x : w.y) >> at;
      const float2 low = halves(both & 0x000F000Fu), high = halves(both >> 4 & 0x000F000Fu);
      scale[j] = low.x;
      scale[j + 1] = low.y;
      minimum[j] = high.x;
      minimum[j + 1] = high.y;
    }
  }
};

struct Q3_K : ggml_quarters<110, 4, false, 108> {
  static constant constexpr const uint mask = 7u;

  static MLXQ_FUNC int bit(int j) {
    return 4 * (j >> 1);
  }
  /// Codes of octets j and j ^ 2 in the nibbles of a word: two bits of `low`, and bits j % 2 and j % 2 + 2 of each byte of
  /// `high`, which a product puts at bits 2 and 6 (and elsewhere).
  static MLXQ_FUNC uint nibbles(uint low, uint high, int j) {
    return j % 2 == 0 ? (low & 0x33333333u) | ((high & 0x05050505u) * 20u & 0x44444444u)
                      : (low >> 2 & 0x33333333u) | ((high & 0x0A0A0A0Au) * 10u & 0x44444444u);
  }
  template <typename P>
  static MLXQ_FUNC uint2 words(P b, int share, int j) {
    const uint plane = share / 4 * 4;
    const uint2 low = ggml_words<align>(b + 32 + 8 * share), high = ggml_words<align>(b + 8 * (share % 4));
    return uint2(nibbles(low.x, high.x >> plane, j), nibbles(low.y, high.y >> plane, j));
  }
  /// Six bits each: those of sub-blocks 0 and 2 or 1 and 3 of a word are cut out at once.
  template <typename P>
  static MLXQ_FUNC void scales(P b, int share, thread float* scale, thread float*) {
    const uint2 w = ggml_words<align>(b + 96);
    const uint at = share % 4 / 2 * 8 + share / 4 * 4;
    const uint high = ggml_word<align>(b + 104) >> at;
    const uint six[2] = {(w.x >> at & 0x000F000Fu) | (high & 0x00030003u) << 4,
                         (w.y >> at & 0x000F000Fu) | (high & 0x000C000Cu) << 2};
    MLXQ_UNROLL
    for (int j = 0; j < 4; j += 2) {
      const float2 two = halves(six[j / 2]);
      scale[j] = two.x - 32.0f;
      scale[j + 1] = two.y - 32.0f;
    }
  }
};

struct Q6_K : ggml_quarters<210, 32, false, 208> {
  template <typename P>
  static MLXQ_FUNC uint2 words(P b, int share, int j) {
    const int p = share / 4, i = share % 4;
    const uint2 low = ggml_bits(ggml_words<align>(b + 64 * p + 32 * (j & 1) + 8 * i), 4 * (j >> 1), 15u);
    const uint2 high = ggml_bits(ggml_words<align>(b + 128 + 8 * share), 2 * j, 3u);
    return low | uint2(high.x << 4, high.y << 4);
  }
  template <typename P>
  static MLXQ_FUNC void scales(P b, int share, thread float* scale, thread float*) {
    P first = b + 192 + share / 4 * 8 + share % 4 / 2;
    MLXQ_UNROLL
    for (int j = 0; j < 4; j++) {
      scale[j] = ggml_signed(first + 2 * j);
    }
  }
};

/// Q4_K and Q5_K: a byte of plane p holds weights 64 * p + i and + 32; share 2 * p + h has i = 16 * h to + 15.
template <int bytes_>
struct ggml_halves : ggml_block<256, bytes_, 2, 0, true> {
  static MLXQ_FUNC int octet(int share, int j) {
    return share / 2 * 8 + 4 * (j >> 1) + share % 2 * 2 + (j & 1);
  }
  static MLXQ_FUNC int share_of(int octet) {
    return octet / 8 * 2 + octet % 4 / 2;
  }
  static MLXQ_FUNC int index_of(int octet) {
    return octet % 8 / 4 * 2 + octet % 2;
  }
  /// Scales and mins of the two sub-blocks of plane p: six bits each, in two bytes of each of the three words.
  template <typename P>
  static MLXQ_FUNC void scales(P b, int share, thread float* scale, thread float* minimum) {
    const int p = share / 2;
    P six = b + 4 + 2 * (p & 1);
    uint both = both_halves(ggml_short(six), ggml_short(six + 4));
    if (p < 2) {
      both &= 0x3F3F3F3Fu;
    } else {
      const uint low = ggml_short(six + 8);
      both = (both_halves(low, low >> 4) & 0x0F0F0F0Fu) | (both & 0xC0C0C0C0u) >> 2;
    }
    const float2 first = halves(both & 0x00FF00FFu), second = halves(both >> 8 & 0x00FF00FFu);
    scale[0] = first.x;
    scale[1] = second.x;
    minimum[0] = first.y;
    minimum[1] = second.y;
  }
};

struct Q4_K : ggml_halves<144> {
  GGML_ONLY_NIBBLES(16)
};

struct Q5_K : ggml_halves<176> {
  template <typename P>
  static MLXQ_FUNC uint2 words(P b, int share, int j) {
    const uint2 high = ggml_words<align>(b + 16 + 16 * (share % 2) + 8 * (j & 1));
    const uint plane = share / 2 * 2;
    const uint2 bits = ggml_bits(uint2(high.x >> plane, high.y >> plane), j >> 1, 1u);
    return ggml_nibbles<align>(b + 48 + 16 * share, j) | uint2(bits.x << 4, bits.y << 4);
  }
};

/// The codes of octet `j` of a share, a byte each.
template <typename Q, typename P>
MLXQ_FUNC uint2 ggml_codes(P block, int share, int j) {
  const uint2 w = Q::words(block, share, j);
  return Q::mask == 255u ? w : ggml_bits(w, Q::bit(j), Q::mask);
}

/// Scales and minima of a share.
template <typename Q, typename P>
MLXQ_FUNC void ggml_scales(P block, int share, thread float* scale, thread float* minimum) {
  const float2 unit = Q::unit(block);
  Q::scales(block, share, scale, minimum);
  MLXQ_UNROLL
  for (int g = 0; g < Q::groups; g++) {
    scale[g] *= unit.x;
    if (Q::has_min) {
      minimum[g] *= unit.y;
    }
  }
}

/// The eight weights of octet `j` of a share, given the share's scales.
template <typename Q, typename P>
MLXQ_FUNC void ggml_decode(P block, int share, int j, thread const float* scale, thread const float* minimum,
                           thread float* w) {
  const uint2 q = ggml_codes<Q>(block, share, j);
  const int g = j * Q::groups / 4;
  MLXQ_UNROLL
  for (int i = 0; i < 8; i++) {
    w[i] = Q::code(i < 4 ? q.x : q.y, i & 3) * scale[g];
    if (Q::has_min) {
      w[i] -= minimum[g];
    }
  }
}

/// Decode share number `at` of all blocks of `w` to `out`, rounded to `T` once. One thread a share.
template <typename T, typename Q>
MLXQ_FUNC void ggml_dequantize(const device uchar* w, device T* out, uint at) {
  const device uchar* block = w + ulong(at / Q::shares) * Q::bytes;
  device T* y = out + ulong(at / Q::shares) * Q::block;
  const int share = at % Q::shares;
  float scale[Q::groups], minimum[Q::groups];
  ggml_scales<Q>(block, share, scale, minimum);
  MLXQ_UNROLL
  for (int j = 0; j < 4; j++) {
    float v[8];
    ggml_decode<Q>(block, share, j, scale, minimum, v);
    device T* octet = y + 8 * Q::octet(share, j);
    store4(octet, float4(v[0], v[1], v[2], v[3]));
    store4(octet + 4, float4(v[4], v[5], v[6], v[7]));
  }
}
