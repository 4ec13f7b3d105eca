"""Eight-bit floats and the weights that are made of them: E4M3 codes, E8M0 exponents, FP8 under float scales.

Bits, most significant first, `s` sign, `e` exponent, `m` mantissa (sources: OCP 8-bit Floating Point Specification 1.0
and OCP Microscaling Formats 1.0; `mlx/backend/metal/kernels/fp8.h` decodes the same):

    E4M3   s e e e e m m m    (-1)^s 2^(e - 7) (1 + m / 8); e = 0: (-1)^s 2^-6 m / 8; 0x7F and 0xFF are NaN; at most 448
    E8M0   e e e e e e e e    2^(e - 127), no sign, no zero; 0xFF is NaN

FP8 checkpoints store E4M3 codes `[N, K]` in rows, one byte a weight, and float scales; `w_hat = scale * code` in
float32 (DeepSeek-V3 `inference/kernel.py` weight_dequant; compressed-tensors `quantization/lifecycle/forward.py`):

    scales      of             scale of row n, column k     named
    [] or [1]   the tensor     scales                       weight_scale
    [N, 1]      a row          scales[n, 0]                 weight_scale
    [R, C]      128 x 128      scales[n // 128, k // 128]   weight_scale_inv (no inverse, in spite of its name)

Blocks at the lower and right edge may be cut: R = ceil(N / 128), C = ceil(K / 128).
"""

from __future__ import annotations

import numpy as np

from mlxq.errors import FormatError

#: Code of E4M3 that is NaN, whatever its sign; code of E8M0 that is.
E4M3_NAN = 0x7F
E8M0_NAN = 0xFF
#: Codes decoded at a time, so that temporaries stay in the second-level cache.
_CHUNK = 1 << 16


def _e4m3_values() -> np.ndarray:
    codes = np.arange(256)
    e, m = codes >> 3 & 15, codes & 7
    values = np.where(e == 0, m * 2.0**-9, (1 + m / 8) * 2.0 ** (e - 7))
    values[codes & 0x7F == E4M3_NAN] = np.nan
    return np.where(codes & 0x80, -values, values).astype(np.float32)


#: Value of each code, float32 `[256]`.
E4M3 = _e4m3_values()
E8M0 = np.ldexp(np.float32(1), np.minimum(np.arange(256), 254) - 127)
E8M0[E8M0_NAN] = np.nan


def has_nan(codes: np.ndarray) -> bool:
    """Whether one of E4M3 `codes`, uint8 of any shape, is NaN."""
    flat = codes.reshape(-1)
    return any(bool(((flat[start : start + _CHUNK] & 0x7F) == E4M3_NAN).any()) for start in range(0, flat.size, _CHUNK))


def check_scales(scales: np.ndarray, what: str = "scales") -> None:
    """Refuse scales (float32, any shape) that are zero, negative, infinite or NaN.

    Raises:
        FormatError: with the first such value.
    """
    wrong = ~(np.isfinite(scales) & (scales > 0))
    if wrong.any():
        raise FormatError(f"{what} must be positive and finite, but one is {scales[wrong].flat[0]}")


def block_grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of weights `[..., N, K]` in blocks of `block` rows and columns, cut ones counted."""
    *lead, N, K = shape
    return (*lead, -(-N // block[0]), -(-K // block[1]))


def spread(scales: np.ndarray, shape: tuple[int, ...], block: tuple[int, int], first_row: int = 0) -> np.ndarray:
    """The scale of each weight of some rows: a view or copy that broadcasts to `shape`.

    Args:
        scales: float32 `[..., R, C]`, one for each block.
        shape: `[..., rows, K]` of the weights, the rows beginning with row `first_row` of the tensor.
        block: rows and columns of a block.
    """
    rows = (first_row + np.arange(shape[-2])) // block[0]
    return np.repeat(scales[..., rows, :], block[1], axis=-1)[..., : shape[-1]]


def dequantize(codes: np.ndarray, scales: np.ndarray, block: tuple[int, int], first_row: int = 0) -> np.ndarray:
    """`scales * codes` in float32 `[rows, K]`.

    Args:
        codes: E4M3 as uint8 `[rows, K]`, the rows beginning with row `first_row` of the tensor.
        scales: float32 `[R, C]`, of the whole tensor.
        block: rows and columns that share a scale.

    Raises:
        FormatError: a code is NaN.
    """
    if has_nan(codes):
        raise FormatError("an E4M3 code is NaN (0x7F or 0xFF)")
    w_hat = np.take(E4M3, codes)
    if codes.shape[1] % block[1]:
        w_hat *= spread(scales, codes.shape, block, first_row)
    else:
        groups = w_hat.reshape(len(codes), -1, block[1])
        groups *= scales[(first_row + np.arange(len(codes))) // block[0], :, None]
    return w_hat
