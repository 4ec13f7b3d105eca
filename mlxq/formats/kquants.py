"""ggml's K types: super-blocks taken apart, put together, and decoded.

What the parts mean is in `superblocks`; this is where they lie (source: `ggml/src/ggml-common.h`, block_q2_K to
block_q6_K, and `ggml-quants.c`, dequantize_row_*). One box is one field of the block, with its bytes:

    Q2_K    | sc, m 16 | qs 64 | d 2 | dmin 2 |
    Q3_K    | qh 32 | qs 64 | sc 12 | d 2 |
    Q4_K    | d 2 | dmin 2 | sc, m 12 | qs 128 |
    Q5_K    | d 2 | dmin 2 | sc, m 12 | qh 32 | qs 128 |
    Q6_K    | qs 128 | qh 64 | sc 16 | d 2 |

Codes lie in planes. `lane` bytes hold the same bits of `lane` weights after one another, the lowest bits those of the
first `lane` weights, the next ones those of the following `lane` weights; then come the next `lane` bytes:

    bits of a byte, high first        lane   byte i of plane p holds
    Q2_K, Q3_K qs   33 22 11 00       32     bits 0-1 of weights 128 p + i, + 32, + 64, + 96
    Q4_K, Q5_K qs   1111 0000         32     bits 0-3 of weights 64 p + i, + 32
    Q6_K qs         1111 0000         64     bits 0-3 of weights 128 p + i, + 64
    Q6_K qh         33 22 11 00       32     bits 4-5 of weights 128 p + i, + 32, + 64, + 96
    Q3_K, Q5_K qh   7 6 5 4 3 2 1 0   32     bit 2 (Q3_K) or 4 (Q5_K) of weights i, + 32, ... + 224

Scales and mins. Q2_K: byte j is `mmmm ssss` of sub-block j. Q6_K: byte j is the scale of sub-block j, signed. The
others spread six bits over 12 bytes, here three words of four bytes; `sI` are bits of the scale of sub-block I (in Q3_K
counted from -32), `mI` of its min, and the word's byte j has J = j, j + 4, j + 8, j + 12 as its sub-blocks:

                   word 0 (byte j)        word 1                   word 2
    Q4_K, Q5_K     s(j+4)5-4  s(j)5-0     m(j+4)5-4  m(j)5-0       m(j+4)3-0  s(j+4)3-0
    Q3_K           s(j+8)3-0  s(j)3-0     s(j+12)3-0  s(j+4)3-0    s(j+12)5-4  s(j+8)5-4  s(j+4)5-4  s(j)5-4
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlxq.errors import FormatError
from mlxq.formats.geometry import block_format
from mlxq.formats.superblocks import K_TYPES, SUPER_BLOCK, SuperBlocks

#: Super-blocks worked on at a time, so that temporaries stay in the second-level cache.
_CHUNK = 1 << 8


@dataclass(frozen=True)
class Plane:
    """`n_bytes` at byte `at` of the block that hold `bits` bits of each code, from its bit `shift` on."""

    at: int
    n_bytes: int
    bits: int
    shift: int
    lane: int


@dataclass(frozen=True)
class Layout:
    """Byte offsets of a block's fields, and where the bits of its codes lie."""

    d: int
    scales: int
    planes: tuple[Plane, ...]
    dmin: int | None = None


LAYOUTS = {
    "Q2_K": Layout(80, 0, (Plane(16, 64, 2, 0, 32),), dmin=82),
    "Q3_K": Layout(108, 96, (Plane(32, 64, 2, 0, 32), Plane(0, 32, 1, 2, 32))),
    "Q4_K": Layout(0, 4, (Plane(16, 128, 4, 0, 32),), dmin=2),
    "Q5_K": Layout(0, 4, (Plane(48, 128, 4, 0, 32), Plane(16, 32, 1, 4, 32)), dmin=2),
    "Q6_K": Layout(208, 192, (Plane(0, 128, 4, 0, 64), Plane(128, 64, 2, 4, 32))),
}


def unpack(blocks: np.ndarray, name: str) -> SuperBlocks:
    """Take super-blocks apart; no value is computed, so `pack` gives the same bytes back, whatever they are.

    Args:
        blocks: uint8 `[n, type_size]`.
        name: `Q2_K`, `Q3_K`, `Q4_K`, `Q5_K` or `Q6_K`.

    Raises:
        FormatError: another type, or blocks of another dtype or size.
    """
    _check(blocks, name)
    layout = LAYOUTS[name]
    codes = np.empty((len(blocks), SUPER_BLOCK), np.uint8)
    for part in _chunks(len(blocks)):
        _unpack_codes(blocks[part], layout, codes[part])
    scales, mins = _unpack_scales(blocks, name)
    dmin = None if layout.dmin is None else _float16(blocks, layout.dmin)
    return SuperBlocks(_float16(blocks, layout.d), scales, codes, dmin, mins)


def pack(parts: SuperBlocks, name: str) -> np.ndarray:
    """Put super-blocks together: the inverse of `unpack`.

    Args:
        parts: shapes and dtypes as `SuperBlocks` says, values within the ranges of the type (`superblocks`).
        name: as in `unpack`.

    Returns:
        uint8 `[n, type_size]`.

    Raises:
        FormatError: another type; parts of other shapes or dtypes, missing, or beyond their ranges.
    """
    _check_parts(parts, name)
    layout = LAYOUTS[name]
    blocks = np.empty((len(parts.d), block_format(name).type_size), np.uint8)
    for part in _chunks(len(blocks)):
        _pack_codes(parts.codes[part], layout, blocks[part])
    _pack_scales(parts, name, blocks)
    for values, at in ((parts.d, layout.d), (parts.dmin, layout.dmin)):
        if values is not None:
            blocks[:, at : at + 2] = np.ascontiguousarray(values, "<f2").view(np.uint8).reshape(-1, 2)
    return blocks


def dequantize(blocks: np.ndarray, name: str, out: np.ndarray | None = None) -> np.ndarray:
    """Weights of super-blocks, bit for bit what ggml and `gguf.quants.dequantize` compute.

    `d * sc` and `dmin * m` have at most 11 + 7 significant bits and their products with a code at most 6 more, so all
    are exact in float32; only the difference of the two terms is rounded, once.

    Args:
        blocks: uint8 `[n, type_size]`.
        name: as in `unpack`.
        out: float32 `[n, 256]`, contiguous, to write to; made when None.

    Returns:
        float32 `[n, 256]`.

    Raises:
        FormatError: another type, or blocks of another dtype or size.
    """
    _check(blocks, name)
    geometry, layout = K_TYPES[name], LAYOUTS[name]
    if out is None:
        out = np.empty((len(blocks), SUPER_BLOCK), np.float32)
    room = np.empty((min(_CHUNK, len(blocks)), SUPER_BLOCK), np.uint8)
    for part in _chunks(len(blocks)):
        b, w = blocks[part], out[part]
        codes = room[: len(b)]
        _unpack_codes(b, layout, codes)
        codes -= np.uint8(geometry.offset)
        # As signed bytes the codes count from the one that stands for 0.
        np.copyto(w, codes.view(np.int8))
        steps, offsets = scales(b, name)
        groups = w.reshape(len(b), geometry.n_sub_blocks, geometry.sub_block)
        with np.errstate(invalid="ignore"):
            groups *= steps[:, :, None]
            if offsets is not None:
                groups -= offsets[:, :, None]
    return out


def scales(blocks: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Scales and mins of the sub-blocks of blocks uint8 `[n, type_size]`, float32 `[n, n_sub_blocks]`: `w = scale * q -
    min` with q counted from the code that stands for 0. Exact; mins are None where the type has none."""
    layout = LAYOUTS[name]
    steps, mins = _unpack_scales(blocks, name)
    with np.errstate(invalid="ignore"):
        return (
            products(_float16(blocks, layout.d), steps),
            None if mins is None else products(_float16(blocks, layout.dmin), mins),
        )


def products(d: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """`d * scales` in float32, `[n, n_sub_blocks]`: scales (or mins) of the sub-blocks. Exact."""
    out = scales.astype(np.float32)
    out *= d.astype(np.float32)[:, None]
    return out


def _chunks(n: int) -> list[slice]:
    return [slice(start, min(start + _CHUNK, n)) for start in range(0, n, _CHUNK)]


def _float16(blocks: np.ndarray, at: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").reshape(-1)


def _unpack_codes(blocks: np.ndarray, layout: Layout, out: np.ndarray) -> None:
    """Codes of a few blocks into uint8 `[n, 256]`.

    Bits are moved over whole planes, and lanes then copied as one item each: loops over short rows would cost more.
    """
    for plane in layout.planes:
        packed = np.ascontiguousarray(blocks[:, plane.at : plane.at + plane.n_bytes])
        target = out if plane.shift == 0 else np.empty_like(out)
        lanes = _lanes(target, plane)
        mask = np.uint8((1 << plane.bits) - 1 << plane.shift)
        for k in range(8 // plane.bits):
            moved = _shift(packed, plane.shift - k * plane.bits)
            moved &= mask
            lanes[:, :, k] = moved.view(f"V{plane.lane}").reshape(lanes.shape[:2])
        if target is not out:
            out |= target


def _pack_codes(codes: np.ndarray, layout: Layout, blocks: np.ndarray) -> None:
    codes = np.ascontiguousarray(codes)
    for plane in layout.planes:
        lanes = _lanes(codes, plane)
        packed = np.zeros((len(codes), plane.n_bytes), np.uint8)
        mask = np.uint8((1 << plane.bits) - 1)
        for k in range(8 // plane.bits):
            values = np.ascontiguousarray(lanes[:, :, k]).view(np.uint8).reshape(packed.shape)
            moved = _shift(values, -plane.shift)
            moved &= mask
            packed |= _shift(moved, k * plane.bits)
        blocks[:, plane.at : plane.at + plane.n_bytes] = packed


def _lanes(codes: np.ndarray, plane: Plane) -> np.ndarray:
    """Codes `[n, 256]` as `[n, lanes of bytes, lanes of codes in each]`, every item `lane` bytes."""
    return codes.view(f"V{plane.lane}").reshape(len(codes), -1, 8 // plane.bits)


def _shift(a: np.ndarray, left: int) -> np.ndarray:
    """A copy of bytes moved up by `left` bits, or down."""
    return np.left_shift(a, np.uint8(left)) if left >= 0 else np.right_shift(a, np.uint8(-left))


def _bytes(a: int) -> np.uint32:
    """A word of four equal bytes."""
    return np.uint32(a * 0x01010101)


def _words(blocks: np.ndarray, at: int) -> list[np.ndarray]:
    """Three words of four bytes each. All that follows is masked by bytes, so their order does not matter."""
    words = np.ascontiguousarray(blocks[:, at : at + 12]).view(np.uint32)
    return [np.ascontiguousarray(words[:, i]) for i in range(3)]


def _joined(words: list[np.ndarray]) -> np.ndarray:
    return np.stack(words, axis=1).view(np.uint8)


def _unpack_scales(blocks: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    at = LAYOUTS[name].scales
    if name == "Q2_K":
        both = np.ascontiguousarray(blocks[:, at : at + 16])
        return both & np.uint8(0x0F), both >> np.uint8(4)
    if name == "Q6_K":
        return blocks[:, at : at + 16].copy().view(np.int8), None
    a, b, c = _words(blocks, at)
    low, two = _bytes(0x0F), _bytes(0x30)
    if name == "Q3_K":
        words = [a & low | c << 4 & two, b & low | c << 2 & two, a >> 4 & low | c & two, b >> 4 & low | c >> 2 & two]
        return (_joined(words) - np.uint8(32)).view(np.int8), None
    six = _bytes(0x3F)
    scales = [a & six, c & low | a >> 2 & two]
    mins = [b & six, c >> 4 & low | b >> 2 & two]
    return _joined(scales), _joined(mins)


def _pack_scales(parts: SuperBlocks, name: str, blocks: np.ndarray) -> None:
    at = LAYOUTS[name].scales
    scales = np.ascontiguousarray(parts.scales).view(np.uint8)
    if name == "Q2_K":
        blocks[:, at : at + 16] = scales | parts.mins << np.uint8(4)
    elif name == "Q6_K":
        blocks[:, at : at + 16] = scales
    else:
        low, two = _bytes(0x0F), _bytes(0x30)
        if name == "Q3_K":
            s0, s1, s2, s3 = (scales + np.uint8(32)).view(np.uint32).T
            top = s0 >> 4 & _bytes(0x03) | s1 >> 2 & _bytes(0x0C) | s2 & two | s3 << 2 & _bytes(0xC0)
            words = [s0 & low | (s2 & low) << 4, s1 & low | (s3 & low) << 4, top]
        else:
            (s0, s1), (m0, m1) = scales.view(np.uint32).T, np.ascontiguousarray(parts.mins).view(np.uint32).T
            words = [s0 | (s1 & two) << 2, m0 | (m1 & two) << 2, s1 & low | (m1 & low) << 4]
        blocks[:, at : at + 12] = _joined(words)


def _check(blocks: np.ndarray, name: str) -> None:
    if name not in K_TYPES:
        raise FormatError(f"ggml type {name!r} has no super-blocks: the types that do are {', '.join(K_TYPES)}")
    size = block_format(name).type_size
    if blocks.dtype != np.uint8 or blocks.ndim != 2 or blocks.shape[1] != size:
        raise FormatError(f"{name}: blocks are uint8 [n, {size}], got {blocks.dtype} {list(blocks.shape)}")


def _check_parts(parts: SuperBlocks, name: str) -> None:
    if name not in K_TYPES:
        raise FormatError(f"ggml type {name!r} has no super-blocks: the types that do are {', '.join(K_TYPES)}")
    g = K_TYPES[name]
    n, unsigned, signed = len(parts.d), np.dtype(np.uint8), np.dtype(np.int8)
    half, top = np.dtype(np.float16), 1 << (g.scale_bits - 1)
    scales = (unsigned, 0, 2 * top - 1) if g.has_mins else (signed, -top, top - 1)
    expected = {"d": ((n,), half, None, None), "codes": ((n, SUPER_BLOCK), unsigned, 0, (1 << g.bits) - 1)}
    expected["scales"] = ((n, g.n_sub_blocks), *scales)
    if g.has_mins:
        expected |= {"dmin": ((n,), half, None, None), "mins": ((n, g.n_sub_blocks), *scales)}
    for part, (shape, dtype, least, most) in expected.items():
        a = getattr(parts, part)
        if a is None or a.shape != shape or a.dtype != dtype:
            got = "none" if a is None else f"{a.dtype} {list(a.shape)}"
            raise FormatError(f"{name}: {part} must be {dtype} {list(shape)}, got {got}")
        if least is not None and a.size and (a.min() < least or a.max() > most):
            raise FormatError(f"{name}: {part} must lie in {least} to {most}, got {a.min()} to {a.max()}")
    if not g.has_mins and not (parts.dmin is None and parts.mins is None):
        raise FormatError(f"{name}: has no mins, but dmin or mins are given")
