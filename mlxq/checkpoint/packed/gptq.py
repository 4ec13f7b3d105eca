"""Checkpoints of GPTQ's producers (AutoGPTQ, GPTQModel, optimum): `qweight`, `qzeros`, `scales`, `g_idx`.

Layout and versions: `mlxq.formats.gptq`. Whether a module is quantized is told by its tensors; how, by the settings:
`bits` and `group_size`, which GPTQModel's `dynamic` may override by module.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np

from mlxq.checkpoint.packed.base import Packed, RawTensors, Scheme, Source, part
from mlxq.checkpoint.packed.grid import Columns, Grid, StoredGrid, columns_in_groups, columns_of
from mlxq.checkpoint.safetensors import quoted
from mlxq.errors import CheckpointError
from mlxq.formats import gptq
from mlxq.types import FLOAT_BYTES, TensorInfo

_VERSIONS = {"gptq": 1, "gptq_v2": 2}
#: Settings that change what the tensors mean, and that nothing here follows.
_FOREIGN = ("adapter", "rotation")


class Settings(NamedTuple):
    """How one module is packed. `borrows` as in `gptq.unpack_zero_points`."""

    bits: int
    group_size: int
    sym: bool
    version: int
    borrows: bool


class GptqMatrix(Grid):
    """A matrix in GPTQ's layout; rows of the weight are columns of the file."""

    def __init__(
        self, info: TensorInfo, module: str, parts: tuple[str, ...], columns: Columns, dtype: str, how: Settings
    ):
        super().__init__(
            info, parts, bits=how.bits, columns=columns, scales_dtype=dtype, exact_biases=how.sym
        )  # fmt: skip
        self._module = module
        self._how = how

    def stored(self, raw: RawTensors, rows: slice | None) -> StoredGrid:
        words = raw.columns(f"{self._module}.qweight", rows).view(np.uint32)
        scales = np.ascontiguousarray(raw.columns(f"{self._module}.scales", rows))
        # Few: read as a whole, since rows of the weight share words.
        stored = raw.rows(f"{self._module}.qzeros")
        zero_points = gptq.unpack_zero_points(stored, self.bits, self._how.version, borrows=self._how.borrows)
        first, last, _ = (rows or slice(None)).indices(self.info.shape[0])
        return StoredGrid(words, scales, zero_points[:, first:last].T)


def check(settings: dict[str, Any], where: str) -> None:
    """Refuse what is not GPTQ's own layout, or of widths that it does not have."""
    for key in ("checkpoint_format", "format"):
        name = settings.get(key)
        if name is not None and (not isinstance(name, str) or name.lower() not in _VERSIONS):
            raise CheckpointError(
                f"{where}: GPTQ weights in the format {quoted(name)}, which cannot be read; the formats that can are"
                f" {', '.join(_VERSIONS)}"
            )
    if settings.get("is_marlin_format"):
        raise CheckpointError(f"{where}: GPTQ weights in Marlin's layout, which cannot be read; use the model's own")
    if settings.get("pack_dtype") not in (None, "int32"):
        raise CheckpointError(
            f"{where}: GPTQ weights packed in {quoted(settings['pack_dtype'])}; only int32 can be read"
        )
    for key in _FOREIGN:
        if settings.get(key):
            raise CheckpointError(f"{where}: GPTQ weights with {key} {quoted(settings[key])}, which cannot be followed")
    _settings(settings, {}, where)
    for pattern, overrides in _dynamic(settings, where):
        if overrides:
            _settings(settings, overrides, f"{where}: dynamic {quoted(pattern.pattern)}")


def _dynamic(settings: dict[str, Any], where: str) -> list[tuple[re.Pattern[str], dict[str, Any] | None]]:
    """GPTQModel's overrides by module: patterns that match from a name's start, None for modules left as they are."""
    dynamic = settings.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise CheckpointError(f"{where}: dynamic is {quoted(dynamic)}, but must map patterns of modules to settings")
    found = []
    for text, overrides in dynamic.items():
        pattern = text[2:] if text[:2] in ("+:", "-:") else text
        if not isinstance(overrides, dict):
            raise CheckpointError(f"{where}: dynamic {quoted(text)} is {quoted(overrides)}, but must be an object")
        try:
            found.append((re.compile(pattern), None if text.startswith("-:") else overrides))
        except re.error as e:
            raise CheckpointError(f"{where}: dynamic {quoted(text)} is no regular expression: {e}") from e
    return found


def _settings(settings: dict[str, Any], overrides: dict[str, Any], where: str) -> Settings:
    merged = settings | overrides
    bits, group_size = merged.get("bits", merged.get("w_bit")), merged.get("group_size", merged.get("q_group_size"))
    if type(bits) is not int or bits not in gptq.BITS:
        raise CheckpointError(f"{where}: GPTQ weights of {quoted(bits)} bits; those that can be read are 2, 3, 4 and 8")
    if type(group_size) is not int or (group_size < 1 and group_size != -1):
        raise CheckpointError(f"{where}: group_size is {quoted(group_size)}, but must be -1 or a positive integer")
    name = merged.get("checkpoint_format") or merged.get("format") or "gptq"
    producer = str((merged.get("meta") or {}).get("quantizer", "")) if isinstance(merged.get("meta"), dict) else ""
    return Settings(bits, group_size, bool(merged.get("sym", True)), _VERSIONS[name.lower()], "gptqmodel" in producer)


def collect(source: Source) -> dict[str, Packed]:
    """Every module that has a `qweight`."""
    dynamic = _dynamic(source.settings, source.where)
    found: dict[str, Packed] = {}
    for name in source.raw.entries:
        module = name.removesuffix(".qweight")
        if module != name:
            overrides = next((o for pattern, o in dynamic if pattern.match(module)), {})
            if overrides is None:
                raise CheckpointError(
                    f"{source.where}: {quoted(name)} is packed, but dynamic says that this module is not"
                )
            found[f"{module}.weight"] = packed_module(source, module, overrides)
    return found


def packed_module(source: Source, module: str, overrides: dict[str, Any] | None = None) -> GptqMatrix:
    """The matrix of one module, by the settings and what overrides them.

    Raises:
        CheckpointError: parts that are missing, or disagree with each other or the settings.
    """
    how = _settings(source.settings, overrides or {}, source.where)
    where = f"{source.where}: {quoted(module)}"
    weight = part(source, f"{module}.qweight", ("I32",))
    if f"{module}.weight" in source.raw.entries:
        raise CheckpointError(f"{where} has both weight and qweight")
    words, N = weight.shape if len(weight.shape) == 2 else (0, 0)
    if not words or not N or words * 32 % how.bits or N * how.bits % 32:
        raise CheckpointError(f"{where}: qweight is {list(weight.shape)}, which {how.bits}-bit codes do not fill")
    K = words * 32 // how.bits
    group_size = K if how.group_size == -1 else how.group_size
    n_groups = -(-K // group_size)
    scales = part(source, f"{module}.scales", tuple(FLOAT_BYTES), (n_groups, N))
    zeros = part(source, f"{module}.qzeros", ("I32",), (n_groups, N * how.bits // 32))
    parts = [f"{module}.{p}" for p in ("qweight", "scales", "qzeros")]
    columns = columns_in_groups(K, group_size)
    nbytes = weight.nbytes + scales.nbytes + zeros.nbytes
    if f"{module}.g_idx" in source.raw.entries:
        parts.append(f"{module}.g_idx")
        nbytes += part(source, parts[-1], ("I32", "I64"), (K,)).nbytes
        columns = _columns(source, parts[-1], n_groups)
    info = TensorInfo(f"{module}.weight", (N, K), "GPTQ", nbytes)
    return GptqMatrix(info, module, tuple(parts), columns, scales.dtype, how)


def _columns(source: Source, name: str, n_groups: int) -> Columns:
    group_of = source.raw.rows(name)
    if group_of.min() < 0 or group_of.max() >= n_groups:
        raise CheckpointError(
            f"{source.where}: {quoted(name)} holds groups {group_of.min()} to {group_of.max()}, but there are"
            f" {n_groups}"
        )
    return columns_of(group_of.astype(np.int32))


SCHEME = Scheme(check, collect)
