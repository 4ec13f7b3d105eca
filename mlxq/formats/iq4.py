"""IQ4_NL and IQ4_XS: codes of four bits that index sixteen unevenly spaced values, denser near zero.

`d` is a little-endian float16. A byte of `qs` holds two codes of the same 32 weights: byte `i` weight `i` in its low
nibble, weight `i + 16` in its high nibble. IQ4_XS gives each 32 of its 256 weights a scale of six bits, stored plus
32: the low four in a nibble of `scales_l` (even sub-block low), the upper two in a pair of bits of the uint16
`scales_h` (source: `ggml/src/ggml-common.h`, `ggml-quants.c`, dequantize_row_iq4_*):

             byte 0   1    2     3      4 ...
    IQ4_NL   |  d    |  qs, 16 bytes                                      |   w = d * VALUES[q]
    IQ4_XS   |  d    |  scales_h  |  scales_l, 4 bytes  |  qs, 8 x 16     |   w = d * sc * VALUES[q]

    scales_l byte 0   s1 s1 s1 s1  s0 s0 s0 s0     scales_h   s7 s7  s6 s6 ... s1 s1  s0 s0     (high bit first)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlxq.errors import FormatError
from mlxq.formats.geometry import block_format

#: The value of each code, ascending (`kvalues_iq4nl`).
VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
#: The types of this module.
IQ4_TYPES = ("IQ4_NL", "IQ4_XS")
#: Weights that share a scale.
SUB_BLOCK = 32
#: What is added to a scale of IQ4_XS before it is stored.
SCALE_OFFSET = 32

_VALUES_F32 = VALUES.astype(np.float32)
#: Weights decoded at a time, so that temporaries stay in the second-level cache.
_CHUNK = 1 << 16


@dataclass(frozen=True)
class IQ4Blocks:
    """`n` blocks taken apart: `d` float16 `[n]`; `codes` uint8 `[n, block_size]`, 0 to 15, in the order of the
    weights; `scales` int8 `[n, 8]`, -32 to 31, for IQ4_XS and None for IQ4_NL."""

    d: np.ndarray
    codes: np.ndarray
    scales: np.ndarray | None = None


def unpack(blocks: np.ndarray, name: str) -> IQ4Blocks:
    """The parts of blocks, uint8 `[n, type_size]`.

    Raises:
        FormatError: another type, or an array that is not such blocks.
    """
    _check(blocks, name)
    if blocks.ndim != 2 or blocks.shape[1] != block_format(name).type_size:
        raise FormatError(f"{name}: blocks are [n, {block_format(name).type_size}] bytes, got shape {blocks.shape}")
    d = np.ascontiguousarray(blocks[:, :2]).view("<f2")[:, 0]
    if name == "IQ4_NL":
        return IQ4Blocks(d, _nibbles(blocks[:, 2:]))
    high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16)
    stored = _interleaved(blocks[:, 4:8]) | (high.astype(np.uint8) & 3) << 4
    return IQ4Blocks(d, _nibbles(blocks[:, 8:]), stored.view(np.int8) - np.int8(SCALE_OFFSET))


def pack(parts: IQ4Blocks, name: str) -> np.ndarray:
    """Blocks uint8 `[n, type_size]` of parts: the inverse of `unpack`.

    Raises:
        FormatError: another type, or parts whose shapes or dtypes are not the type's.
    """
    _check_name(name)
    n, size = parts.d.shape[0], block_format(name).block_size
    expected = {"d": (np.float16, (n,)), "codes": (np.uint8, (n, size))}
    if name == "IQ4_XS":
        expected["scales"] = (np.int8, (n, size // SUB_BLOCK))
    for part, (dtype, shape) in expected.items():
        given = getattr(parts, part)
        if given is None or given.dtype != dtype or given.shape != shape:
            found = "None" if given is None else f"{given.dtype} {given.shape}"
            raise FormatError(f"{name}: {part} must be {np.dtype(dtype)} {shape}, got {found}")
    blocks = np.empty((n, block_format(name).type_size), np.uint8)
    blocks[:, :2] = parts.d.astype("<f2").view(np.uint8).reshape(n, 2)
    halves = parts.codes.reshape(n, -1, 2, 16)
    qs = halves[:, :, 1] << 4
    qs |= halves[:, :, 0]
    blocks[:, -qs.shape[1] * 16 :] = qs.reshape(n, -1)
    if name == "IQ4_XS":
        stored = (parts.scales + np.int8(SCALE_OFFSET)).view(np.uint8)
        pairs = (stored >> 4).astype("<u2") << np.arange(0, 16, 2, dtype="<u2")
        blocks[:, 2:4] = np.bitwise_or.reduce(pairs, axis=1).astype("<u2").view(np.uint8).reshape(n, 2)
        blocks[:, 4:8] = stored[:, 0::2] & 0x0F | stored[:, 1::2] << 4
    return blocks


def dequantize(blocks: np.ndarray, name: str) -> np.ndarray:
    """Weights of rows of blocks, bit for bit what `gguf.quants.dequantize` computes.

    Args:
        blocks: uint8 `[..., row_bytes]`, whole blocks.
        name: one of `IQ4_TYPES`.

    Returns:
        float32 `[..., K]`.

    Raises:
        FormatError: another type, a dtype other than uint8, or rows that are not whole blocks.
    """
    _check(blocks, name)
    geometry = block_format(name)
    if not blocks.ndim or blocks.shape[-1] % geometry.type_size:
        raise FormatError(f"{name}: a row is whole blocks of {geometry.type_size} bytes, got shape {blocks.shape}")
    flat = np.ascontiguousarray(blocks).reshape(-1, geometry.type_size)
    out = np.empty((flat.shape[0], geometry.block_size), np.float32)
    step = _CHUNK // geometry.block_size
    for start in range(0, flat.shape[0], step):
        part = unpack(flat[start : start + step], name)
        target = out[start : start + step].reshape(-1, SUB_BLOCK)
        # mode="clip" lets `take` write into `out` without a buffer; codes have four bits and are never clipped.
        np.take(_VALUES_F32, part.codes.reshape(-1, SUB_BLOCK), out=target, mode="clip")
        with np.errstate(invalid="ignore"):
            d = part.d.astype(np.float32)[:, None]
            # Eleven bits of d, six of a scale and eight of a value: every product is exact in float32.
            target *= (d if part.scales is None else d * part.scales).reshape(-1, 1)
    return out.reshape(*blocks.shape[:-1], blocks.shape[-1] // geometry.type_size * geometry.block_size)


def _check_name(name: str) -> None:
    if name not in IQ4_TYPES:
        raise FormatError(f"ggml type {name!r} is not one of {', '.join(IQ4_TYPES)}")


def _check(blocks: np.ndarray, name: str) -> None:
    _check_name(name)
    if blocks.dtype != np.uint8:
        raise FormatError(f"{name}: blocks are uint8 bytes, got {blocks.dtype}")


def _nibbles(qs: np.ndarray) -> np.ndarray:
    """Codes `[n, 2 * bytes]` of bytes `[n, bytes]`: each 16 bytes hold weights i (low) and i + 16 (high)."""
    n = qs.shape[0]
    qs = qs.reshape(n, -1, SUB_BLOCK // 2)
    codes = np.empty((n, qs.shape[1], 2, SUB_BLOCK // 2), np.uint8)
    np.bitwise_and(qs, 0x0F, out=codes[:, :, 0])
    np.right_shift(qs, 4, out=codes[:, :, 1])
    return codes.reshape(n, -1)


def _interleaved(packed: np.ndarray) -> np.ndarray:
    """Nibbles `[n, 2 * bytes]` of bytes `[n, bytes]`, low before high."""
    return np.stack((packed & 0x0F, packed >> 4), axis=2).reshape(packed.shape[0], -1)
