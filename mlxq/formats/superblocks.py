"""The parts of a ggml super-block, and the sub-block geometry of each K type: what packing and searching share.

A super-block holds 256 weights in sub-blocks of 16 or 32 (source: `ggml/src/ggml-common.h`):

    type    sub-blocks   codes   scales        mins    w
    Q2_K    16 of 16     0..3    0..15         0..15   d * sc * q - dmin * m
    Q3_K    16 of 16     0..7    -32..31               d * sc * (q - 4)
    Q4_K     8 of 32     0..15   0..63         0..63   d * sc * q - dmin * m
    Q5_K     8 of 32     0..31   0..63         0..63   d * sc * q - dmin * m
    Q6_K    16 of 16     0..63   -128..127             d * sc * (q - 32)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SUPER_BLOCK = 256


@dataclass(frozen=True)
class SubBlockGeometry:
    """`bits` of a code, `sub_block` weights that share a scale, bits of the scales, whether there are mins.

    `offset` is the code that stands for zero where there are no mins.
    """

    bits: int
    sub_block: int
    scale_bits: int
    has_mins: bool
    offset: int = 0

    @property
    def n_sub_blocks(self) -> int:
        return SUPER_BLOCK // self.sub_block


K_TYPES = {
    "Q2_K": SubBlockGeometry(2, 16, 4, True),
    "Q3_K": SubBlockGeometry(3, 16, 6, False, offset=4),
    "Q4_K": SubBlockGeometry(4, 32, 6, True),
    "Q5_K": SubBlockGeometry(5, 32, 6, True),
    "Q6_K": SubBlockGeometry(6, 16, 8, False, offset=32),
}


@dataclass(frozen=True)
class SuperBlocks:
    """`n` super-blocks taken apart, in the order of the weights.

    `d` float16 `[n]`; `scales` uint8 (int8 for Q3_K and Q6_K) `[n, n_sub_blocks]`; `codes` uint8 `[n, 256]` counted
    from 0; `dmin` float16 `[n]` and `mins` uint8 `[n, n_sub_blocks]`, or None where the type has none.
    """

    d: np.ndarray
    scales: np.ndarray
    codes: np.ndarray
    dmin: np.ndarray | None = None
    mins: np.ndarray | None = None
