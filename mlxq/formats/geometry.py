"""The one table of formats: legal bits, group sizes, block and type sizes, and what follows from them.

Affine (MLX) rows of `K` weights are `K * bits / 32` uint32 words plus one scale and one bias for each group of
`group_size` weights; MLX's float modes have one byte for each group instead. Block formats (ggml) store `block_size`
weights in `type_size` bytes, scale included.
Sources: `mlx/ops.cpp` (affine_quantize, fp_quantize), `ggml/src/ggml-common.h` (the block structures).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from mlxq.errors import FormatError
from mlxq.types import FLOAT_BYTES, QuantSpec

#: Bits per code and weights per group that `mx.quantize(mode="affine")` packs and every MLX reader understands: what a
#: file may hold.
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUP_SIZES = (32, 64, 128)
#: Weights per group that our own operations compute with. mlx has no kernels for 16.
OPS_GROUP_SIZES = (16, *AFFINE_GROUP_SIZES)


@dataclass(frozen=True)
class FloatMode:
    """A mode of MLX whose codes are floats of `bits` bits; `scale` names the float in the byte that a group shares."""

    bits: int
    group_size: int
    scale: str


#: Mode of `mx.quantize` -> its one geometry.
FLOAT_MODES = {
    "mxfp4": FloatMode(4, 32, "E8M0"),
    "mxfp8": FloatMode(8, 32, "E8M0"),
    "nvfp4": FloatMode(4, 16, "E4M3"),
}
MODES = ("affine", *FLOAT_MODES)

#: Rows are packed so many codes at a time: the fewest that fill words, whatever their bits.
PACKED_CODES = 32


@dataclass(frozen=True)
class BlockFormat:
    """A ggml type: `block_size` weights in `type_size` bytes; `ggml_id` is its number in a GGUF file."""

    name: str
    ggml_id: int
    block_size: int
    type_size: int

    @property
    def bpw(self) -> float:
        """Bits per weight, everything stored counted."""
        return 8 * self.type_size / self.block_size


_BLOCK_FORMATS = (
    #           name      id  block  bytes
    BlockFormat("F32", 0, 1, 4),
    BlockFormat("F16", 1, 1, 2),
    # One scale d (and offset m) of float16 for 32 codes: nibbles, a uint32 of fifth bits, or bytes.
    BlockFormat("Q4_0", 2, 32, 2 + 16),
    BlockFormat("Q4_1", 3, 32, 2 + 2 + 16),
    BlockFormat("Q5_0", 6, 32, 2 + 4 + 16),
    BlockFormat("Q5_1", 7, 32, 2 + 2 + 4 + 16),
    BlockFormat("Q8_0", 8, 32, 2 + 32),
    # Super-blocks: d (and dmin), quantized scales (and mins) of 16 or 8 sub-blocks, codes.
    BlockFormat("Q2_K", 10, 256, 2 + 2 + 16 + 64),
    BlockFormat("Q3_K", 11, 256, 2 + 12 + 32 + 64),
    BlockFormat("Q4_K", 12, 256, 2 + 2 + 12 + 128),
    BlockFormat("Q5_K", 13, 256, 2 + 2 + 12 + 32 + 128),
    BlockFormat("Q6_K", 14, 256, 2 + 16 + 64 + 128),
    # Codes that index tables: of vectors (IQ1, IQ2, IQ3) or of 16 values (IQ4).
    BlockFormat("IQ2_XXS", 16, 256, 2 + 64),
    BlockFormat("IQ2_XS", 17, 256, 2 + 64 + 8),
    BlockFormat("IQ3_XXS", 18, 256, 2 + 64 + 32),
    BlockFormat("IQ1_S", 19, 256, 2 + 32 + 16),
    BlockFormat("IQ4_NL", 20, 32, 2 + 16),
    BlockFormat("IQ3_S", 21, 256, 2 + 64 + 8 + 32 + 4),
    BlockFormat("IQ2_S", 22, 256, 2 + 64 + 8 + 8),
    BlockFormat("IQ4_XS", 23, 256, 2 + 2 + 4 + 128),
    BlockFormat("IQ1_M", 29, 256, 32 + 16 + 8),
    BlockFormat("BF16", 30, 1, 2),
    # Ternary codes.
    BlockFormat("TQ1_0", 34, 256, 48 + 4 + 2),
    BlockFormat("TQ2_0", 35, 256, 64 + 2),
    # Four-bit floats: a shared exponent for 32, or float8 scales for groups of 16.
    BlockFormat("MXFP4", 39, 32, 1 + 16),
    BlockFormat("NVFP4", 40, 64, 4 + 32),
)
#: ggml type name -> its geometry.
BLOCK_FORMATS = {f.name: f for f in _BLOCK_FORMATS}
_BY_GGML_ID = {f.ggml_id: f for f in _BLOCK_FORMATS}


def block_format(name: str | int) -> BlockFormat:
    """Geometry of a ggml type by its name (`Q4_1`) or its number in a GGUF file (3).

    Raises:
        FormatError: not in the table; the message lists what is.
    """
    found = _BY_GGML_ID.get(name) if isinstance(name, int) else BLOCK_FORMATS.get(name)
    if found is None:
        known = ", ".join(f"{f.name} ({f.ggml_id})" for f in _BLOCK_FORMATS)
        raise FormatError(f"ggml type {name!r} is not known: the known types are {known}")
    return found


def validate_spec(spec: QuantSpec) -> None:
    """Check what a file may hold: a known mode, with bits and a group size that it has.

    Raises:
        FormatError: unknown mode, illegal bits or group size; the message lists the legal values.
    """
    if spec.mode == "affine":
        validate_affine(spec.bits, spec.group_size)
        return
    mode = FLOAT_MODES.get(spec.mode) if isinstance(spec.mode, str) else None
    if mode is None:
        raise FormatError(f"mode must be one of {_listed(MODES)}, got {spec.mode!r}")
    if (spec.bits, spec.group_size) != (mode.bits, mode.group_size):
        raise FormatError(
            f"mode {spec.mode} has {mode.bits} bits in groups of {mode.group_size}, "
            f"got {spec.bits!r} in groups of {spec.group_size!r}"
        )


def validate_affine(bits: int, group_size: int, legal: Sequence[int] = AFFINE_GROUP_SIZES) -> None:
    """Check bits and group size against the table.

    Args:
        legal: group sizes: `AFFINE_GROUP_SIZES` of files, or `OPS_GROUP_SIZES`.

    Raises:
        FormatError: not legal, or no integer; the message lists the legal values.
    """
    _validate_bits(bits)
    if type(group_size) is not int or group_size not in legal:
        raise FormatError(f"affine group_size must be one of {_listed(legal)}, got {group_size!r}")


def validate_width(K: int, bits: int, group_size: int, legal: Sequence[int] = AFFINE_GROUP_SIZES) -> None:
    """Check that rows of `K` weights can be quantized with these bits and groups (`legal` as in `validate_affine`).

    Raises:
        FormatError: illegal bits or group size, or `K` is not a positive multiple of the group size and of 32.
    """
    validate_affine(bits, group_size, legal)
    if K <= 0 or K % group_size:
        best = largest_group(K, group_size)
        hint = f"; group_size {best} divides it" if best else "; no legal group size divides it, keep it float"
        raise FormatError(f"a row of {K} weights does not divide into groups of {group_size}{hint}")
    if K % PACKED_CODES:
        raise FormatError(
            f"groups of {group_size} come in pairs, a row being packed {PACKED_CODES} codes at a time: got {K}"
        )


def largest_group(K: int, preferred: int) -> int | None:
    """Largest group size of files that is at most `preferred` and divides `K`, or None."""
    fits = [g for g in AFFINE_GROUP_SIZES if g <= preferred and K > 0 and K % g == 0]
    return max(fits, default=None)


def packed_words(K: int, bits: int) -> int:
    """uint32 words that hold `K` codes of `bits` bits.

    Raises:
        FormatError: illegal bits, or the codes do not fill whole words.
    """
    _validate_bits(bits)
    if K * bits % 32:
        raise FormatError(f"{K} codes of {bits} bits are {K * bits} bits, which does not fill uint32 words")
    return K * bits // 32


def affine_bytes(shape: Sequence[int], spec: QuantSpec, dtype: str) -> int:
    """Bytes of a tensor `[..., K]` in affine form: words, scales and biases.

    Args:
        shape: counts weights, last axis `K`.
        spec: bits and group size.
        dtype: float type of scales and biases: `F32`, `F16` or `BF16`.

    Raises:
        FormatError: illegal spec or dtype, or `K` does not divide into groups.
    """
    K = shape[-1]
    validate_width(K, spec.bits, spec.group_size)
    row = 4 * packed_words(K, spec.bits) + 2 * _float_bytes(dtype) * (K // spec.group_size)
    return prod(shape[:-1]) * row


def quantized_bytes(shape: Sequence[int], spec: QuantSpec, dtype: str) -> int:
    """Bytes of a tensor `[..., K]` in any mode: `affine_bytes`, or words and a byte for each group.

    Raises:
        FormatError: illegal spec or dtype, or `K` does not divide into groups, or does not fill words.
    """
    if spec.mode == "affine":
        return affine_bytes(shape, spec, dtype)
    validate_spec(spec)
    K = shape[-1]
    if K <= 0 or K % max(spec.group_size, PACKED_CODES):
        raise FormatError(f"a row of {K} weights does not divide into groups of {spec.group_size} ({spec.mode})")
    return prod(shape[:-1]) * (4 * packed_words(K, spec.bits) + K // spec.group_size)


def bpw(spec: QuantSpec, dtype: str) -> float:
    """Bits per weight of a format, scales and biases (of `dtype`) counted: affine 4-bit group 64 in F16 is 4.5.

    Raises:
        FormatError: illegal spec or dtype.
    """
    validate_spec(spec)
    if spec.mode in FLOAT_MODES:
        return spec.bits + 8 / spec.group_size
    return spec.bits + 2 * 8 * _float_bytes(dtype) / spec.group_size


def _validate_bits(bits: int) -> None:
    # 4.0 equals 4, but is no number of bits: it would fail later, where words are shifted.
    if type(bits) is not int or bits not in AFFINE_BITS:
        raise FormatError(f"affine bits must be one of {_listed(AFFINE_BITS)}, got {bits!r}")


def _float_bytes(dtype: str) -> int:
    if dtype not in FLOAT_BYTES:
        raise FormatError(f"float dtype {dtype!r} is not known: the float dtypes are {_listed(FLOAT_BYTES)}")
    return FLOAT_BYTES[dtype]


def _listed(values: Sequence[object] | dict) -> str:
    return ", ".join(str(v) for v in values)
