"""ggml block formats: what their bytes mean, decoded to float32 and moved to MLX's affine grid without loss.

`dequantize` decodes every type of `geometry.BLOCK_FORMATS`. Super-blocks are in `kquants`, the others in `iq4`,
`iquants`, `fp4` and `ternary`; here are the floats, and the types whose block is 32 weights under one scale. Their `d`
and `m` are little-endian float16; byte `i` of `qs` holds the low four bits of weight `i` in its low nibble and of
weight `i + 16` in its high nibble; bit `j` of the little-endian uint32 `qh` is the fifth bit of weight `j` (source:
`ggml/src/ggml-common.h` and `ggml-quants.c`, dequantize_row_*):

             byte 0   1    2   3    4 ...
    Q4_0     |  d    |  qs, 16 bytes                                     |   w = d * (q - 8)
    Q4_1     |  d    |  m    |  qs, 16 bytes                             |   w = d * q + m
    Q5_0     |  d    |  qh, 4 bytes  |  qs, 16 bytes                     |   w = d * (q - 16)
    Q5_1     |  d    |  m    |  qh, 4 bytes  |  qs, 16 bytes             |   w = d * q + m
    Q8_0     |  d    |  q, 32 signed bytes                               |   w = d * q

    qs byte 0   w16 w16 w16 w16  w0 w0 w0 w0        qs byte 1   w17 w17 w17 w17  w1 w1 w1 w1     (high bit first)

F32, F16 and BF16 are arrays of their elements. All arithmetic is float32.

MXFP4 and NVFP4 are MLX's modes mxfp4 and nvfp4 in another order (`float_modes.from_blocks`).
Some types are an affine grid (`w_hat = scales * q + biases`) of the same weights; `v` is a value of a table, `sc` and
`m` scale and min of a sub-block. The float type is the smallest that holds all scales and biases of the type:

    type          bits  group  q of the grid   scales  biases      float type
    Q4_0          4     32     q               d       -8 d        F16
    Q4_1          4     32     q               d       m           F16
    Q5_0          5     32     q               d       -16 d       F16
    Q5_1          5     32     q               d       m           F16
    Q8_0          8     32     q + 128         d       -128 d      F16
    Q4_K          4     32     q               d sc    -dmin m     F32
    Q5_K          5     32     q               d sc    -dmin m     F32
    IQ4_NL        8     32     v + 128         d       -128 d      F16
    IQ4_XS        8     32     v + 128         d sc    -128 d sc   F32
    TQ1_0, TQ2_0  2     128    q               d       -d          F16
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mlxq.errors import FormatError
from mlxq.formats import float_modes, fp4, iq4, iquants, kquants, ternary
from mlxq.formats.affine import pack
from mlxq.formats.floats import storage_dtype, to_float32
from mlxq.formats.geometry import BLOCK_FORMATS, block_format
from mlxq.formats.superblocks import K_TYPES
from mlxq.types import DTYPE_NAMES, FLOAT_BYTES, QuantizedTensor, QuantSpec

_BLOCK = 32
#: Weights worked on at a time, so that temporaries stay in the second-level cache.
_CHUNK = 1 << 16
#: The types that `dequantize` reads: all that have a geometry.
READABLE = tuple(BLOCK_FORMATS)


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


class _Parts(NamedTuple):
    """Blocks as an affine grid: codes uint8 `[n, block_size]`, scales and biases `[n, block_size // group_size]`."""

    codes: np.ndarray
    scales: np.ndarray
    biases: np.ndarray


@dataclass(frozen=True)
class _Grid:
    """The affine grid of a type: its last table row in this module's docstring, and what computes it."""

    spec: QuantSpec
    scales_dtype: str
    split: Callable[[np.ndarray, str], _Parts]


def affine_spec(name: str) -> QuantSpec | None:
    """The grid of MLX that holds a ggml type's weights exactly, or None: affine, or a float mode."""
    return _MODES[name] if name in _MODES else _GRIDS[name].spec if name in _GRIDS else None


def affine_scales_dtype(name: str) -> str | None:
    """The float type (`F16`, `BF16`, `F32`) that holds the scales and biases of `affine_spec(name)`, or None."""
    return _GRIDS[name].scales_dtype if name in _GRIDS else None


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
    geometry = block_format(name)
    shape = (*blocks.shape[:-1], blocks.shape[-1] // geometry.type_size * geometry.block_size)
    if name in FLOAT_BYTES:
        return _float32(flat, name).reshape(shape)
    if name in iq4.IQ4_TYPES:
        return iq4.dequantize(flat, name).reshape(shape)
    decode = _decoder(name)
    out = np.empty((flat.shape[0], geometry.block_size), np.float32)
    for part in _chunks(flat.shape[0], geometry.block_size):
        decode(flat[part], name, out[part])
    return out.reshape(shape)


def to_affine(blocks: np.ndarray, name: str) -> QuantizedTensor:
    """The same weights as MLX's codes: no weight is re-rounded.

    In float32 arithmetic, `scales * q + biases` equals `dequantize` as a number for every block. A code has at most
    8 bits, a float16 11 significant bits and a product of one with a 6-bit scale 17, multiplied by codes of at most 5
    bits (or a value of a table, 8 bits, after 16 of IQ4_XS's scales): the product is exact in float32. For the types
    with mins it is the same product and sum as ggml's, rounded once. For the others the sum is the scale times a small
    integer, itself exact; only the sign of a zero may differ (`-d * 0` in ggml, `+0` here). In the arithmetic of
    float16 scales, as `mx.dequantize` does it, product and sum are each rounded to float16.

    Args:
        blocks: uint8 `[..., row_bytes]`, whole blocks.
        name: one of the types in this module's second table, MXFP4 or NVFP4.

    Raises:
        FormatError: a type with no affine grid, rows that are not whole blocks, scales that are not finite, or an
            offset (`-8 d` and the like) beyond the largest number of its float type.
    """
    if name in _MODES:
        return _to_mode(_as_blocks(blocks, name), blocks.shape, name)
    grid = _GRIDS.get(name)
    if grid is None:
        raise FormatError(f"ggml type {name!r} has no affine grid: the types that have one are {', '.join(_GRIDS)}")
    flat = _as_blocks(blocks, name)
    geometry, spec = block_format(name), grid.spec
    n_groups = geometry.block_size // spec.group_size
    codes = np.empty((flat.shape[0], geometry.block_size), np.uint8)
    scales, biases = (np.empty((flat.shape[0], n_groups), storage_dtype(grid.scales_dtype)) for _ in range(2))
    for part in _chunks(flat.shape[0], geometry.block_size):
        codes[part], scales[part], biases[part] = grid.split(flat[part], name)
    _check_finite(name, grid, scales, biases)
    lead, n_blocks = blocks.shape[:-1], blocks.shape[-1] // geometry.type_size
    K = n_blocks * geometry.block_size
    return QuantizedTensor(
        w_q=pack(codes.reshape(*lead, K), spec.bits),
        scales=scales.reshape(*lead, n_blocks * n_groups),
        biases=biases.reshape(*lead, n_blocks * n_groups),
        spec=spec,
        shape=(*lead, K),
        dtype=grid.scales_dtype,
    )


def _chunks(n_blocks: int, block_size: int) -> list[slice]:
    step = _CHUNK // block_size
    return [slice(start, start + step) for start in range(0, n_blocks, step)]


def _decoder(name: str) -> Callable[[np.ndarray, str, np.ndarray], object]:
    """What writes the weights of a few blocks `[n, type_size]` into float32 `[n, block_size]`."""
    families = ((_LAYOUTS, _dequantize_simple), (K_TYPES, kquants.dequantize), (fp4.FP4_GROUPS, fp4.dequantize))
    families += ((ternary.TERNARY_TYPES, ternary.dequantize), (iquants.CODEBOOK_TYPES, iquants.dequantize))
    return next(decode for types, decode in families if name in types)


def _dequantize_simple(blocks: np.ndarray, name: str, out: np.ndarray) -> None:
    layout = _LAYOUTS[name]
    codes, d, m = _split(blocks, layout)
    # Signed codes are exact in float32, and so is their product with a float16.
    np.subtract(codes, np.float32(layout.offset), out=out, dtype=np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        out *= d.astype(np.float32)
        if m is not None:
            out += m.astype(np.float32)


def _simple_grid(blocks: np.ndarray, name: str) -> _Parts:
    layout = _LAYOUTS[name]
    codes, d, m = _split(blocks, layout)
    return _Parts(codes, d, m if layout.has_m else _times(d, -layout.offset))


def _super_block_grid(blocks: np.ndarray, name: str) -> _Parts:
    parts = kquants.unpack(blocks, name)
    with np.errstate(invalid="ignore"):
        return _Parts(parts.codes, kquants.products(parts.d, parts.scales), -kquants.products(parts.dmin, parts.mins))


def _iq4_grid(blocks: np.ndarray, name: str) -> _Parts:
    parts = iq4.unpack(blocks, name)
    with np.errstate(invalid="ignore"):
        scales = parts.d[:, None] if parts.scales is None else kquants.products(parts.d, parts.scales)
    # A signed byte plus 128 is its sign bit flipped.
    return _Parts((iq4.VALUES.view(np.uint8) ^ np.uint8(0x80))[parts.codes], scales, _times(scales, -128))


def _to_mode(flat: np.ndarray, shape: tuple[int, ...], name: str) -> QuantizedTensor:
    spec = _MODES[name]
    w_q, scales = float_modes.from_blocks(flat, spec.mode)
    if name == "NVFP4":
        if (scales == 0xFF).any():
            raise FormatError("a scale is 255, which ggml reads as 480: more than E4M3 holds")
        # What ggml makes of the other bytes: no sign, and 0 for NaN.
        scales[scales == 0x7F] = 0
        scales &= 0x7F
    float_modes.check(w_q, scales, spec.mode)
    w_q, scales = (a.reshape(*shape[:-1], -1) for a in (w_q, scales))
    return QuantizedTensor(w_q, scales, None, spec, (*shape[:-1], scales.shape[-1] * spec.group_size), spec.mode)


def _ternary_grid(blocks: np.ndarray, name: str) -> _Parts:
    d, codes = ternary.unpack(blocks, name)
    scales = np.repeat(d[:, None], 2, axis=1)
    return _Parts(codes, scales, -scales)


def _times(scales: np.ndarray, n: int) -> np.ndarray:
    """Scales times a power of two in their own dtype: exact unless it overflows."""
    with np.errstate(over="ignore", invalid="ignore"):
        return scales * scales.dtype.type(n)


_MODES = {"MXFP4": QuantSpec(4, 32, "mxfp4"), "NVFP4": QuantSpec(4, 16, "nvfp4")}
_GRIDS = {name: _Grid(QuantSpec(x.bits, _BLOCK), "F16", _simple_grid) for name, x in _LAYOUTS.items()}
_GRIDS |= {
    "Q4_K": _Grid(QuantSpec(4, 32), "F32", _super_block_grid),
    "Q5_K": _Grid(QuantSpec(5, 32), "F32", _super_block_grid),
    "IQ4_NL": _Grid(QuantSpec(8, 32), "F16", _iq4_grid),
    "IQ4_XS": _Grid(QuantSpec(8, 32), "F32", _iq4_grid),
    "TQ1_0": _Grid(QuantSpec(2, 128), "F16", _ternary_grid),
    "TQ2_0": _Grid(QuantSpec(2, 128), "F16", _ternary_grid),
}


def _as_blocks(blocks: np.ndarray, name: str) -> np.ndarray:
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


def _check_finite(name: str, grid: _Grid, scales: np.ndarray, biases: np.ndarray) -> None:
    n_groups = block_format(name).block_size // grid.spec.group_size
    finite = [np.isfinite(to_float32(a, grid.scales_dtype)).reshape(-1) for a in (scales, biases)]
    if not finite[0].all():
        block = int(np.argmin(finite[0])) // n_groups
        raise FormatError(f"{name}: block {block} has a scale that is NaN or infinite")
    if finite[1].all():
        return
    group = int(np.argmin(finite[1]))
    block = group // n_groups
    if name in K_TYPES or (name in _LAYOUTS and _LAYOUTS[name].has_m):
        raise FormatError(f"{name}: block {block} has a minimum that is NaN or infinite")
    scale = float(to_float32(scales, grid.scales_dtype).reshape(-1)[group])
    raise FormatError(
        f"{name}: block {block} has scale {scale:g}, and its offset is beyond the largest "
        f"{DTYPE_NAMES[grid.scales_dtype]}: these weights have no exact affine form, decode and quantize them instead"
    )
