"""TQ1_0 and TQ2_0: codes 0, 1, 2 that stand for -d, 0, d, with one float16 `d` for 256 weights.

    TQ1_0   | qs 48 | qh 4 | d 2 |      TQ2_0   | qs 64 | d 2 |      w = d * (q - 1)

TQ2_0 holds four codes a byte: bits 0-1 those of weights 0 to 31 (then 128 to 159), bits 2-3 of the following 32, and
so on; a fourth code, 3, is 2 d. TQ1_0 holds five codes a byte, as the fraction `0.abcde` in base 3 scaled to 256: times
3^k (modulo 256) it starts with the k-th digit. The first 32 bytes hold digits of 5 x 32 weights, the next 16 of
5 x 16, and `qh` four digits of 4 x 4 (source: `ggml/src/ggml-quants.c`, dequantize_row_tq*).
"""

from __future__ import annotations

import numpy as np

#: The types of this module.
TERNARY_TYPES = ("TQ1_0", "TQ2_0")
#: First byte, bytes, and digits of each byte of TQ1_0's three parts.
_PARTS = ((0, 32, 5), (32, 16, 5), (48, 4, 4))


def unpack(blocks: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Parts of blocks uint8 `[n, type_size]`: `d` float16 `[n]` and codes uint8 `[n, 256]`."""
    n = len(blocks)
    d = np.ascontiguousarray(blocks[:, -2:]).view("<f2").reshape(-1)
    if name == "TQ2_0":
        shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
        return d, (blocks[:, :64].reshape(n, 2, 1, 32) >> shifts & 3).reshape(n, 256)
    parts = []
    for at, width, digits in _PARTS:
        powers = np.array([1, 3, 9, 27, 81][:digits], np.uint8).reshape(1, digits, 1)
        # Bytes wrap: what is before the digit falls away.
        rest = blocks[:, at : at + width].reshape(n, 1, width) * powers
        # The digit is `rest * 3 // 256`.
        parts.append(((rest >= 86).view(np.uint8) + (rest >= 171).view(np.uint8)).reshape(n, -1))
    return d, np.concatenate(parts, axis=1)


def dequantize(blocks: np.ndarray, name: str, out: np.ndarray) -> None:
    """Weights of blocks uint8 `[n, type_size]` into `out` float32 `[n, 256]`, bit for bit as `gguf` decodes."""
    d, codes = unpack(blocks, name)
    np.copyto(out, (codes - np.uint8(1)).view(np.int8))
    with np.errstate(invalid="ignore"):
        out *= d.astype(np.float32)[:, None]
