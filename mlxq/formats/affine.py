"""Affine group quantization, `w_hat = scales * q + biases`: the four primitives, in NumPy.

A method composes `choose_qparams` (or a grid of its own), `quantize`, `pack`, and their inverses `unpack` and
`dequantize`. Composed as they are, codes, scales and biases equal `mx.quantize` on the CPU bit for bit, and
`dequantize` equals `mx.dequantize` (source: `mlx/backend/cpu/quantized.cpp` quantize, `mlx/ops.cpp`
affine_dequantize, mlx 0.32.4).

Bit layout. Codes follow one another from the least significant bit of a row's bytes; a code may straddle bytes and
words. Eight codes fill exactly `bits` bytes. Bits of each byte are drawn most significant first; `c` is the code:

    bits 4   byte 0  c1 c1 c1 c1 c0 c0 c0 c0    byte 1  c3 c3 c3 c3 c2 c2 c2 c2    ...
    bits 2   byte 0  c3 c3 c2 c2 c1 c1 c0 c0    byte 1  c7 c7 c6 c6 c5 c5 c4 c4
    bits 8   byte k  code k
    bits 3   byte 0  c2 c2 c1 c1 c1 c0 c0 c0    byte 1  c5 c4 c4 c4 c3 c3 c3 c2    byte 2  c7 c7 c7 c6 c6 c6 c5 c5
    bits 5   byte 0  c1 c1 c1 c0 c0 c0 c0 c0    byte 1  c3 c2 c2 c2 c2 c2 c1 c1    byte 2  c4 c4 c4 c4 c3 c3 c3 c3
             byte 3  c6 c6 c5 c5 c5 c5 c5 c4    byte 4  c7 c7 c7 c7 c7 c6 c6 c6
    bits 6   byte 0  c1 c1 c0 c0 c0 c0 c0 c0    byte 1  c2 c2 c2 c2 c1 c1 c1 c1    byte 2  c3 c3 c3 c3 c3 c3 c2 c2   ...

Four bytes make one little-endian uint32 word of `w_q`.
"""

from __future__ import annotations

import numpy as np

from mlxq.errors import FormatError
from mlxq.formats.floats import dtype_of, from_float32, to_float32
from mlxq.formats.geometry import OPS_GROUP_SIZES, PACKED_CODES, packed_words, validate_width

#: Weights worked on at a time, so that temporaries stay in the second-level cache.
_CHUNK = 1 << 16
_EPS = np.float32(1e-7)


def choose_qparams(w: np.ndarray, bits: int, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The min/max grid of `mx.quantize`, before it is rounded to the dtype of the weights.

    The end of the range with the larger magnitude becomes the float offset, and the step is adjusted so that 0 lies
    on the grid; the step is negative when that end is the maximum. Groups whose values are all nearly 0 get bias 0.

    The codes of `mx.quantize` come from these float32 values; what is stored is `from_float32` of them. When a
    float32 range `max - min` overflows, the step is infinite, as in mlx: such groups cannot be reconstructed.

    Args:
        w: `[..., K]` in storage of F32, F16 or BF16 (uint16 bits).
        bits: 2, 3, 4, 5, 6 or 8.
        group_size: 16, 32, 64 or 128, dividing `K`; `K` a multiple of 32.

    Returns:
        scales, biases: float32 `[..., K // group_size]`.

    Raises:
        FormatError: illegal bits or group size, or weights that are not finite.
    """
    validate_width(w.shape[-1], bits, group_size, OPS_GROUP_SIZES)
    lead, n_groups = w.shape[:-1], w.shape[-1] // group_size
    w_min, w_max = _group_range(w.reshape(-1, group_size), dtype_of(w))
    if not (np.isfinite(w_min).all() and np.isfinite(w_max).all()):
        raise FormatError(f"weights must be finite, but a tensor of shape {w.shape} holds NaN or infinity")
    n_bins = np.float32((1 << bits) - 1)
    min_is_edge = np.abs(w_min) > np.abs(w_max)
    edge = np.where(min_is_edge, w_min, w_max)
    with np.errstate(over="ignore"):
        step = np.maximum((w_max - w_min) / n_bins, _EPS)
        step = np.where(min_is_edge, step, -step)
        q0 = np.rint(edge / step)
    snapped = q0 != 0
    scales = np.divide(edge, q0, out=step, where=snapped)
    biases = np.where(snapped, edge, np.float32(0))
    return scales.reshape(*lead, n_groups), biases.reshape(*lead, n_groups)


def quantize(w: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int, group_size: int) -> np.ndarray:
    """Nearest code of each weight on a given grid: `clip(rint((w - biases) / scales), 0, 2**bits - 1)`.

    Halves round to even. A group whose scale is 0 or infinite gets code 0.

    Args:
        w: `[..., K]` in storage of F32, F16 or BF16.
        scales, biases: `[..., K // group_size]` in storage of F32, F16 or BF16, computed with as float32.

    Returns:
        uint8 codes `[..., K]`.

    Raises:
        FormatError: illegal bits or group size, or shapes that disagree.
    """
    validate_width(w.shape[-1], bits, group_size, OPS_GROUP_SIZES)
    _check_grid("quantize", w.shape, scales, biases, group_size)
    dtype = dtype_of(w)
    scale, bias = _grid_columns(scales, biases)
    # Dividing by infinity gives code 0, whatever the weight.
    scale = np.where(scale == 0, np.float32(np.inf), scale)
    groups = w.reshape(-1, group_size)
    codes = np.empty(groups.shape, np.uint8)
    top = np.float32((1 << bits) - 1)
    for part in _parts(groups.shape[0], group_size):
        q = np.subtract(to_float32(groups[part], dtype), bias[part])
        np.divide(q, scale[part], out=q)
        np.rint(q, out=q)
        np.clip(q, np.float32(0), top, out=q)
        codes[part] = q
    return codes.reshape(w.shape)


def dequantize(codes: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int, group_size: int) -> np.ndarray:
    """Reconstruction `w_hat = scales * q + biases` in the dtype of the scales, as `mx.dequantize` rounds it.

    The product is rounded to that dtype, then the sum is.

    Args:
        codes: uint8 `[..., K]`.
        scales, biases: `[..., K // group_size]` in storage of F32, F16 or BF16, both the same.

    Returns:
        `[..., K]` in the same storage.

    Raises:
        FormatError: illegal bits or group size, or shapes or dtypes that disagree.
    """
    validate_width(codes.shape[-1], bits, group_size, OPS_GROUP_SIZES)
    _check_grid("dequantize", codes.shape, scales, biases, group_size)
    dtype = dtype_of(scales)
    if dtype_of(biases) != dtype:
        raise FormatError(f"dequantize: scales are {dtype} and biases {dtype_of(biases)}, but must have one dtype")
    scale, bias = _grid_columns(scales, biases)
    groups = codes.reshape(-1, group_size)
    out = np.empty(groups.shape, scales.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        for part in _parts(groups.shape[0], group_size):
            w_hat = np.multiply(groups[part], scale[part], dtype=np.float32)
            if dtype != "F32":
                w_hat = to_float32(from_float32(w_hat, dtype), dtype)
            w_hat += bias[part]
            out[part] = from_float32(w_hat, dtype)
    return out.reshape(codes.shape)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes to uint32 words, least significant bit first along the row (layout: this module's docstring).

    Args:
        codes: uint8 `[..., K]`, each below `2**bits`; `K` a multiple of 32.

    Returns:
        uint32 `[..., K * bits // 32]`.

    Raises:
        FormatError: illegal bits, a `K` that is not a multiple of 32, or a dtype other than uint8.
    """
    K = codes.shape[-1]
    words = _check_row(K, bits)
    if codes.dtype != np.uint8:
        raise FormatError(f"pack takes uint8 codes, got {codes.dtype}")
    lead = codes.shape[:-1]
    # Eight codes in the bytes of one 64-bit word, moved together in three halving steps.
    x = np.ascontiguousarray(codes).reshape(-1, 8).view("<u8").reshape(-1)
    for width, mask in _LANES:
        gap = width - width // 8 * bits
        low = x & np.uint64(mask)
        x = x & ~np.uint64(mask)
        x >>= np.uint64(gap)
        x |= low
    rows = x.astype("<u8", copy=False).view(np.uint8).reshape(-1, 8)[:, :bits]
    return np.ascontiguousarray(rows).reshape(*lead, words * 4).view("<u4")


def unpack(words: np.ndarray, bits: int, K: int) -> np.ndarray:
    """Inverse of `pack`: uint32 words `[..., K * bits // 32]` to uint8 codes `[..., K]`.

    Raises:
        FormatError: illegal bits, or words that do not hold `K` codes.
    """
    n_words = _check_row(K, bits)
    if words.dtype != np.uint32 or words.shape[-1] != n_words:
        raise FormatError(
            f"unpack: {K} codes of {bits} bits are {n_words} uint32 words a row, "
            f"got {words.shape[-1]} of dtype {words.dtype}"
        )
    lead = words.shape[:-1]
    packed = np.ascontiguousarray(words, "<u4").view(np.uint8).reshape(-1, bits)
    spread = np.zeros((packed.shape[0], 8), np.uint8)
    for j in range(bits):
        spread[:, j] = packed[:, j]
    x = spread.view("<u8").reshape(-1)
    for width, mask in reversed(_LANES):
        gap = width - width // 8 * bits
        low = x & np.uint64(_lane_mask(width, width // 8 * bits))
        x ^= low
        x <<= np.uint64(gap)
        x &= ~np.uint64(mask)
        x |= low
    return x.view(np.uint8).reshape(*lead, K)


def _lane_mask(width: int, filled: int) -> int:
    """64-bit mask of the low `filled` bits of every other lane of `width` bits, from the first."""
    return sum(((1 << filled) - 1) << start for start in range(0, 64, 2 * width))


#: Steps of `pack`: lane width in bits, and the mask of the even lanes.
_LANES = tuple((width, _lane_mask(width, width)) for width in (8, 16, 32))


def _check_row(K: int, bits: int) -> int:
    words = packed_words(K, bits)
    if K % PACKED_CODES:
        raise FormatError(f"rows are packed {PACKED_CODES} codes at a time, but the row has {K}")
    return words


def _group_range(groups: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Minimum and maximum of each row of `[n, group_size]`, float32; NaN where a row holds one."""
    n, group_size = groups.shape
    w_min, w_max = np.empty(n, np.float32), np.empty(n, np.float32)
    for part in _parts(n, group_size):
        low = high = to_float32(groups[part], dtype).reshape(-1)
        # Pairs of the flat array: long loops, where a reduction over the short axis takes four times as long.
        for _ in range(group_size.bit_length() - 1):
            low = np.minimum(low[0::2], low[1::2])
            high = np.maximum(high[0::2], high[1::2])
        w_min[part], w_max[part] = low, high
    return w_min, w_max


def _parts(n_groups: int, group_size: int) -> list[slice]:
    step = _CHUNK // group_size
    return [slice(start, start + step) for start in range(0, n_groups, step)]


def _grid_columns(scales: np.ndarray, biases: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return tuple(to_float32(p, dtype_of(p)).reshape(-1, 1) for p in (scales, biases))


def _check_grid(op: str, shape: tuple[int, ...], scales: np.ndarray, biases: np.ndarray, group_size: int) -> None:
    expected = (*shape[:-1], shape[-1] // group_size)
    if scales.shape != expected or biases.shape != expected:
        raise FormatError(
            f"{op}: {shape} weights in groups of {group_size} need scales and biases of shape {expected}, "
            f"got {scales.shape} and {biases.shape}"
        )
