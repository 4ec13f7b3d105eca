"""`compressed-tensors` checkpoints (llm-compressor): integers packed or in bytes, FP8, MXFP4, MXFP8, NVFP4.

    format                 tensors of a module
    pack-quantized         weight_packed int32 [N, words], weight_scale [N, n_groups], weight_shape [2];
                           asymmetric: weight_zero_point int32 [N * bits / 32, n_groups]; weight_g_idx [K]
    int-quantized          weight int8 [N, K], weight_scale; asymmetric: weight_zero_point int8
    float-quantized        weight E4M3 [N, K], weight_scale
    naive-quantized        one of the two above
    mxfp8-quantized        weight E4M3 [N, K], weight_scale uint8 [N, K / 32]
    mxfp4-pack-quantized   weight_packed uint8 [N, K / 2], weight_scale uint8 [N, K / 32]
    nvfp4-pack-quantized   weight_packed uint8 [N, K / 2], weight_scale E4M3 [N, K / 16], weight_global_scale [1]

Packed integers lie one after another from the least significant bit of a row, `q + 2^(bits - 1)`, zero points so along
the columns of their tensor; `w_hat = (q - zero_point) * scale`. NVFP4 divides by its global scale:
`code * (weight_scale / weight_global_scale)` (source: `compressed_tensors/compressors/` and
`quantization/lifecycle/forward_helpers.py`, version 0.20).

A module belongs to the config group whose `targets` name it best: its own name, then a pattern (`re:`), then its class.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from mlxq.checkpoint.packed import fp8, modelopt
from mlxq.checkpoint.packed.base import Packed, RawTensors, Scheme, Source, part
from mlxq.checkpoint.packed.config_groups import Groups, Weights
from mlxq.checkpoint.packed.grid import Columns, Grid, StoredGrid, columns_in_groups, columns_of
from mlxq.checkpoint.safetensors import Entry, quoted
from mlxq.errors import CheckpointError
from mlxq.formats.gptq import unpack_words
from mlxq.types import FLOAT_BYTES, TensorInfo

#: What a module's quantized weight is called.
_PACKED, _PLAIN = "weight_packed", "weight"
_BLOCK_STRATEGIES = ("tensor", "channel", "block")


class Integers(Grid):
    """A matrix of integers, packed in words or in bytes of their own."""

    def __init__(
        self,
        info: TensorInfo,
        parts: tuple[str, ...],
        module: str,
        how: Weights,
        columns: Columns,
        dtype: str,
        packed: bool,
    ):
        super().__init__(
            info, parts, bits=how.num_bits, columns=columns, scales_dtype=dtype, exact_biases=how.symmetric
        )  # fmt: skip
        self._module, self._how, self._packed = module, how, packed

    def stored(self, raw: RawTensors, rows: slice | None) -> StoredGrid:
        first, last, _ = (rows or slice(None)).indices(self.info.shape[0])
        middle = 1 << (self.bits - 1)
        if self._packed:
            words = raw.rows(f"{self._module}.{_PACKED}", rows).view(np.uint32)
        else:
            codes = raw.rows(f"{self._module}.{_PLAIN}", rows).view(np.uint8) ^ np.uint8(0x80)
            words = np.ascontiguousarray(codes).view("<u4")
        scales = self._of_rows(raw, f"{self._module}.weight_scale", first, last)
        if self._how.symmetric:
            return StoredGrid(words, scales, np.full(scales.shape, middle, np.int16))
        name = f"{self._module}.weight_zero_point"
        if raw.entries[name].dtype == "I32":
            # Few: read as a whole, since rows of the weight share words.
            zeros = unpack_words(np.ascontiguousarray(raw.rows(name).T), self.bits)[:, first:last].T
            return StoredGrid(words, scales, np.ascontiguousarray(zeros).astype(np.int16))
        zeros = self._of_rows(raw, name, first, last)
        return StoredGrid(words, scales, zeros.astype(np.int16) + np.int16(middle))

    def _of_rows(self, raw: RawTensors, name: str, first: int, last: int) -> np.ndarray:
        """Scales or zero points `[n, n_groups]` of some rows, whether stored for rows or for the tensor."""
        if prod(raw.entries[name].shape) == 1:
            return np.broadcast_to(raw.rows(name).reshape(1, 1), (last - first, 1))
        return raw.rows(name, slice(first, last)).reshape(last - first, -1)


def collect(source: Source) -> dict[str, Packed]:
    """Every module with a `weight_packed`, and every module of a group whose weight has a scale."""
    groups = Groups(source.settings, source.where)
    found: dict[str, Packed] = {}
    for name, entry in source.raw.entries.items():
        module, _, last = name.rpartition(".")
        scaled = f"{module}.weight_scale" in source.raw.entries
        if last == _PACKED or (last == _PLAIN and (scaled or entry.dtype in ("I8", "F8_E4M3"))):
            found[f"{module}.weight"] = _tensor(source, module, last, entry, groups.of(module))
    fp8.attach_cache_scales(source, found)
    return found


def _tensor(source: Source, module: str, last: str, entry: Entry, how: Weights) -> Packed:
    wanted = _PACKED if how.is_packed else _PLAIN
    if last != wanted:
        raise CheckpointError(
            f"{source.where}: {quoted(module)} has {last}, but its config group says {how.format}, which has {wanted}"
        )
    name, scale = f"{module}.weight", f"{module}.weight_scale"
    others = fp8.activations(source, name)
    if how.format == "nvfp4-pack-quantized":
        codes, factor = f"{module}.{_PACKED}", f"{module}.weight_global_scale"
        return modelopt.nvfp4(source, name, codes, scale, factor, others, divides=True)
    if how.format in ("mxfp4-pack-quantized", "mxfp8-quantized"):
        mode = how.format[:5]
        return modelopt.mx(source, name, f"{module}.{last}", scale, others, mode)
    if how.type == "float":
        return _fp8(source, name, entry, how)
    return _integers(source, module, entry, how, others)


def _fp8(source: Source, name: str, entry: Entry, how: Weights) -> Packed:
    part(source, name, ("F8_E4M3",))
    if how.strategy not in _BLOCK_STRATEGIES:
        raise CheckpointError(
            f"{source.where}: {quoted(name)}: FP8 weights of strategy {quoted(how.strategy)} cannot be read; those"
            f" that can are {', '.join(_BLOCK_STRATEGIES)}"
        )
    return fp8.matrix(source, name, entry, f"{name}_scale", how.block if how.strategy == "block" else None)


def _integers(source: Source, module: str, entry: Entry, how: Weights, others: tuple[str, ...]) -> Integers:
    where = f"{source.where}: {quoted(module)}"
    packed = how.is_packed
    stored = part(source, f"{module}.{_PACKED if packed else _PLAIN}", ("I32",) if packed else ("I8",))
    if len(entry.shape) != 2 or 0 in entry.shape:
        raise CheckpointError(f"{where}: its weight is {list(entry.shape)}, but must be a matrix")
    N, K = _shape(source, module, entry, how) if packed else entry.shape
    if K * how.num_bits % 32:
        raise CheckpointError(f"{where}: rows of {K} codes of {how.num_bits} bits do not fill words of 32")
    names = [f"{module}.{_PACKED if packed else _PLAIN}", f"{module}.weight_scale"]
    n_groups = 1 if how.strategy in ("tensor", "channel") else -(-K // how.group_size)
    whole = how.strategy == "tensor"
    scale = part(source, names[1], tuple(FLOAT_BYTES))
    if not _fits(scale, N, n_groups, whole):
        part(source, names[1], tuple(FLOAT_BYTES), (1,) if whole else (N, n_groups))
    if not how.symmetric:
        names.append(f"{module}.weight_zero_point")
        _check_zero_points(source, names[-1], N, n_groups, how, whole)
    elif f"{module}.weight_zero_point" in source.raw.entries:
        raise CheckpointError(f"{where} has zero points, but its config group is symmetric")
    columns = columns_in_groups(K, K if n_groups == 1 else how.group_size)
    if f"{module}.weight_g_idx" in source.raw.entries:
        names.append(f"{module}.weight_g_idx")
        columns = _ordered(source, names[-1], K, n_groups)
    if f"{module}.weight_shape" in source.raw.entries:
        names.append(f"{module}.weight_shape")
    nbytes = sum(source.raw.entries[n].nbytes for n in names)
    info = TensorInfo(f"{module}.weight", (N, K), f"INT{how.num_bits}", nbytes)
    return Integers(info, (*names, *others), module, how, columns, scale.dtype, packed and stored.dtype == "I32")


def _fits(stored: Entry, N: int, n_groups: int, whole: bool) -> bool:
    """Whether scales or zero points are one for the tensor, or one for each group of each row; axes of 1 aside."""
    expected = () if whole else (N, n_groups)
    return [n for n in stored.shape if n != 1] == [n for n in expected if n != 1]


def _shape(source: Source, module: str, entry: Entry, how: Weights) -> tuple[int, int]:
    """`[N, K]` of a packed weight: what `weight_shape` says, which the words must hold."""
    name = f"{module}.weight_shape"
    part(source, name, ("I64", "I32"), (2,))
    N, K = (int(n) for n in source.raw.rows(name))
    words = -(-K * how.num_bits // 32)
    if (N, words) != entry.shape or K < 1:
        raise CheckpointError(
            f"{source.where}: {quoted(name)} says [{N}, {K}], which in {how.num_bits} bits is {[N, words]} words, but"
            f" weight_packed is {list(entry.shape)}"
        )
    return N, K


def _check_zero_points(source: Source, name: str, N: int, n_groups: int, how: Weights, whole: bool) -> None:
    stored = part(source, name, ("I32", "I8"))
    if stored.dtype == "I32":
        part(source, name, ("I32",), (-(-N * how.num_bits // 32), n_groups))
    elif not _fits(stored, N, n_groups, whole):
        part(source, name, ("I8",), (1,) if whole else (N, n_groups))


def _ordered(source: Source, name: str, K: int, n_groups: int) -> Columns:
    part(source, name, ("I32", "I64"), (K,))
    group_of = source.raw.rows(name)
    if (group_of == -1).all():
        # The producer's mark for columns in order.
        return columns_in_groups(K, -(-K // n_groups))
    if group_of.min() < 0 or group_of.max() >= n_groups:
        raise CheckpointError(
            f"{source.where}: {quoted(name)} holds groups {group_of.min()} to {group_of.max()}, but there are"
            f" {n_groups}"
        )
    return columns_of(group_of.astype(np.int32))


def check(settings: dict[str, Any], where: str) -> None:
    """Refuse formats, strategies and widths that are not in the table, and sparse weights."""
    sparsity = settings.get("sparsity_config") or {}
    kind = sparsity.get("format", "dense") if isinstance(sparsity, dict) else sparsity
    if kind != "dense":
        raise CheckpointError(f"{where}: compressed-tensors weights in the sparse format {quoted(kind)}; not dense")
    if settings.get("transform_config"):
        raise CheckpointError(f"{where}: compressed-tensors weights with transform_config, which cannot be followed")
    Groups(settings, where)


SCHEME = Scheme(check, collect)
