"""Codes that MLX's affine grid and ggml's blocks both hold: one quantization for two containers.

ggml's Q4_K and Q5_K weights are `d sc q - dmin m` with 6-bit `sc` and `m`. With `d` and `dmin` of so few significant
bits that `d sc` and `dmin m` are numbers of the dtype of MLX's scales, those are the scale and bias of a group of 32,
and both containers decode to the same weights. What is left of the bits of a float16 is 5, of a bfloat16 2, and
float32 has room for all. Rows that do not divide by 256 are Q4_1 or Q5_1, 8 bits are Q8_0: there scale and bias are
stored as they are, and only have to be numbers of both types.
"""

from __future__ import annotations

import numpy as np

from mlxq.errors import FormatError
from mlxq.formats import floats, ggml
from mlxq.formats.superblocks import SUPER_BLOCK
from mlxq.quantizers.ggml import asymmetric as ggml_asymmetric
from mlxq.types import QuantizedTensor, QuantSpec

_BLOCK = 32
#: Significant bits of a step by the dtype of the scales: of `d` and `dmin`, which 6-bit integers multiply, and alone.
_STEP_BITS = {"F16": (5, 11), "BF16": (2, 8), "F32": (11, 11)}
_TYPES = {4: ("Q4_K", "Q4_1"), 5: ("Q5_K", "Q5_1"), 8: ("Q8_0", "Q8_0")}


def block_type(spec: QuantSpec, K: int) -> str:
    """The ggml type that holds rows of `K` weights of a portable spec.

    Raises:
        FormatError: a spec that no block type holds.
    """
    if spec.bits not in _TYPES or spec.group_size != _BLOCK:
        raise FormatError(
            f"{spec} codes are not portable: {', '.join(map(str, _TYPES))} bits in groups of {_BLOCK} are"
        )
    return _TYPES[spec.bits][0 if K % SUPER_BLOCK == 0 else 1]


def quantize(w: np.ndarray, spec: QuantSpec, dtype: str, importance: np.ndarray | None = None) -> QuantizedTensor:
    """Quantize rows to codes, scales and biases that blocks of `block_type` hold exactly.

    Args:
        w: `[..., N, K]` float32, float16, or uint16 with the bits of bfloat16.
        spec: 4, 5 or 8 bits, group size 32.
        dtype: of scales and biases: `F16`, `BF16` or `F32`.
        importance: float32 `[K]` weights of the squared errors, or None.

    Raises:
        FormatError: a weight that is not finite or too large, or another spec.
    """
    name = block_type(spec, w.shape[-1])
    rows = floats.to_float32(w, floats.dtype_of(w)).reshape(-1, w.shape[-1])
    if not floats.all_finite(rows):
        raise FormatError("a weight is NaN or infinite")
    with_integers, alone = _STEP_BITS[dtype]
    if name == "Q8_0":
        blocks = _q8_0(rows, alone)
    else:
        bits = with_integers if name.endswith("_K") else alone
        blocks = ggml_asymmetric.quantize(np.ascontiguousarray(rows), name, importance, step_bits=bits)
    q = ggml.to_affine(blocks, name)
    parts = [floats.from_float32(floats.to_float32(a, q.dtype), dtype) for a in (q.scales, q.biases)]
    if not all(floats.all_finite(a) for a in parts):
        raise FormatError(
            f"the scales of weights as large as {np.abs(rows).max():g} exceed {dtype}; choose another dtype"
        )
    w_q, scales, biases = (a.reshape(*w.shape[:-1], a.shape[-1]) for a in (q.w_q, *parts))
    return QuantizedTensor(w_q, scales, biases, spec, w.shape, dtype)


def _q8_0(rows: np.ndarray, step_bits: int) -> np.ndarray:
    """Q8_0 blocks whose `d` has few bits: rounded up, so that the largest weight still has a code."""
    groups = rows.reshape(-1, _BLOCK)
    mantissa, exponent = np.frexp(np.abs(groups).max(axis=1) / np.float32(127))
    # Below float16's normal numbers there are fewer bits still: all are multiples of the smallest.
    bits = np.minimum(step_bits, exponent + 24)
    d = np.ldexp(np.ceil(np.ldexp(mantissa, bits)), exponent - bits)
    with np.errstate(over="ignore"):
        stored = d.astype("<f2")
    if not np.isfinite(stored).all():
        raise FormatError(f"weights as large as {np.abs(rows).max():g} have a step beyond float16")
    step = stored.astype(np.float32)
    inverse = np.where(step > 0, 1 / np.where(step > 0, step, 1), 0)[:, None]
    codes = np.clip(np.rint(groups * inverse), -127, 127).astype(np.int8)
    blocks = np.concatenate([stored[:, None].view(np.uint8), codes.view(np.uint8)], axis=1)
    return blocks.reshape(len(rows), -1)
