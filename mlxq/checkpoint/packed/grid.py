"""Codes with a scale and a zero point for each group of a row: what GPTQ, AWQ and others store, whatever the layout.

A subclass says where the parts lie (`Grid.stored`); what they decode to, and whether MLX's affine grid holds that, is
decided here. `w = scale * (q - z)` is computed in float32, where it is exact for scales of float16 and bfloat16; as an
affine grid it is `scale * q + bias` with `bias = -z * scale`, exact in float32 too, but in 16 bits only where z is a
power of two (a symmetric grid): such grids keep 16-bit scales, others need float32.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import numpy as np

from mlxq.checkpoint.packed.base import Packed, RawTensors
from mlxq.errors import FormatError
from mlxq.formats import affine
from mlxq.formats.floats import all_finite, from_float32, to_float32
from mlxq.formats.geometry import AFFINE_BITS, AFFINE_GROUP_SIZES, PACKED_CODES
from mlxq.formats.gptq import unpack_words
from mlxq.types import QuantizedTensor, QuantSpec, TensorInfo

#: Weights decoded at a time, so that temporaries stay in the second-level cache.
_CHUNK = 1 << 16


class StoredGrid(NamedTuple):
    """Rows of a grid as they are stored.

    `words` are uint32 `[n, K * bits / 32]`, codes from the least significant bit on; `scales` `[n, n_groups]` in the
    storage of their float type; `zero_points` integers of the same shape, or None where `biases` are given instead, in
    the storage of the scales: `w = scales * q + biases`.
    """

    words: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None
    biases: np.ndarray | None = None


class Columns(NamedTuple):
    """Which group each column of a matrix is of, and how MLX can hold that.

    `group_of` int32 `[K]`; `order` the columns in the order that makes groups contiguous, None where they are; `groups`
    the stored group of each MLX group then, and `group_size` its size: None where there is no legal one.
    """

    group_of: np.ndarray
    order: np.ndarray | None
    groups: np.ndarray | None
    group_size: int | None


def columns_in_groups(K: int, group_size: int) -> Columns:
    """Columns in groups one after another, the last one may be shorter."""
    return columns_of(np.arange(K, dtype=np.int32) // np.int32(group_size))


def columns_of(group_of: np.ndarray) -> Columns:
    """Columns whose groups are `group_of`, int32 `[K]`: contiguous as they are, or once they are sorted, or not."""
    group_size = _legal_group(group_of)
    if group_size is not None:
        return Columns(group_of, None, group_of[::group_size], group_size)
    order = np.argsort(group_of, kind="stable").astype(np.int32)
    group_size = _legal_group(group_of[order])
    if group_size is None:
        return Columns(group_of, None, None, None)
    return Columns(group_of, order, group_of[order][::group_size], group_size)


def _legal_group(group_of: np.ndarray) -> int | None:
    """The largest group size of MLX whose groups are each of one stored group."""
    for group_size in sorted(AFFINE_GROUP_SIZES, reverse=True):
        if len(group_of) and len(group_of) % group_size == 0:
            groups = group_of.reshape(-1, group_size)
            if (groups == groups[:, :1]).all():
                return group_size
    return None


class Grid(Packed):
    """A matrix of `bits`-bit codes with one scale and one zero point (or bias) for each group of a row.

    Args:
        info: name, shape `[N, K]`, dtype (the format's name) and bytes; the rest is filled in here.
        parts: stored tensors.
        bits: of a code.
        columns: the group of each column.
        scales_dtype: `F16`, `BF16` or `F32`, as stored.
        exact_biases: whether biases of that type are exact: they are stored, or zero points are powers of two.
    """

    def __init__(
        self,
        info: TensorInfo,
        parts: tuple[str, ...],
        *,
        bits: int,
        columns: Columns,
        scales_dtype: str,
        exact_biases: bool,
    ):
        self.bits = bits
        self.columns = columns
        self.stored_dtype = scales_dtype
        spec = None
        if bits in AFFINE_BITS and columns.group_size is not None and info.shape[-1] % PACKED_CODES == 0:
            spec = QuantSpec(bits, columns.group_size)
        own = {"spec": spec} if columns.order is None else {"permuted_spec": spec}
        exact = scales_dtype if exact_biases else "F32"
        fields = {"name": info.name, "shape": info.shape, "dtype": info.dtype, "nbytes": info.nbytes}
        super().__init__(TensorInfo(**fields, **own, scales_dtype=exact if spec else None), parts)

    @abstractmethod
    def stored(self, raw: RawTensors, rows: slice | None) -> StoredGrid:
        """Codes, scales and zero points of some rows.

        Raises:
            FormatError: what is stored means nothing.
        """

    def values(self, raw: RawTensors, rows: slice | None) -> np.ndarray:
        """`scale * (q - z)`, or `scale * q + bias`, in float32 `[n, K]`."""
        grid = self._checked(raw, rows)
        K = self.info.shape[-1]
        out = np.empty((len(grid.words), K), np.float32)
        # Groups one after another are scaled as such, columns in another order each for itself.
        contiguous = self.columns.groups is not None and self.columns.order is None
        index = self.columns.groups if contiguous else self.columns.group_of

        def of_columns(values: np.ndarray) -> np.ndarray:
            return values[:, index, None] if contiguous else values[:, index]

        step = max(_CHUNK // max(K, 1), 1)
        for start in range(0, len(out), step):
            part = slice(start, start + step)
            q = unpack_words(grid.words[part], self.bits).astype(np.float32)
            groups = q.reshape(len(q), len(index), -1) if contiguous else q
            scales = of_columns(to_float32(grid.scales[part], self.stored_dtype))
            if grid.biases is not None:
                groups *= scales
                groups += of_columns(to_float32(grid.biases[part], self.stored_dtype))
            else:
                groups -= of_columns(grid.zero_points[part].astype(np.float32))
                groups *= scales
            out[part] = q
        return out

    def codes(self, raw: RawTensors, rows: slice | None) -> QuantizedTensor:
        """The same codes, a group's scale and bias once for each group of MLX, columns in the order of `order`."""
        spec = self.info.spec or self.info.permuted_spec
        if spec is None:
            raise FormatError(f"no MLX grid holds these {self.info.dtype} weights")
        grid = self._checked(raw, rows)
        dtype, biases = self.info.scales_dtype, grid.biases
        scales = grid.scales
        if biases is None:
            wide = to_float32(scales, self.stored_dtype)
            exact = wide * -grid.zero_points.astype(np.float32)
            # -0.0 of a zero point 0 is 0.
            exact += np.float32(0)
            biases = from_float32(exact, dtype)
            if dtype != self.stored_dtype or not np.array_equal(to_float32(biases, dtype), exact):
                dtype, scales, biases = "F32", wide, exact
        words = self._ordered(grid.words)
        groups = self.columns.groups
        shape = (len(words), self.info.shape[-1])
        return QuantizedTensor(words, scales[:, groups], biases[:, groups], spec, shape, dtype)

    def order(self, raw: RawTensors) -> np.ndarray:
        return self.columns.order

    def _ordered(self, words: np.ndarray) -> np.ndarray:
        if self.columns.order is None:
            return words
        K = self.info.shape[-1]
        out = np.empty_like(words)
        step = max(_CHUNK // max(K, 1), 1)
        for start in range(0, len(words), step):
            part = slice(start, start + step)
            out[part] = affine.pack(unpack_words(words[part], self.bits)[:, self.columns.order], self.bits)
        return out

    def _checked(self, raw: RawTensors, rows: slice | None) -> StoredGrid:
        grid = self.stored(raw, rows)
        for what, array in (("scale", grid.scales), ("bias", grid.biases)):
            if array is not None and array.size and not all_finite(array):
                raise FormatError(f"a {what} is NaN or infinite")
        scales = to_float32(grid.scales, self.stored_dtype)
        if not scales.all():
            raise FormatError("a scale is 0: the group's codes would mean nothing")
        # Zero points are at most 2^bits, and so are codes: beyond this, weights or biases would be infinite.
        most = np.finfo(np.float32).max / 2 ** (self.bits + 1)
        if scales.size and np.abs(scales).max() > most:
            raise FormatError(f"a scale is {np.abs(scales).max():.3g}: {self.bits}-bit codes times it exceed float32")
        return grid
