// Codes of affine quantization, w_hat = scale * q + bias, and how a run of them is read.
//
// A row of K codes is K * bits / 32 words, least significant bit first; a code may straddle two words (the layout is
// drawn in mlxq/formats/affine.py). Groups of `group_size` codes share a scale and a bias. K is a multiple of 32, so
// that runs of 8, 16 or 32 codes which fill whole words never cross the end of a row.
#pragma once
#include "common.h"

/// Words of a run of `count` codes.
template <int bits, int count>
constexpr int affine_words() {
  static_assert(count * bits % 32 == 0, "a run of codes fills whole words");
  return count * bits / 32;
}

/// What a lane holds of codes: words; halves where codes are bytes, since a half is a register of its own, and its low
/// byte needs no shift.
template <int bits>
struct affine_piece {
  using type = uint;
};
template <>
struct affine_piece<8> {
  using type = ushort;
};

/// Pieces of a run of `count` codes.
template <int bits, int count>
constexpr int affine_pieces() {
  return affine_words<bits, count>() * 4 / int(sizeof(typename affine_piece<bits>::type));
}

/// Sixteen bytes.
struct affine_halves {
  ushort4 low, high;
};

/// Loads a run of `count` codes, as `load_words` does.
template <int bits, int count>
MLXQ_FUNC void affine_load(const device uint* p, thread typename affine_piece<bits>::type* codes) {
  if constexpr (bits == 8) {
    static_assert(count == 16, "sixteen bytes");
    const affine_halves v = *(const device affine_halves*)p;
    const ushort halves[8] = {v.low.x, v.low.y, v.low.z, v.low.w, v.high.x, v.high.y, v.high.z, v.high.w};
    MLXQ_UNROLL
    for (int i = 0; i < 8; i++) {
      codes[i] = halves[i];
    }
  } else {
    load_words<affine_words<bits, count>()>(p, codes);
  }
}

/// Code `i` of a run. `i` is known when the loop around the call is unrolled, so that this is a shift and a mask.
template <int bits>
MLXQ_FUNC uint affine_code(const thread uint* w, int i) {
  constexpr uint mask = (1u << bits) - 1u;
  const int word = i * bits / 32;
  const int at = i * bits % 32;
  if (at + bits > 32) {
    return ((w[word] >> at) | (w[word + 1] << (32 - at))) & mask;
  }
  return at + bits == 32 ? w[word] >> at : (w[word] >> at) & mask;
}

/// Code `i` of a run as float. Of codes that do not straddle bytes, the same ones of all four bytes of a word are masked
/// together, and converted as bytes.
template <int bits>
MLXQ_FUNC float affine_float(const thread typename affine_piece<bits>::type* w, int i) {
  if constexpr (bits == 8) {
    return i % 2 == 0 ? float(uchar(w[i / 2])) : float(ushort(w[i / 2] >> 8));
  } else if constexpr (8 % bits == 0) {
    constexpr uint mask = ((1u << bits) - 1u) * 0x01010101u;
    const uint of_bytes = (w[i * bits / 32] >> (i * bits % 8)) & mask;
    return float(uchar(of_bytes >> (i * bits % 32 / 8 * 8)));
  } else {
    return float(affine_code<bits>(w, i));
  }
}

/// Whether `affine_masked` leaves code `i` where it lies in its word, multiplied by 2^at: 3, 5 and 6 bits.
template <int bits>
MLXQ_FUNC constexpr bool affine_in_place(int i) {
  return 8 % bits != 0 && i * bits % 32 + bits < 32;
}

/// 2^-at for a code that `affine_masked` leaves in place, else 1.
template <int bits>
MLXQ_FUNC constexpr float affine_place(int i) {
  return affine_in_place<bits>(i) ? 1.0f / float(1u << (i * bits % 32)) : 1.0f;
}

/// Code `i` of a run times 2^at where it ends before its word does: masked, not shifted. The power of two is taken off
/// the other factor, once for many codes (the method of mlx/backend/metal/kernels/quantized.h, there with 16 bits).
template <int bits>
MLXQ_FUNC float affine_masked(const thread typename affine_piece<bits>::type* w, int i) {
  if constexpr (8 % bits != 0) {
    constexpr uint mask = (1u << bits) - 1u;
    if (affine_in_place<bits>(i)) {
      return float(w[i * bits / 32] & (mask << (i * bits % 32)));
    }
  }
  return affine_float<bits>(w, i);
}
