"""Products with matrices in ggml blocks, in NumPy: parts are decoded while they are in the cache, BLAS multiplies them.

Rows of weights are decoded, 8 MB of them or for one row of x what stays in the cache, and multiplied at once. For few
rows of x (one, mostly) and K types not even float weights are made:

    y[n] = sum over sub-blocks g of  scale[n, g] * (codes[n, g] . x[g])  -  min[n, g] * sum(x[g])

- Codes are cut out as bytes, 32 at a time, and never interleaved: 32 weights that follow one another lie at the same
  bits of 32 bytes that do (`kquants.LAYOUTS`). These lanes of all blocks are copied behind one another, once; then
  every step is one loop over 64-bit words of eight codes.
- Bytes become float32, which is exact, and each sub-block is one small product `[rows, 16 or 32] @ [16 or 32, M]`; its
  scale multiplies the sum instead of every weight.

Measured with one row of x on a Xeon core that was not idle, in ns a weight: Q6_K 0.75, Q4_K 0.65 (float16 weights 1.1;
decoding alone, by `formats.ggml`, 1.8). Two threads were no faster there: steps of 10 us hand the interpreter's lock to
and fro.
"""

from __future__ import annotations

import threading

import numpy as np

from mlxq.formats import ggml, kquants
from mlxq.formats.geometry import block_format
from mlxq.formats.superblocks import K_TYPES, SUPER_BLOCK

#: Up to this many rows of x, sub-blocks are multiplied one by one.
_FEW_ROWS = 16
#: Weight rows of a part: longer small products would be split by BLAS over threads that wait for each other.
_PART_ROWS = 256
#: Weights of a part: 1 MB of float32, half of a second-level cache.
_PART = 1 << 18
#: Weights decoded for one product with several rows of x: 8 MB of float32.
_WIDE_PART = 1 << 21
#: Bytes of a lane: weights that follow one another, at the same bits of bytes that do.
_LANE = 32


def matmul(x: np.ndarray, blocks: np.ndarray, name: str) -> np.ndarray:
    """`x @ w.T` for weights in blocks.

    Args:
        x: float32 `[M, K]`.
        blocks: uint8 `[N, row_bytes]`, rows of whole blocks.
        name: their ggml type.

    Returns:
        float32 `[M, N]`.
    """
    M, K = x.shape
    y = np.empty((M, blocks.shape[0]), np.float32)
    blocks = np.ascontiguousarray(blocks)
    if not y.size or not K:
        y[...] = 0
    elif M <= _FEW_ROWS and name in K_TYPES:
        operand = _Operand(x, name)
        for rows in _row_parts(len(blocks), _PART_ROWS):
            _super_block_product(operand, blocks[rows], name, y[:, rows])
    else:
        # A product of two matrices ends with BLAS's threads waiting for each other, so few and large ones.
        part = _PART if M == 1 else _WIDE_PART
        for rows in _row_parts(len(blocks), max(part // K, 1)):
            np.matmul(x, ggml.dequantize(blocks[rows], name).T, out=y[:, rows])
    return y


class _Operand:
    """x as the small products need it.

    Attributes:
        lanes: float32 `[8, n_blocks, sub-blocks of a lane, sub-block, M]`.
        sums: float32 `[n_blocks * sub-blocks of a block, M]` sums over each sub-block, for types with mins.
    """

    def __init__(self, x: np.ndarray, name: str):
        geometry = K_TYPES[name]
        S = geometry.sub_block
        split = x.T.reshape(-1, SUPER_BLOCK // _LANE, _LANE // S, S, x.shape[0])
        self.lanes = np.ascontiguousarray(split.swapaxes(0, 1))
        self.sums = x.T.reshape(-1, S, x.shape[0]).sum(axis=1) if geometry.has_mins else None


def _super_block_product(x: _Operand, blocks: np.ndarray, name: str, y: np.ndarray) -> None:
    """`y[...] = x @ w.T` for some rows of K-type blocks `[R, row_bytes]`; y float32 `[M, R]`."""
    geometry, type_size = K_TYPES[name], block_format(name).type_size
    R = len(blocks)
    blocks = blocks.reshape(R, -1, type_size)
    total = np.zeros((R, y.shape[0]), np.float32)
    step = max(_PART // (SUPER_BLOCK * R), 1)
    for start in range(0, blocks.shape[1], step):
        part = slice(start, start + step)
        b = blocks[:, part]
        flat = np.ascontiguousarray(b).reshape(-1, type_size)
        codes = _codes(b, name)
        sub_blocks = codes.reshape(*codes.shape[:3], -1, geometry.sub_block).swapaxes(2, 3)
        # [lanes, blocks, sub-blocks of a lane, R, M], and a scale for each of their rows.
        sums = sub_blocks @ x.lanes[:, part]
        scales, mins = kquants.scales(flat, name)
        sums *= scales.reshape(R, -1, *sums.shape[0:3:2]).transpose(2, 1, 3, 0)[..., None]
        total += sums.sum(axis=(0, 1, 2))
        if mins is not None:
            n = geometry.n_sub_blocks
            total -= mins.reshape(R, -1) @ x.sums[start * n : (start + step) * n]
    y[...] = total.T


class _Scratch(threading.local):
    """Buffers of a thread, kept: fresh memory for every part would cost as much as what is done with it."""

    def __init__(self) -> None:
        self.packed = np.empty(_PART // _LANE, f"V{_LANE}")
        self.words, self.moved = np.empty((2, _PART // 8), np.uint64)
        self.codes = np.empty(_PART, np.float32)


_scratch = _Scratch()


def _codes(blocks: np.ndarray, name: str) -> np.ndarray:
    """Codes of blocks `[R, n, type_size]`, counted from the one that stands for 0: float32 `[8, n, R, 32]`.

    At most `_PART` of them, in a buffer that the thread's next call overwrites.
    """
    R, n, _ = blocks.shape
    lanes, words_in_lane = SUPER_BLOCK // _LANE, n * R * _LANE // 8
    words = _scratch.words[: lanes * words_in_lane].reshape(lanes, words_in_lane)
    for plane in kquants.LAYOUTS[name].planes:
        packed = _lanes(blocks, plane.at, plane.n_bytes).view(np.uint64).reshape(-1, plane.lane // _LANE, words_in_lane)
        per_byte = 8 // plane.bits
        target = words.reshape(len(packed), per_byte, *packed.shape[1:])
        mask = np.uint64(((1 << plane.bits) - 1 << plane.shift) * 0x0101010101010101)
        room = _scratch.moved[: packed.size].reshape(packed.shape)
        for k in range(per_byte):
            # What a shift moves over the end of a byte the mask takes away.
            left, moved = plane.shift - k * plane.bits, packed
            if left:
                moved = (np.left_shift if left > 0 else np.right_shift)(packed, np.uint64(abs(left)), out=room)
            if plane.shift:
                target[:, k] |= np.bitwise_and(moved, mask, out=room)
            else:
                np.bitwise_and(moved, mask, out=target[:, k])
    signed = words.view(np.uint8)
    if K_TYPES[name].offset:
        signed -= np.uint8(K_TYPES[name].offset)
    codes = _scratch.codes[: signed.size].reshape(signed.shape)
    np.copyto(codes, signed.view(np.int8))
    return codes.reshape(lanes, n, R, _LANE)


def _lanes(blocks: np.ndarray, at: int, n_bytes: int) -> np.ndarray:
    """Bytes `at` to `at + n_bytes` of each block `[R, n, type_size]`, as items of 32 bytes `[n_bytes / 32, n, R]`."""
    R, n, _ = blocks.shape
    row, block, _ = blocks.strides
    field = blocks[:, :, at : at + n_bytes]
    items = np.lib.stride_tricks.as_strided(field, (n_bytes // _LANE, n, R, _LANE), (_LANE, block, row, 1))
    packed = _scratch.packed[: n_bytes // _LANE * n * R].reshape(-1, n, R)
    np.copyto(packed, items.view(packed.dtype)[..., 0])
    return packed


def _row_parts(n_rows: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]
