"""MXFP4 and NVFP4: four-bit floats (sign, two exponent bits, one mantissa bit) under a shared scale.

A code indexes `VALUES`, twice the float that the code stands for, so that all are integers; the scales below are
halved to match (source: `ggml/src/ggml-common.h`, block_mxfp4 and block_nvfp4, `ggml-impl.h`, and the OCP Microscaling
specification 1.0):

    MXFP4   | e 1 | qs 16 |          32 weights: scale 2^(e - 127) / 2, no sign, no mantissa
    NVFP4   | e 4 | qs 4 x 8 |       4 x 16 weights: scale a float8 without sign (4 exponent bits, bias 7), / 2

Byte `i` of a group's `qs` holds weight `i` in its low nibble and weight `i + group / 2` in its high nibble.
"""

from __future__ import annotations

import numpy as np

#: Twice the value of each code; code 8 is a negative zero, which ggml reads as 0.
VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
_VALUES_F32 = VALUES.astype(np.float32)
#: The types of this module -> weights that share a scale.
FP4_GROUPS = {"MXFP4": 32, "NVFP4": 16}


def _float8_values() -> np.ndarray:
    """Half the value of each unsigned float8; the top bit is not looked at, and 0x7F stands for 0 instead of NaN."""
    e, m = np.divmod(np.arange(256) & 0x7F, 8)
    values = np.where(e == 0, m * 2.0**-9, (1 + m / 8) * 2.0 ** (e - 7)) / 2
    values[0x7F] = 0
    return values.astype(np.float32)


#: Scale of each stored byte, float32 `[256]`: exact, subnormal numbers included.
SCALES = {"MXFP4": np.ldexp(np.float32(1), np.arange(256) - 128), "NVFP4": _float8_values()}


def unpack(blocks: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Parts of blocks uint8 `[n, type_size]`: scales float32 `[n, groups]` and codes uint8 `[n, groups, group]`."""
    group = FP4_GROUPS[name]
    n_groups = blocks.shape[1] // (1 + group // 2)
    qs = blocks[:, n_groups:].reshape(len(blocks), n_groups, 1, group // 2)
    codes = np.concatenate((qs & 0x0F, qs >> 4), axis=2)
    return SCALES[name][blocks[:, :n_groups]], codes.reshape(len(blocks), n_groups, group)


def dequantize(blocks: np.ndarray, name: str, out: np.ndarray) -> None:
    """Weights of blocks uint8 `[n, type_size]` into `out` float32 `[n, block_size]`, bit for bit as `gguf` decodes."""
    scales, codes = unpack(blocks, name)
    groups = out.reshape(codes.shape)
    # mode="clip" lets `take` write into `out` without a buffer; codes have four bits and are never clipped.
    np.take(_VALUES_F32, codes, out=groups, mode="clip")
    with np.errstate(over="ignore"):
        groups *= scales[:, :, None]
