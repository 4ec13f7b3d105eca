"""The codebook types, IQ1 to IQ3: codes index tables of vectors of eight (or four) weights.

What the parts are, and where they lie (source: `ggml/src/ggml-common.h`, block_iq*, and `ggml-quants.c`,
dequantize_row_iq*). A box is one field with its bytes, words are little-endian, `idx` is an index into the type's
codebook, `s` a scale of 16 or 32 weights, `sg` the signs of eight weights:

    IQ2_XXS   | d 2 | 8 x (idx 4 x 1, word 4) |         word: s 31-28, four sg of 7 bits     w = d (s + 1/2) / 4 * v
    IQ2_XS    | d 2 | 32 x word 2 | s 8 |               word: sg 15-9, idx 8-0               w = d (s + 1/2) / 4 * v
    IQ2_S     | d 2 | idx 32 | sg 32 | qh 8 | s 8 |     qh: two more bits of each idx        w = d (s + 1/2) / 4 * v
    IQ3_XXS   | d 2 | idx 64 | 8 x word 4 |             word: as in IQ2_XXS                  w = d (s + 1/2) / 2 * v
    IQ3_S     | d 2 | idx 64 | qh 8 | sg 32 | s 4 |     qh: one more bit of each idx         w = d (2 s + 1) * v
    IQ1_S     | d 2 | idx 32 | 8 x word 2 |             word: sign of a 15, s 14-12,
                                                        three more bits of four idx          w = d (2 s + 1) (v + a)
    IQ1_M     | idx 32 | qh 16 | 4 x word 2 |           qh: four bits for each idx, sign of a and three more of idx;
                                                        words: 4 bits of d, four s of 3      w = d (2 s + 1) (v + a)

Seven bits of `sg` are eight signs whose number of minuses is even. Scales of four bits lie two to a byte, low first, as
do `qh`. In IQ1, `a` is plus or minus 1/8. All products are exact in float32.

The codebooks are those that the `gguf` package holds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

#: The types of this module.
CODEBOOK_TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
_SHIFT = np.float32(1 / 8)


class _Parts(NamedTuple):
    """Indices `[n, 32]` (64 in IQ3), scales float32 `[n, 8 or 16]`, signs uint8 `[n, 32]`, one bit a weight."""

    indices: np.ndarray
    scales: np.ndarray
    signs: np.ndarray | None = None


def dequantize(blocks: np.ndarray, name: str, out: np.ndarray) -> None:
    """Weights of blocks uint8 `[n, type_size]` into `out` float32 `[n, 256]`, bit for bit as `gguf` decodes them."""
    with np.errstate(invalid="ignore", over="ignore"):
        indices, scales, signs = _SPLIT[name](blocks)
        # mode="clip" lets `take` write into `out` without a buffer; no index is beyond its codebook.
        codebook = _codebook(name)
        vectors = out.reshape(*indices.shape, codebook.shape[1])
        np.take(codebook, indices, axis=0, out=vectors, mode="clip")
        if signs is not None:
            out *= np.take(_signs(), signs, axis=0, mode="clip").reshape(out.shape)
        groups = out.reshape(*scales.shape, -1)
        groups *= scales[:, :, None]


@cache
def _codebook(name: str) -> np.ndarray:
    """Vectors float32 `[n, 8]` (4 in IQ3). In IQ1 `a` is added already: plus in the first 2048, minus in the others."""
    import gguf

    source = getattr(gguf.quants, name)
    source.init_grid()
    vectors = np.ascontiguousarray(source.grid, np.float32).reshape(source.grid_shape)
    return np.concatenate((vectors + _SHIFT, vectors - _SHIFT)) if name.startswith("IQ1") else vectors


@cache
def _signs() -> np.ndarray:
    """1 or -1 for each bit of each byte, float32 `[256, 8]`."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.where(bits, np.float32(-1), np.float32(1))


@cache
def _even_signs() -> np.ndarray:
    """Eight signs of which an even number is minus, uint8 `[128]`, by the first seven."""
    seven = np.arange(128, dtype=np.uint8)
    odd = np.unpackbits(seven[:, None], axis=1).sum(axis=1, dtype=np.uint8) & np.uint8(1)
    return seven | odd << np.uint8(7)


def _iq2_xxs(blocks: np.ndarray) -> _Parts:
    words = blocks[:, 2:].reshape(len(blocks), 8, 8)
    scales, signs = _scale_and_signs(words[:, :, 4:])
    return _Parts(words[:, :, :4].reshape(-1, 32), _d(blocks) * (scales + np.float32(0.5)) * np.float32(0.25), signs)


def _iq2_xs(blocks: np.ndarray) -> _Parts:
    words = _words(blocks[:, 2:66], "<u2")
    scales = _d(blocks) * (_nibbles(blocks[:, 66:]) + np.float32(0.5)) * np.float32(0.25)
    return _Parts(words & np.uint16(511), scales, _even_signs()[words >> 9])


def _iq2_s(blocks: np.ndarray) -> _Parts:
    indices = _with_high(blocks[:, 2:34], blocks[:, 66:74], 2)
    scales = _d(blocks) * (_nibbles(blocks[:, 74:]) + np.float32(0.5)) * np.float32(0.25)
    return _Parts(indices, scales, blocks[:, 34:66])


def _iq3_xxs(blocks: np.ndarray) -> _Parts:
    scales, signs = _scale_and_signs(blocks[:, 66:].reshape(len(blocks), 8, 4))
    return _Parts(blocks[:, 2:66], _d(blocks) * (scales + np.float32(0.5)) * np.float32(0.5), signs)


def _iq3_s(blocks: np.ndarray) -> _Parts:
    scales = _d(blocks) * (2 * _nibbles(blocks[:, 106:]) + 1)
    return _Parts(_with_high(blocks[:, 2:66], blocks[:, 66:74], 1), scales, blocks[:, 74:106])


def _iq1_s(blocks: np.ndarray) -> _Parts:
    words = _words(blocks[:, 34:], "<u2")
    high = words[:, :, None] >> np.array([0, 3, 6, 9], np.uint16) & np.uint16(7)
    high |= (words >> 15 << 3)[:, :, None]
    indices = high.reshape(-1, 32) << np.uint16(8) | blocks[:, 2:34]
    return _Parts(indices, _d(blocks) * (2 * (words >> 12 & np.uint16(7)) + 1).astype(np.float32))


def _iq1_m(blocks: np.ndarray) -> _Parts:
    words = _words(blocks[:, 48:], "<u2")
    d = np.bitwise_or.reduce((words & np.uint16(0xF000)) >> np.array([12, 8, 4, 0], np.uint16), axis=1)
    scales = words[:, :, None] >> np.array([0, 3, 6, 9], np.uint16) & np.uint16(7)
    scales = (2 * scales + 1).astype(np.float32).reshape(-1, 16)
    indices = _nibbles(blocks[:, 32:48]).astype(np.uint16) << np.uint16(8) | blocks[:, :32]
    return _Parts(indices, d.view(np.float16).astype(np.float32)[:, None] * scales)


_SPLIT: dict[str, Callable[[np.ndarray], _Parts]] = {
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
}


def _d(blocks: np.ndarray) -> np.ndarray:
    """`d` of the types that begin with it, float32 `[n, 1]`."""
    return _words(blocks[:, :2], "<f2").astype(np.float32)


def _words(part: np.ndarray, dtype: str) -> np.ndarray:
    return np.ascontiguousarray(part).view(dtype)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Halves of bytes, low first: uint8 `[n, 2 * bytes]`."""
    return np.stack((packed & np.uint8(15), packed >> np.uint8(4)), axis=2).reshape(len(packed), -1)


def _with_high(low: np.ndarray, high: np.ndarray, bits: int) -> np.ndarray:
    """Indices uint16 of their low bytes and, packed from the lowest bit of each byte on, `bits` more bits."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    more = (high[:, :, None] >> shifts & np.uint8((1 << bits) - 1)).reshape(low.shape)
    return more.astype(np.uint16) << np.uint16(8) | low


def _scale_and_signs(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of uint32 words as bytes `[n, 8, 4]`: the top four bits `[n, 8]`, and signs of 4 x 8 weights, uint8 `[n, 32]`."""
    words = _words(words, "<u4").reshape(len(words), 8)
    signs = words[:, :, None] >> np.array([0, 7, 14, 21], np.uint32) & np.uint32(127)
    return (words >> 28).astype(np.float32), _even_signs()[signs].reshape(-1, 32)
