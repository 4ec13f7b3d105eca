"""From MLX's grids to ggml's blocks, codes kept: which block types hold a grid exactly, and its blocks.

`w_hat = scales * q + biases` in float32 equals the blocks' decoded weights bit for bit (source of the layouts:
`ggml.py`, `superblocks.py`):

    type         bits      groups   exact when
    Q4_1, Q5_1   2-4, 5    any      scales and biases are float16 numbers; groups of 64 and 128 repeat them
    Q4_0, Q5_0   4, 5      any      and biases = -8 scales, -16 scales
    Q8_0         8         any      scales are float16 numbers and biases = -128 scales
    Q4_K, Q5_K   2-4, 5    any      the eight scales of a super-block are one float16 times integers 0..63, and so are
                                    the biases: found as their greatest common divisor

MLX's float modes mxfp4 and nvfp4 are MXFP4 and NVFP4 blocks in another order (`float_modes.to_blocks`); no type holds
mxfp8.
"""

from __future__ import annotations

import numpy as np

from mlxq.errors import FormatError
from mlxq.formats import float_modes, kquants
from mlxq.formats.affine import unpack
from mlxq.formats.floats import to_float32
from mlxq.formats.geometry import block_format
from mlxq.formats.superblocks import K_TYPES, SUPER_BLOCK, SuperBlocks
from mlxq.types import QuantizedTensor, QuantSpec

_BLOCK = 32
#: Block types that may hold a grid of these bits, the smallest first.
_CANDIDATES = {
    2: ("Q4_0", "Q4_K", "Q4_1"),
    3: ("Q4_0", "Q4_K", "Q4_1"),
    4: ("Q4_0", "Q4_K", "Q4_1"),
    5: ("Q5_0", "Q5_K", "Q5_1"),
    6: (),
    8: ("Q8_0",),
}
#: The code that stands for zero in the types without an offset of their own.
_ZERO = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}
#: Float16 numbers, and their products with integers, are multiples of its smallest step.
_STEP = 2.0**-24
_LARGEST_SCALE = 63


def candidates(spec: QuantSpec) -> tuple[str, ...]:
    """The block types that can hold such a grid, given fitting scales; the smallest first."""
    if spec.mode != "affine":
        name = float_modes.GGML_TYPES.get(spec.mode)
        return (name,) if name else ()
    return _CANDIDATES[spec.bits]


def exact_types(q: QuantizedTensor) -> frozenset[str]:
    """The block types that hold these rows, `[..., K]`, without changing a decoded weight."""
    if q.biases is None:
        whole = (name for name in candidates(q.spec) if q.shape[-1] % block_format(name).block_size == 0)
        return frozenset(whole)
    s, b = (_per_block(a, q.dtype, q.spec) for a in (q.scales, q.biases))
    idle = _idle(q)
    return frozenset(name for name in candidates(q.spec) if _holds(_stored_scales(s, b, idle, name), b, name))


def _holds(s: np.ndarray, b: np.ndarray, name: str) -> bool:
    if name in K_TYPES:
        return s.shape[-1] % 8 == 0 and _factor(s) is not None and _factor(-b) is not None
    with np.errstate(over="ignore"):
        offsets = b == -_ZERO[name] * s if name in _ZERO else _is_float16(b)
    return bool(offsets.all() and _is_float16(s).all())


def from_affine(q: QuantizedTensor, name: str) -> np.ndarray:
    """Blocks of type `name` with the codes of `q`; its scales and biases rounded to float16 where they do not fit.

    Args:
        q: codes and grid in any mode, `[..., K]`, with `K` whole blocks.
        name: one of `candidates(q.spec)`.

    Returns:
        uint8 `[..., row_bytes]`.

    Raises:
        FormatError: a type that cannot hold these codes, scales beyond float16, or for `Q4_K` and `Q5_K` scales that
            are not one number times integers.
    """
    if name not in candidates(q.spec):
        raise FormatError(f"{q.spec} codes cannot be {name} blocks: the types are {', '.join(candidates(q.spec))}")
    if q.biases is None:
        return float_modes.to_blocks(q)
    codes = _codes(q)
    s, b = (_per_block(a, q.dtype, q.spec) for a in (q.scales, q.biases))
    s = _stored_scales(s, b, _idle(q), name)
    blocks = (_super_blocks if name in K_TYPES else blocks_of_32)(codes, s, b, name)
    return blocks.reshape(*q.shape[:-1], -1)


def _codes(q: QuantizedTensor) -> np.ndarray:
    """uint8 `[rows, K]`."""
    return unpack(q.w_q.reshape(-1, q.w_q.shape[-1]), q.spec.bits, q.shape[-1])


def _idle(q: QuantizedTensor) -> np.ndarray:
    """Blocks all of whose codes are 0, bool `[rows, K // 32]`: 32 codes fill as many words as they have bits."""
    words = q.w_q.reshape(-1, q.shape[-1] // _BLOCK, q.spec.bits)
    return ~words.any(axis=-1)


def _stored_scales(s: np.ndarray, b: np.ndarray, idle: np.ndarray, name: str) -> np.ndarray:
    """The scales that blocks of this type have: in idle blocks any scale goes that leaves the offset as it is.

    `mx.quantize` gives constant groups the scale 1e-7, which is no float16 and shares no factor with others.
    """
    idle = idle & np.isfinite(s)
    if name in _ZERO:
        return np.where(idle, b / np.float32(-_ZERO[name]), s)
    if name not in K_TYPES:
        idle &= ~_is_float16(s)
    return np.where(idle, np.float32(0), s)


def _per_block(values: np.ndarray, dtype: str, spec: QuantSpec) -> np.ndarray:
    """float32 `[rows, K // 32]`: a group's value once for each of its blocks."""
    flat = to_float32(values.reshape(-1, values.shape[-1]), dtype)
    return np.repeat(flat, spec.group_size // _BLOCK, axis=-1)


def _is_float16(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    return np.isfinite(half) & (half.astype(np.float32) == values)


def _float16(values: np.ndarray, what: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        rounded = values.astype("<f2")
    if not np.isfinite(rounded).all():
        raise FormatError(f"{what} exceed the largest float16 (65504), which ggml's blocks cannot hold")
    return rounded.reshape(-1, 1)


def blocks_of_32(codes: np.ndarray, s: np.ndarray, b: np.ndarray, name: str) -> np.ndarray:
    """Blocks of 32: d, then m if the type has one, then the fifth bits, then codes (see `ggml.py`)."""
    codes = codes.reshape(-1, _BLOCK)
    parts = [_float16(s, "scales").view(np.uint8)]
    if name not in _ZERO:
        parts.append(_float16(b, "biases").view(np.uint8))
    if name == "Q8_0":
        return np.concatenate([*parts, codes ^ np.uint8(0x80)], axis=1)
    if name.startswith("Q5"):
        parts.append(np.packbits(codes >> 4, axis=1, bitorder="little"))
    parts.append((codes[:, :16] & 0x0F) | (codes[:, 16:] << 4))
    return np.concatenate(parts, axis=1)


def _super_blocks(codes: np.ndarray, s: np.ndarray, b: np.ndarray, name: str) -> np.ndarray:
    scales, mins = _factor(s), _factor(-b)
    if scales is None or mins is None:
        raise FormatError(f"the scales of a super-block are not one float16 times integers, so no {name} holds them")
    parts = SuperBlocks(scales[0], scales[1], codes.reshape(-1, SUPER_BLOCK), mins[0], mins[1])
    return kquants.pack(parts, name)


def _factor(values: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """`d` float16 `[n]` and integers 0..63 uint8 `[n, 8]` with `d * integers` equal to `values`, or None.

    The greatest common divisor of the eight is the largest `d`; where it has more bits than a float16, a part of it.
    """
    eights = values.reshape(-1, 8).astype(np.float64) / _STEP
    if not (np.isfinite(eights).all() and (eights == np.rint(eights)).all() and (np.abs(eights) < 2**52).all()):
        return None
    whole = eights.astype(np.int64)
    negative = (whole < 0).any(axis=1)
    if (negative & (whole > 0).any(axis=1)).any():
        return None
    whole = np.abs(whole)
    divisor = np.gcd.reduce(whole, axis=1)
    largest = whole.max(axis=1)
    chosen = np.zeros_like(divisor)
    for part in range(1, _LARGEST_SCALE + 1):
        open_ = (chosen == 0) & (divisor > 0)
        if not open_.any():
            break
        d = divisor // part
        fits = open_ & (d * part == divisor) & (largest <= _LARGEST_SCALE * d) & _is_float16(d * np.float32(_STEP))
        chosen[fits] = d[fits]
    if ((chosen == 0) & (divisor > 0)).any():
        return None
    integers = whole // np.maximum(chosen, 1)[:, None]
    d = np.where(negative, -1.0, 1.0) * chosen * _STEP
    return d.astype(np.float16), integers.astype(np.uint8)


def dequantize(q: QuantizedTensor) -> np.ndarray:
    """Weights in float32, `[..., K]`: the numbers that codes of any mode stand for, whatever their scales' dtype.

    `mx.dequantize` rounds them to that dtype; ggml's decoders do not.
    """
    if q.biases is None:
        return float_modes.dequantize(q.w_q, q.scales, q.spec.mode)
    codes = _codes(q)
    groups = codes.reshape(len(codes), -1, q.spec.group_size).astype(np.float32)
    s, b = (to_float32(a.reshape(len(codes), -1, 1), q.dtype) for a in (q.scales, q.biases))
    groups *= s
    groups += b
    return groups.reshape(q.shape)
