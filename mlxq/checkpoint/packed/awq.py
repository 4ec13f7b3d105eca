"""Checkpoints of AWQ's producers (AutoAWQ, llm-awq, GPTQModel): 4-bit `qweight`, `qzeros` or `scaled_zeros`, `scales`.

Layouts: `mlxq.formats.awq`. The settings say which one; a module is quantized where it has a `qweight`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mlxq.checkpoint.packed.base import Packed, RawTensors, Scheme, Source, part
from mlxq.checkpoint.packed.grid import Grid, StoredGrid, columns_in_groups
from mlxq.checkpoint.safetensors import quoted
from mlxq.errors import CheckpointError
from mlxq.formats import awq
from mlxq.formats.gptq import unpack_words
from mlxq.types import FLOAT_BYTES, TensorInfo

#: Keys of the settings that may name the layout, and its names. llm-awq's is told by the type of its words.
_KEYS = ("version", "checkpoint_format", "format")
_LAYOUTS = ("gemm", "gemv", "gemv_fast", "llm-awq")
_BACKENDS = (None, "autoawq", "llm-awq")


class Parts(NamedTuple):
    """Stored tensors of one module, checked: sizes, the float type of the scales, all bytes."""

    N: int
    K: int
    scales_dtype: str
    names: tuple[str, ...]
    nbytes: int


class _Matrix(Grid):
    exact_biases = False

    def __init__(self, module: str, parts: Parts, group_size: int):
        super().__init__(
            TensorInfo(f"{module}.weight", (parts.N, parts.K), "AWQ", parts.nbytes),
            parts.names,
            bits=awq.BITS,
            columns=columns_in_groups(parts.K, group_size),
            scales_dtype=parts.scales_dtype,
            exact_biases=self.exact_biases,
        )
        self._weight, self._scales, self._zeros = parts.names
        self._n_groups = parts.K // group_size

    def _range(self, rows: slice | None) -> tuple[int, int]:
        first, last, _ = (rows or slice(None)).indices(self.info.shape[0])
        return first, max(first, last)


class GemmMatrix(_Matrix):
    """GEMM: rows of the weight are columns of the file, eight to a word."""

    def stored(self, raw: RawTensors, rows: slice | None) -> StoredGrid:
        first, last = self._range(rows)
        of_words = None if rows is None else slice(first // 8, -(-last // 8))
        inside = slice(first % 8, first % 8 + last - first)
        words = awq.gemm_to_rows(raw.columns(self._weight, of_words))[inside]
        zero_points = awq.unpack_gemm(raw.rows(self._zeros))[:, first:last].T
        return StoredGrid(words, np.ascontiguousarray(raw.columns(self._scales, rows)), zero_points)


class GemvMatrix(_Matrix):
    """GEMV: rows of the weight are rows of the file."""

    def stored(self, raw: RawTensors, rows: slice | None) -> StoredGrid:
        words = raw.rows(self._weight, rows).view(np.uint32)
        scales = np.ascontiguousarray(raw.rows(self._scales, rows)[:, : self._n_groups])
        zero_points = unpack_words(raw.rows(self._zeros, rows), awq.BITS)[:, : self._n_groups]
        return StoredGrid(words, scales, zero_points)


class FastMatrix(_Matrix):
    """GEMV-fast and llm-awq: four rows to a row of the file, and biases instead of zero points."""

    exact_biases = True

    def stored(self, raw: RawTensors, rows: slice | None) -> StoredGrid:
        first, last = self._range(rows)
        words = awq.fast_to_rows(raw.rows(self._weight, slice(first // 4, -(-last // 4))))
        scales, biases = (
            np.ascontiguousarray(raw.columns(n, rows)[:, : self._n_groups]) for n in (self._scales, self._zeros)
        )
        return StoredGrid(words[first % 4 : first % 4 + last - first], scales, None, biases)


def check(settings: dict[str, Any], where: str) -> None:
    """Refuse layouts and widths that are not AWQ's own."""
    _layout(settings, where)
    bits, group_size = _number(settings, "bits", "w_bit"), _group_size(settings)
    if type(bits) is not int or bits != awq.BITS:
        raise CheckpointError(f"{where}: AWQ weights of {quoted(bits)} bits; only 4 can be read")
    if type(group_size) is not int or (group_size < 1 and group_size != -1):
        raise CheckpointError(f"{where}: group_size is {quoted(group_size)}, but must be -1 or a positive integer")


def _number(settings: dict[str, Any], key: str, older: str) -> Any:
    return settings.get(key, settings.get(older))


def _group_size(settings: dict[str, Any]) -> Any:
    return _number(settings, "group_size", "q_group_size")


def _layout(settings: dict[str, Any], where: str) -> str:
    backend = settings.get("backend")
    if backend not in _BACKENDS:
        raise CheckpointError(f"{where}: AWQ weights for the back end {quoted(backend)}, whose layout cannot be read")
    named = [settings[key] for key in _KEYS if settings.get(key) is not None]
    for name in named:
        if not isinstance(name, str) or name.lower() not in _LAYOUTS:
            raise CheckpointError(
                f"{where}: AWQ weights in the layout {quoted(name)}, which cannot be read; the layouts that can are"
                f" {', '.join(_LAYOUTS)}"
            )
    if len({name.lower() for name in named}) > 1:
        raise CheckpointError(f"{where}: the settings name several layouts: {', '.join(map(quoted, named))}")
    return "llm-awq" if backend == "llm-awq" else named[0].lower() if named else "gemm"


def collect(source: Source) -> dict[str, Packed]:
    """Every module that has a `qweight`."""
    found: dict[str, Packed] = {}
    for name in source.raw.entries:
        module = name.removesuffix(".qweight")
        if module != name:
            found[f"{module}.weight"] = packed_module(source, module)
    return found


def packed_module(source: Source, module: str) -> _Matrix:
    """The matrix of one module.

    Raises:
        CheckpointError: parts that are missing, or disagree with each other or the settings.
    """
    layout, group_size = _layout(source.settings, source.where), _group_size(source.settings)
    if f"{module}.weight" in source.raw.entries:
        raise CheckpointError(f"{source.where}: {quoted(module)} has both weight and qweight")
    weight = part(source, f"{module}.qweight", ("I32", "I16"))
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise CheckpointError(f"{source.where}: {quoted(module)}: qweight is {list(weight.shape)}, not a matrix")
    if layout == "gemm":
        kind, N, K = GemmMatrix, weight.shape[1] * 8, weight.shape[0]
    elif layout == "gemv" or (layout == "llm-awq" and weight.dtype == "I32"):
        kind, N, K = GemvMatrix, weight.shape[0], weight.shape[1] * 8
    else:
        kind, N, K = FastMatrix, weight.shape[0] * 4, weight.shape[1]
    group_size = K if group_size == -1 else group_size
    if K % group_size or K % (awq.FAST_COLUMNS if kind is FastMatrix else 8):
        raise CheckpointError(
            f"{source.where}: {quoted(module)} has rows of {K} weights, which groups of {group_size} and the layout"
            f" {layout} do not divide"
        )
    return kind(module, _parts(source, module, kind, (N, K), group_size), group_size)


def _parts(source: Source, module: str, kind: type[_Matrix], shape: tuple[int, int], group_size: int) -> Parts:
    N, K = shape
    n_groups = K // group_size
    width = awq.zeros_width(n_groups, group_size)
    floats, zeros_name = tuple(FLOAT_BYTES), "qzeros"
    if kind is GemmMatrix:
        words, zeros, scales, zeros_dtypes = "I32", (n_groups, N // 8), (n_groups, N), ("I32",)
    elif kind is GemvMatrix:
        words, zeros, scales, zeros_dtypes = "I32", (N, width), (N, 8 * width), ("I32",)
    else:
        words, zeros, scales, zeros_dtypes = "I16", (8 * width, N), (8 * width, N), floats
        zeros_name = "scaled_zeros" if f"{module}.scaled_zeros" in source.raw.entries else "qzeros"
    names = tuple(f"{module}.{p}" for p in ("qweight", "scales", zeros_name))
    found = [
        part(source, names[0], (words,)),
        part(source, names[1], floats, scales),
    ]
    found.append(part(source, names[2], (found[1].dtype,) if kind is FastMatrix else zeros_dtypes, zeros))
    return Parts(N, K, found[1].dtype, names, sum(e.nbytes for e in found))


SCHEME = Scheme(check, collect)
