"""The modes of MLX whose codes are small floats: mxfp4, mxfp8 and nvfp4, decoded in NumPy.

A group of weights shares one byte, its scale; there are no biases. `w_hat = scale * value of the code`, exact in
float32 (sources: `mlx/ops.cpp` fp_quantize, `mlx/backend/cpu/quantized.cpp`, mlx 0.32.4; the OCP Microscaling Formats
specification 1.0 for the MX formats):

    mode    group  code                        scale, uint8       bits a weight
    mxfp4   32     E2M1, 4 bits: s e e m       E8M0: 2^(e - 127)  4.25
    mxfp8   32     E4M3, 8 bits                E8M0               8.25
    nvfp4   16     E2M1, 4 bits                E4M3, no sign      4.5

    codes of E2M1   0  1    2  3    4  5  6  7, and 8 to 15 the same, negative
    values          0  0.5  1  1.5  2  3  4  6

Codes are packed as affine ones (`affine.pack`): `w_q` uint32, from the least significant bit along the row. So byte `i`
of a row of four-bit codes holds weight `2 i` in its low nibble and weight `2 i + 1` in its high nibble, which is how
gpt-oss (`_blocks`), ModelOpt and compressed-tensors store them too; ggml's blocks keep weights `i` and `i + group / 2`
together instead (`fp4`).

NVFP4 checkpoints have another float32 scale for the whole tensor, which MLX's layers do not take.
"""

from __future__ import annotations

import numpy as np

from mlxq.errors import FormatError
from mlxq.formats import fp4
from mlxq.formats.affine import pack, unpack
from mlxq.formats.float8 import E4M3, E8M0, E8M0_NAN, has_nan
from mlxq.formats.geometry import FLOAT_MODES
from mlxq.types import QuantizedTensor

#: Value of each four-bit code, float32 `[16]`; code 8 is a negative zero.
E2M1 = fp4.VALUES.astype(np.float32) / 2
E2M1[8] = -0.0
_VALUES = {4: E2M1, 8: E4M3}
_SCALES = {"E8M0": E8M0, "E4M3": E4M3}
#: Weights decoded at a time, so that temporaries stay in the second-level cache.
_CHUNK = 1 << 16
#: The mode that is a ggml type of the same codes and scales.
GGML_TYPES = {"mxfp4": "MXFP4", "nvfp4": "NVFP4"}


def scale_values(scales: np.ndarray, mode: str) -> np.ndarray:
    """Scales of a mode, uint8 of any shape, as float32."""
    return _SCALES[FLOAT_MODES[mode].scale][scales]


def check(w_q: np.ndarray, scales: np.ndarray, mode: str) -> None:
    """Refuse parts that stand for no numbers.

    Raises:
        FormatError: a scale that is NaN or (E4M3) negative, or a code that is NaN.
    """
    if FLOAT_MODES[mode].scale == "E8M0":
        if (scales == E8M0_NAN).any():
            raise FormatError(f"a scale is {E8M0_NAN}, which is NaN in E8M0")
    elif (scales >= 0x7F).any():
        raise FormatError(f"a scale is {scales[scales >= 0x7F].flat[0]}, which is NaN or negative in E4M3")
    if FLOAT_MODES[mode].bits == 8 and has_nan(np.ascontiguousarray(w_q).view(np.uint8)):
        raise FormatError("an E4M3 code is NaN (0x7F or 0xFF)")


def dequantize(w_q: np.ndarray, scales: np.ndarray, mode: str) -> np.ndarray:
    """Weights float32 `[..., K]` of `w_q` uint32 `[..., K * bits // 32]`, `scales` uint8 `[..., K // group_size]`."""
    geometry = FLOAT_MODES[mode]
    K = scales.shape[-1] * geometry.group_size
    out = np.empty((*scales.shape[:-1], K), np.float32)
    if not out.size:
        return out
    flat = out.reshape(-1, K)
    words, steps = (np.ascontiguousarray(a).reshape(len(flat), -1) for a in (w_q, scales))
    rows = max(_CHUNK // K, 1)
    for start in range(0, len(flat), rows):
        part = slice(start, start + rows)
        codes = unpack(words[part], geometry.bits, K)
        groups = flat[part].reshape(-1, geometry.group_size)
        # mode="clip" lets `take` write without a buffer; every code has its value.
        np.take(_VALUES[geometry.bits], codes.reshape(groups.shape), out=groups, mode="clip")
        groups *= scale_values(steps[part], mode).reshape(-1, 1)
    return out


def to_blocks(q: QuantizedTensor) -> np.ndarray:
    """The same codes and scales as ggml blocks of `GGML_TYPES[mode]`: uint8 `[..., row_bytes]`.

    Args:
        q: `[..., K]`, `K` whole blocks (32 weights of MXFP4, 64 of NVFP4).
    """
    group = q.spec.group_size
    codes = unpack(q.w_q.reshape(-1, q.w_q.shape[-1]), q.spec.bits, q.shape[-1]).reshape(-1, 2, group // 2)
    qs = codes[:, 0] | codes[:, 1] << 4
    together = _GROUPS_OF_BLOCK[q.spec.mode]
    parts = (q.scales.reshape(-1, together), qs.reshape(-1, together * group // 2))
    return np.concatenate(parts, axis=1).reshape(*q.shape[:-1], -1)


def from_blocks(blocks: np.ndarray, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of `to_blocks`: `w_q` uint32 and `scales` uint8 of blocks uint8 `[rows, row_bytes]`."""
    group, together = FLOAT_MODES[mode].group_size, _GROUPS_OF_BLOCK[mode]
    flat = blocks.reshape(-1, together * (1 + group // 2))
    qs = flat[:, together:].reshape(-1, 1, group // 2)
    codes = np.concatenate((qs & 0x0F, qs >> 4), axis=1).reshape(len(blocks), -1)
    return pack(codes, 4), np.ascontiguousarray(flat[:, :together]).reshape(len(blocks), -1)


#: Groups, each with its scale, in one ggml block.
_GROUPS_OF_BLOCK = {"mxfp4": 1, "nvfp4": 4}
