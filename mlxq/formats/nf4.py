"""bitsandbytes' four-bit codes: a table of 16 values times the largest magnitude of a block, which may be coded too.

The matrix is one run of weights, row after row, cut into blocks of `blocksize` (64 by default), which need not end
where rows do. Two codes a byte, the first in the high nibble:

    weight (uint8)    byte i   q(2i) q(2i) q(2i) q(2i)  q(2i+1) q(2i+1) q(2i+1) q(2i+1)       (high bit first)
    absmax            float32, one a block:   w_hat = value[q] * absmax

    double quantization: absmax (uint8) is an index into `nested_quant_map` (float32 `[256]`), and
                      absmax = nested_quant_map[absmax] * nested_absmax[block // nested_blocksize] + nested_offset

NF4's values are quantiles of a normal distribution; FP4's are a float of two exponent bits and one mantissa bit over
12, with one value (0.0625 / 12) that no such float has. All arithmetic is float32, rounded after each step (source:
`bitsandbytes/functional.py` get_4bit_type, dequantize_4bit; `bitsandbytes/backends/default/ops.py`, version 0.50).
"""

from __future__ import annotations

import numpy as np

#: Value of each code, float32 `[16]`.
TABLES = {
    "nf4": np.array(
        [
            -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
            -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
            0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
            0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
        ],
        np.float32,
    ),
    "fp4": np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / np.float32(12),
}  # fmt: skip
#: Weights that may share a magnitude.
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def unpack(packed: np.ndarray) -> np.ndarray:
    """Codes uint8 `[2 n]` of bytes uint8 `[n]`."""
    codes = np.empty((packed.size, 2), np.uint8)
    np.right_shift(packed.reshape(-1), 4, out=codes[:, 0])
    np.bitwise_and(packed.reshape(-1), 0x0F, out=codes[:, 1])
    return codes.reshape(-1)


def magnitudes(
    coded: np.ndarray, table: np.ndarray, nested_absmax: np.ndarray, offset: float, nested_blocksize: int, first: int
) -> np.ndarray:
    """The magnitudes of blocks that are coded themselves, float32 of the shape of `coded`.

    Args:
        coded: uint8 `[n]`, of block `first` and the following.
        table: float32 `[256]`.
        nested_absmax: float32, of all blocks.
        offset: added to all.
        nested_blocksize: blocks that share one of `nested_absmax`.
    """
    values = table[coded]
    values *= nested_absmax[(first + np.arange(coded.size)) // nested_blocksize]
    values += np.float32(offset)
    return values


def dequantize(codes: np.ndarray, absmax: np.ndarray, quant_type: str, blocksize: int, first: int) -> np.ndarray:
    """Weights float32 `[n]` of codes uint8 `[n]`, the first of them at place `first` of its block.

    `absmax` float32 has one for each block that they touch.
    """
    w_hat = TABLES[quant_type][codes]
    w_hat *= np.repeat(absmax, blocksize)[first : first + codes.size]
    return w_hat
