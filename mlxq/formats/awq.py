"""AWQ's layouts of 4-bit codes, each as it lies in the file, and as MLX's packed words.

A weight is `[N, K]`; codes are drawn most significant first, `n0 k0` the code of row 0, column 0.

GEMM (AutoAWQ's default). `qweight` int32 `[K, N / 8]`: a word holds one column's codes of eight rows, in the order
0 2 4 6 1 3 5 7 from the least significant bit; `qzeros` `[n_groups, N / 8]` alike, and `scales` `[n_groups, N]`:

    word [k, 0]   n7 n5 n3 n1 n6 n4 n2 n0

GEMV. `qweight` int32 `[N, K / 8]`, eight columns of a row in order, which is MLX's own word; `qzeros` `[N, width]`, a
row's groups in order, and `scales` `[N, 8 * width]`, both padded to the width of `zeros_width`:

    word [n, 0]   k7 k6 k5 k4 k3 k2 k1 k0

GEMV-fast, and llm-awq of today. `qweight` int16 `[N / 4, K]`: 64 columns of four rows are 64 words that hold first all
of row 0, then row 1 ..., four columns a word; each 32 columns in the order of `_FAST_ORDER`. `scales` and, instead of
zero points, the biases `-scales * z` as floats (`qzeros`, in llm-awq `scaled_zeros`) are `[8 * width, N]`, padded:

    word [0, 0]   n0 k24  n0 k16  n0 k8  n0 k0      word [0, 1]   n0 k25  n0 k17  n0 k9  n0 k1
    word [0, 2]   n0 k26  n0 k18  n0 k10 n0 k2      word [0, 16]  n1 k24  n1 k16  n1 k8  n1 k0

Sources: `awq/modules/linear/{gemm,gemv,gemv_fast}.py` and `awq/utils/packing_utils.py` of AutoAWQ 0.2.9;
`awq/quantize/qmodule.py` of llm-awq.
"""

from __future__ import annotations

import numpy as np

from mlxq.errors import FormatError
from mlxq.formats import affine

BITS = 4
#: Row of a GEMM word's codes, the least significant first.
GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
#: Rows and columns that the words of the fast layout interleave.
FAST_ROWS, FAST_COLUMNS = 4, 64
#: Steps of `_transpose_codes`: how far apart the words are, and the codes of a word that stay.
_SWAPS = ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F))


def zeros_width(n_groups: int, group_size: int) -> int:
    """Words that hold the zero points of a row in GEMV's layout: groups of 64 come in pairs of words, 32 in fours."""
    words = -(-n_groups // 8)
    multiple = 1 if group_size >= 128 else 2 if group_size == 64 else 4
    return -(-words // multiple) * multiple


def pack_gemm(codes: np.ndarray) -> np.ndarray:
    """uint8 `[a, b]`, b a multiple of 8, as int32 `[a, b / 8]` in GEMM's order (codes transposed, or zero points)."""
    eights = codes.reshape(len(codes), -1, 8).astype(np.uint32)
    words = np.zeros(eights.shape[:2], np.uint32)
    for i, row in enumerate(GEMM_ORDER):
        words |= eights[:, :, row] << np.uint32(4 * i)
    return words.view(np.int32)


def unpack_gemm(words: np.ndarray) -> np.ndarray:
    """Inverse of `pack_gemm`: int32 `[a, b / 8]` as uint8 `[a, b]`."""
    words = np.ascontiguousarray(words).view(np.uint32)
    out = np.empty((*words.shape, 8), np.uint8)
    for i, row in enumerate(GEMM_ORDER):
        out[:, :, row] = (words >> np.uint32(4 * i)) & np.uint32(15)
    return out.reshape(len(words), -1)


def gemm_to_rows(columns: np.ndarray) -> np.ndarray:
    """Transposed columns of a GEMM `qweight`, int32 `[n / 8, K]`, as MLX's words, uint32 `[n, K / 8]`.

    Raises:
        FormatError: K is no multiple of 8.
    """
    n_words, K = columns.shape
    if K % 8:
        raise FormatError(f"rows of {K} codes of 4 bits do not fill words")
    squares = np.ascontiguousarray(columns).view(np.uint32).reshape(n_words, K // 8, 8)
    out = np.empty((n_words, 8, K // 8), np.uint32)
    for i, words in enumerate(_transpose_codes([squares[:, :, j].copy() for j in range(8)])):
        out[:, GEMM_ORDER[i]] = words
    return out.reshape(8 * n_words, K // 8)


def _transpose_codes(words: list[np.ndarray]) -> list[np.ndarray]:
    """Eight arrays of words: code i of word j becomes code j of word i. Blocks of codes change places, 4 x 4 first."""
    for step, mask in _SWAPS:
        shift, stay = np.uint32(4 * step), np.uint32(mask)
        for j in range(8):
            if j & step:
                continue
            low, high = words[j], words[j + step]
            change = low >> shift
            change ^= high
            change &= stay
            high ^= change
            change <<= shift
            low ^= change
    return words


def pack_fast(codes: np.ndarray) -> np.ndarray:
    """Codes uint8 `[N, K]` (multiples of 4 and 64) as the fast layout's `qweight`, int16 `[N / 4, K]`.

    Raises:
        FormatError: N or K is no such multiple.
    """
    N, K = codes.shape
    _check_fast(N, K)
    # Within 32 columns: 8 j + 2 i + b goes to place 8 i + 4 b + j.
    x = codes.reshape(N, K // 32, 4, 4, 2).transpose(0, 1, 3, 4, 2)
    x = x.reshape(N // 4, 4, K // 64, 64).transpose(0, 2, 1, 3).reshape(N // 4, K, 4).astype(np.uint16)
    words = x[:, :, 0] | (x[:, :, 1] << 4) | (x[:, :, 2] << 8) | (x[:, :, 3] << 12)
    return words.view(np.int16)


def unpack_fast(qweight: np.ndarray) -> np.ndarray:
    """Inverse of `pack_fast`: int16 `[n / 4, K]` as codes, uint8 `[n, K]`."""
    quarter, K = qweight.shape
    N = 4 * quarter
    _check_fast(N, K)
    words = np.ascontiguousarray(qweight).view(np.uint16)
    x = np.empty((quarter, K, 4), np.uint8)
    for i in range(4):
        x[:, :, i] = (words >> np.uint16(4 * i)) & np.uint16(15)
    x = x.reshape(quarter, K // 64, 4, 64).transpose(0, 2, 1, 3).reshape(N, K // 32, 4, 2, 4)
    return np.ascontiguousarray(x.transpose(0, 1, 4, 2, 3)).reshape(N, K)


def fast_to_rows(qweight: np.ndarray) -> np.ndarray:
    """The fast layout's `qweight`, int16 `[n / 4, K]`, as MLX's words, uint32 `[n, K / 8]`."""
    return affine.pack(unpack_fast(qweight), BITS)


def _check_fast(N: int, K: int) -> None:
    if N % FAST_ROWS or K % FAST_COLUMNS:
        raise FormatError(
            f"a matrix of {N} x {K} codes is no whole number of blocks of {FAST_ROWS} x {FAST_COLUMNS}, which this AWQ"
            " layout interleaves"
        )
