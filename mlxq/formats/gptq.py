"""GPTQ's layout: integer codes and zero points in int32 words, `w = scales * (q - zero_points)`.

Codes of a matrix `[N, K]` are packed down the columns of `qweight` `[K * bits / 32, N]`: one output feature a column,
the codes of its inputs one after another from the least significant bit. A column is a row of MLX's packed weight, word
by word, for every width; 3-bit codes straddle words as they do there (`affine.py`). Most significant bits first:

    bits 4   word 0 of column n   q7 q6 q5 q4 q3 q2 q1 q0, four bits each
    bits 3   word 0   q10 q10 q9 q9 q9 ... q1 q1 q1 q0 q0 q0        (the two low bits of q10)
             word 1   q21 q20 q20 q20 ... q11 q11 q11 q10           (its high bit; the low bit of q21)
             word 2   q31 q31 q31 ... q22 q22 q22 q21 q21

Zero points are packed in the same way along the rows of `qzeros` `[n_groups, N * bits / 32]`. Version 1 (`gptq`) stores
`z - 1`, version 2 (`gptq_v2`) `z`. Version 1 has no zero point of 0: AutoGPTQ's packer fills the rest of the word with
ones then. GPTQModel subtracts 1 from each field of the whole word, borrows included, and adds it again when it reads (3
bits: each field alone, modulo 8), so files of its own come back as they were.

Sources: `qlinear_cuda.py` of AutoGPTQ; `nn_modules/qlinear/__init__.py`, `utils/model.py` and `utils/model_dequant.py`
of GPTQModel 7.
"""

from __future__ import annotations

import numpy as np

from mlxq.errors import FormatError
from mlxq.formats import affine

BITS = (2, 3, 4, 8)
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def pack_weight(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes uint8 `[N, K]` (K a multiple of 32) as `qweight`, int32 `[K * bits / 32, N]`."""
    return np.ascontiguousarray(affine.pack(codes, bits).T).view(np.int32)


def unpack_weight(qweight: np.ndarray, bits: int) -> np.ndarray:
    """`qweight` int32 `[K * bits / 32, N]` as codes, uint8 `[N, K]`."""
    return unpack_words(np.ascontiguousarray(qweight.T), bits)


def pack_zero_points(zero_points: np.ndarray, bits: int, version: int) -> np.ndarray:
    """Zero points uint8 `[n_groups, N]` (N codes fill whole words) as `qzeros`, int32 `[n_groups, N * bits / 32]`.

    Raises:
        FormatError: a zero point that the version cannot hold.
    """
    low = 1 if version == 1 else 0
    if zero_points.size and not low <= zero_points.min() <= zero_points.max() < (1 << bits) + low:
        raise FormatError(
            f"zero points of {bits}-bit GPTQ version {version} lie in {low} to {(1 << bits) - 1 + low}, got "
            f"{zero_points.min()} to {zero_points.max()}"
        )
    stored = (zero_points - low).astype(np.uint8)
    n = stored.shape[1]
    padded = np.zeros((len(stored), -(-n // 32) * 32), np.uint8)
    padded[:, :n] = stored
    return np.ascontiguousarray(affine.pack(padded, bits)[:, : n * bits // 32]).view(np.int32)


def unpack_zero_points(qzeros: np.ndarray, bits: int, version: int, *, borrows: bool = False) -> np.ndarray:
    """`qzeros` int32 `[n_groups, N * bits / 32]` as zero points, uint16 `[n_groups, N]`.

    Args:
        borrows: version 1 as GPTQModel writes it, whose fields borrow from one another.

    Raises:
        FormatError: a field of version 1 that would stand for `2**bits`, beyond the range of the codes.
    """
    if version == 2:
        return unpack_words(qzeros, bits).astype(np.uint16)
    if borrows and bits in _ONES:
        words = np.ascontiguousarray(qzeros).view(np.uint32) + np.uint32(_ONES[bits])
        return unpack_words(words, bits).astype(np.uint16)
    zero_points = unpack_words(qzeros, bits).astype(np.uint16) + 1
    top = np.uint16(1 << bits)
    if borrows:
        return zero_points % top
    if zero_points.size and zero_points.max() == top:
        raise FormatError(
            f"a zero point is {top}, beyond the {bits}-bit codes: GPTQ's version 1 cannot store 0, and its packer "
            "spoils the words where it would have to; the group cannot be known"
        )
    return zero_points


def unpack_words(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes of rows of 32-bit words, least significant bit first: `[n, m]` to uint8 `[n, m * 32 / bits]`.

    Rows need not be whole runs of 32 codes; bits that make no whole code are dropped.
    """
    n, m = words.shape
    padded = np.zeros((n, -(-m // bits) * bits), np.uint32)
    padded[:, :m] = np.ascontiguousarray(words).view(np.uint32)
    return affine.unpack(padded, bits, padded.shape[1] * 32 // bits)[:, : m * 32 // bits]
