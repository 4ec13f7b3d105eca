"""ggml block formats: what their bytes mean, decoded to float32 and moved to MLX's affine grid without loss.

One block holds 32 weights. `d` and `m` are little-endian float16; byte `i` of `qs` holds the low four bits of weight
`i` in its low nibble and of weight `i + 16` in its high nibble; bit `j` of the little-endian uint32 `qh` is the fifth
bit of weight `j` (source: `ggml/src/ggml-common.h` and `ggml-quants.c`, dequantize_row_*):

             byte 0   1    2   3    4 ...
    Q4_0     |  d    |  qs, 16 bytes                                     |   w = d * (q - 8)
    Q4_1     |  d    |  m    |  qs, 16 bytes                             |   w = d * q + m
    Q5_0     |  d    |  qh, 4 bytes  |  qs, 16 bytes                     |   w = d * (q - 16)
    Q5_1     |  d    |  m    |  qh, 4 bytes  |  qs, 16 bytes             |   w = d * q + m
    Q8_0     |  d    |  q, 32 signed bytes                               |   w = d * q

    qs byte 0   w16 w16 w16 w16  w0 w0 w0 w0        qs byte 1   w17 w17 w17 w17  w1 w1 w1 w1     (high bit first)

F32, F16 and BF16 are arrays of their elements. All arithmetic is float32.

The affine grid of the same weights, group 32, float16 scales and biases (`w_hat = scales * q + biases`):

    type    bits   q of the grid   scales   biases
    Q4_0    4      q               d        -8 d
    Q4_1    4      q               d        m
    Q5_0    5      q               d        -16 d
    Q5_1    5      q               d        m
    Q8_0    8      q + 128         d        -128 d
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlxq.errors import FormatError
from mlxq.formats.affine import pack
from mlxq.formats.floats import storage_dtype
from mlxq.formats.geometry import block_format
from mlxq.types import FLOAT_BYTES, QuantizedTensor, QuantSpec

_BLOCK = 32
#: Blocks worked on at a time, so that temporaries stay in the second-level cache.
_CHUNK = 1 << 11


@dataclass(frozen=True)
class _Layout:
    """Where a block's parts lie: bits of a code, whether `m` follows `d`, and the code that stands for zero."""

    bits: int
    has_m: bool
    offset: int


_LAYOUTS = {
    "Q4_0": _Layout(4, False, 8),
    "Q4_1": _Layout(4, True, 0),
    "Q5_0": _Layout(5, False, 16),
    "Q5_1": _Layout(5, True, 0),
    "Q8_0": _Layout(8, False, 128),
}

#: The types that `dequantize` reads.
READABLE = (*FLOAT_BYTES, *_LAYOUTS)


def affine_spec(name: str) -> QuantSpec | None:
    """The affine grid that holds a ggml type's weights exactly, or None."""
    layout = _LAYOUTS.get(name)
    return QuantSpec(layout.bits, _BLOCK) if layout else None


def dequantize(blocks: np.ndarray, name: str) -> np.ndarray:
    """Weights of rows of blocks, bit for bit what `gguf.quants.dequantize` computes.

    Args:
        blocks: uint8 `[..., row_bytes]`, whole blocks.
        name: one of `READABLE`.

    Returns:
        float32 `[..., K]`.

    Raises:
        FormatError: unreadable type, a dtype other than uint8, or rows that are not whole blocks.
    """
    flat = _as_blocks(blocks, name)
    K = blocks.shape[-1] // block_format(name).type_size * block_format(name).block_size
    if name in FLOAT_BYTES:
        return _float32(flat, name).reshape(*blocks.shape[:-1], K)
    out = np.empty((flat.shape[0], _BLOCK), np.float32)
    layout = _LAYOUTS[name]
    for start in range(0, flat.shape[0], _CHUNK):
        part, target = flat[start : start + _CHUNK], out[start : start + _CHUNK]
        codes, d, m = _split(part, layout)
        # Signed codes are exact in float32, and so is their product with a float16.
        np.subtract(codes, np.float32(layout.offset), out=target, dtype=np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            target *= d.astype(np.float32)
            if m is not None:
                target += m.astype(np.float32)
    return out.reshape(*blocks.shape[:-1], K)


def to_affine(blocks: np.ndarray, name: str) -> QuantizedTensor:
    """The same weights as MLX affine codes, group 32, with float16 scales and biases: no weight is re-rounded.

    In float32 arithmetic, `scales * q + biases` equals `dequantize` as a number for every block. A code has at most
    8 bits and a float16 11 significant bits, so the product is exact in float32. For Q4_1 and Q5_1 it is the same
    product and sum as ggml's, rounded once. For the others the sum is `d` times a small integer, itself exact in
    float32; only the sign of a zero may differ (`-d * 0` in ggml, `+0` here). In float16 arithmetic, as
    `mx.dequantize` does it, product and sum are each rounded to float16.

    Args:
        blocks: uint8 `[..., row_bytes]`, whole blocks.
        name: one of the types in this module's second table.

    Raises:
        FormatError: a type with no affine grid, rows that are not whole blocks, scales that are not finite, or an
            offset (`-8 d`, `-16 d`, `-128 d`) beyond the largest float16.
    """
    layout = _LAYOUTS.get(name)
    if layout is None:
        raise FormatError(f"ggml type {name!r} has no affine grid: the types that have one are {', '.join(_LAYOUTS)}")
    flat = _as_blocks(blocks, name)
    n_groups = blocks.shape[-1] // block_format(name).type_size
    lead = blocks.shape[:-1]
    codes = np.empty((flat.shape[0], _BLOCK), np.uint8)
    scales, biases = (np.empty((flat.shape[0], 1), np.float16) for _ in range(2))
    for start in range(0, flat.shape[0], _CHUNK):
        part = slice(start, start + _CHUNK)
        codes[part], d, m = _split(flat[part], layout)
        scales[part] = d
        with np.errstate(over="ignore"):
            # A power of two: exact unless it overflows.
            biases[part] = m if m is not None else d * np.float16(-layout.offset)
    _check_finite(name, layout, scales, biases)
    return QuantizedTensor(
        w_q=pack(codes.reshape(*lead, n_groups * _BLOCK), layout.bits),
        scales=scales.reshape(*lead, n_groups),
        biases=biases.reshape(*lead, n_groups),
        spec=QuantSpec(layout.bits, _BLOCK),
        shape=(*lead, n_groups * _BLOCK),
        dtype="F16",
    )


def _as_blocks(blocks: np.ndarray, name: str) -> np.ndarray:
    if name not in READABLE:
        raise FormatError(f"ggml type {name!r} cannot be decoded: the types that can are {', '.join(READABLE)}")
    type_size = block_format(name).type_size
    if blocks.dtype != np.uint8:
        raise FormatError(f"{name}: blocks are uint8 bytes, got {blocks.dtype}")
    if blocks.shape[-1] % type_size:
        raise FormatError(f"{name}: a row is whole blocks of {type_size} bytes, got {blocks.shape[-1]} bytes")
    return np.ascontiguousarray(blocks).reshape(-1, type_size)


def _float32(flat: np.ndarray, name: str) -> np.ndarray:
    if name == "BF16":
        return (flat.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return flat.view(storage_dtype(name).newbyteorder("<")).astype(np.float32)


def _split(flat: np.ndarray, layout: _Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Codes uint8 `[n, 32]` counted from 0, `d` and `m` float16 `[n, 1]` of blocks `[n, type_size]`."""
    d = np.ascontiguousarray(flat[:, :2]).view("<f2")
    at = 2
    m = None
    if layout.has_m:
        m = np.ascontiguousarray(flat[:, 2:4]).view("<f2")
        at = 4
    if layout.bits == 8:
        # Two's complement plus 128 is the sign bit flipped.
        return flat[:, at:] ^ np.uint8(0x80), d, m
    codes = np.empty((flat.shape[0], _BLOCK), np.uint8)
    qs = flat[:, -16:]
    np.bitwise_and(qs, 0x0F, out=codes[:, :16])
    np.right_shift(qs, 4, out=codes[:, 16:])
    if layout.bits == 5:
        high = np.unpackbits(flat[:, at : at + 4], axis=1, bitorder="little")
        high <<= 4
        codes |= high
    return codes, d, m


def _check_finite(name: str, layout: _Layout, scales: np.ndarray, biases: np.ndarray) -> None:
    if not np.isfinite(scales).all():
        raise FormatError(f"{name}: block {int(np.argmin(np.isfinite(scales)))} has a scale that is NaN or infinite")
    if np.isfinite(biases).all():
        return
    block = int(np.argmin(np.isfinite(biases)))
    if layout.has_m:
        raise FormatError(f"{name}: block {block} has a minimum that is NaN or infinite")
    raise FormatError(
        f"{name}: block {block} has scale {scales[block, 0]:g}, and -{layout.offset} times it is beyond the largest "
        "float16 (65504): these weights have no exact affine form, decode and quantize them instead"
    )
