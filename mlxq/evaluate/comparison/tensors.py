"""Two models' tensors against each other, as the numbers that their formats stand for, whatever the formats are.

Every tensor is decoded to float32 (`compare_values`), some rows at a time on a few threads. What is stored with the
same bits in the same format is not decoded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from mlxq.architectures.parameters import ParameterMap
from mlxq.evaluate.comparison.values import decoded, equal_bits, is_rounded, read_stored, same_bits, same_with_offset
from mlxq.ops.threads import map_in_threads
from mlxq.types import CancelToken, Progress, ProgressCallback, TensorInfo

#: How two tensors compare: `identical` bit for bit in float32; `equal` as numbers (zeros of either sign; norms to which
#: a GGUF adds 1, once it is added); `rounded`: one side holds what `mx.dequantize` makes of the other; `different`;
#: `shape`: the shapes disagree; `only_a`, `only_b`: the other side has no such tensor.
Status = Literal["identical", "equal", "rounded", "different", "shape", "only_a", "only_b"]

#: Statuses that say that both sides hold the same weights.
SAME = frozenset({"identical", "equal", "rounded"})

#: Weights that one thread has in hand, of each side.
_CHUNK = 1 << 19
_MAX_THREADS = 8
#: Rounded to bfloat16, a product is off by up to 2^-9 of itself, and in a group it may be some times as large as the
#: weight that is left when the offset is added: a larger relative RMSE than this needs no second look.
_ROUNDED_RMSE = 2.0**-6


@dataclass(frozen=True)
class TensorComparison:
    """One tensor of both models, by mlx-lm's parameter name; a side that lacks it has None for shape and format.

    Attributes:
        shape_a, shape_b: counting weights, row-major.
        format_a, format_b: `BF16`, a ggml type, or such as `4-bit g64 F16`: bits, group size, dtype of the scales.
        rmse: `|b - a| / |a|` over the tensor; infinite where a is all 0 and b is not; NaN where a difference is not
            finite, and where nothing was compared.
        max_error: the largest `|b - a|`; NaN as above.
        n_different: weights that are not the same number.
    """

    name: str
    status: Status
    shape_a: tuple[int, ...] | None
    shape_b: tuple[int, ...] | None
    format_a: str | None
    format_b: str | None
    rmse: float = 0.0
    max_error: float = 0.0
    n_different: int = 0

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape_a or self.shape_b or ())

    def within(self, tolerance: float) -> bool:
        """Whether both sides hold the same weights, or such with a relative RMSE up to `tolerance`."""
        return self.status in SAME or (self.status == "different" and self.rmse <= tolerance)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; numbers that are not finite are null."""
        fields = dataclasses.asdict(self)
        for key in ("rmse", "max_error"):
            fields[key] = fields[key] if math.isfinite(fields[key]) else None
        fields["relative_rmse"] = fields.pop("rmse")
        return fields


def format_name(info: TensorInfo) -> str:
    """`BF16`, `Q4_K`, or `4-bit g64 F16` for MLX's affine codes with float16 scales."""
    if info.dtype == "AFFINE" and info.spec is not None:
        return f"{info.spec.bits}-bit g{info.spec.group_size} {info.scales_dtype}"
    return info.dtype


def compare_tensors(
    a: ParameterMap, b: ParameterMap, progress: ProgressCallback | None = None, cancel: CancelToken | None = None
) -> list[TensorComparison]:
    """Every tensor of either model, in the first model's order, then those that only the second has.

    Args:
        a, b: the same model twice, in any formats.
        progress: called with stage `compare` and the bytes stored on both sides.
        cancel: checked between chunks of rows.

    Raises:
        CheckpointError: a tensor cannot be read.
        Cancelled: through `cancel`.
    """
    common = [info for name, info in a.tensors.items() if name in b.tensors and b.tensors[name].shape == info.shape]
    work = _Work(a, b, cancel)
    total = sum(info.nbytes + b.tensors[info.name].nbytes for info in common)
    found: dict[str, _Sums] = {info.name: _Sums() for info in common}
    done = 0.0
    chunks = itertools.chain.from_iterable(work.chunks(info) for info in common)
    with contextlib.closing(map_in_threads(work.compare, chunks, min(os.cpu_count() or 1, _MAX_THREADS))) as results:
        for chunk, sums in results:
            info = chunk.info
            found[info.name] += sums
            done += (info.nbytes + b.tensors[info.name].nbytes) * chunk.size / max(info.size, 1)
            if progress is not None:
                progress(Progress("compare", min(round(done), total), total, "bytes", info.name))
    names = [*a.tensors, *(n for n in b.tensors if n not in a.tensors)]
    return [work.result(name, found.get(name)) for name in names]


class _Chunk(NamedTuple):
    """Rows of the first axis, `size` weights, of a tensor of both models; None for all of it."""

    info: TensorInfo
    rows: slice | None
    size: int


@dataclass(frozen=True)
class _Sums:
    """What is added up over the chunks of a tensor: counts of weights, and the sum of squares of the difference and of
    the first side; of chunks with the same bits the latter is not computed, and `partial` says so."""

    bits_differ: bool = False
    n_different: int = 0
    max_error: float = 0.0
    difference: float = 0.0
    size: float = 0.0
    partial: bool = False

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.bits_differ or other.bits_differ,
            self.n_different + other.n_different,
            # NaN wins on either side.
            float(np.maximum(self.max_error, other.max_error)),
            self.difference + other.difference,
            self.size + other.size,
            self.partial or other.partial,
        )

    @property
    def rmse(self) -> float:
        """Relative to the first side."""
        if not self.n_different:
            return 0.0
        if not (math.isfinite(self.difference) and math.isfinite(self.size)):
            return math.nan
        return math.sqrt(self.difference / self.size) if self.size else math.inf


class _Work:
    """Reads, decodes and compares chunks, from any thread."""

    def __init__(self, a: ParameterMap, b: ParameterMap, cancel: CancelToken | None):
        self.a, self.b = a, b
        self._cancel = cancel
        #: Held while a tensor is read that is made as a whole: one of them at a time.
        self._whole = threading.Lock()

    def _computed(self, name: str) -> bool:
        return self.a.is_computed(name) or self.b.is_computed(name)

    def chunks(self, info: TensorInfo) -> Iterator[_Chunk]:
        """Chunks of a tensor that both have; one, if either side makes it as a whole."""
        if self._computed(info.name):
            yield _Chunk(info, None, info.size)
            return
        row = info.size // max(info.shape[0], 1) if info.shape else 1
        for rows in info.row_ranges(_CHUNK):
            yield _Chunk(info, rows, (rows.stop - rows.start) * row if rows else info.size)

    def compare(self, chunk: _Chunk) -> tuple[_Chunk, _Sums]:
        if not self._computed(chunk.info.name):
            if self._cancel is not None:
                self._cancel.check()
            return chunk, self._rows(chunk.info, chunk.rows)
        with self._whole:
            return chunk, sum((self._rows(chunk.info, rows) for rows in self._parts(chunk.info)), _Sums())

    def _rows(self, info: TensorInfo, rows: slice | None) -> _Sums:
        a, b = (read_stored(p, info.name, rows) for p in (self.a, self.b))
        if same_bits(a, b):
            return _Sums(partial=True)
        return _differences(decoded(a), decoded(b))

    def result(self, name: str, sums: _Sums | None) -> TensorComparison:
        infos = [p.tensors.get(name) for p in (self.a, self.b)]
        shapes = [i.shape if i else None for i in infos]
        formats = [format_name(i) if i else None for i in infos]
        if sums is None:
            status: Status = "only_b" if infos[0] is None else "only_a" if infos[1] is None else "shape"
            return TensorComparison(name, status, *shapes, *formats, math.nan, math.nan)
        if sums.n_different and sums.partial:
            sums = dataclasses.replace(sums, size=self._size(infos[0]))
        status = "different" if sums.n_different else "equal" if sums.bits_differ else "identical"
        if (
            status == "different"
            and sums.rmse <= _ROUNDED_RMSE
            and is_rounded(self.a, self.b, name, self._parts(infos[0]))
        ):
            status = "rounded"
        if status == "different" and same_with_offset(self.a, self.b, name):
            status = "equal"
        return TensorComparison(name, status, *shapes, *formats, sums.rmse, sums.max_error, sums.n_different)

    def _parts(self, info: TensorInfo) -> Iterator[slice | None]:
        for rows in info.row_ranges(_CHUNK):
            if self._cancel is not None:
                self._cancel.check()
            yield rows

    def _size(self, info: TensorInfo) -> float:
        """Sum of squares of a tensor of the first side."""
        return sum(_sum_of_squares(decoded(read_stored(self.a, info.name, rows))) for rows in self._parts(info))


def _differences(a: np.ndarray, b: np.ndarray) -> _Sums:
    """Sums over two flat float32 arrays; a weight that is NaN on both sides is the same on both."""
    bits_differ = not equal_bits(a, b)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        if not bits_differ:
            return _Sums(size=_sum_of_squares(a))
        different = a != b
        if (nan := np.isnan(a) & np.isnan(b)).any():
            different &= ~nan
        n = int(np.count_nonzero(different))
        size = _sum_of_squares(a)
        if not n:
            return _Sums(True, size=size)
        # All others are equal, of which infinities would give NaN.
        difference = b - a if n > a.size // 2 and np.isfinite(size) else b[different] - a[different]
        largest = float(np.abs(difference).max())
        return _Sums(True, n, largest, _sum_of_squares(difference), size)


def _sum_of_squares(x: np.ndarray) -> float:
    """Sum of x^2; in float64 where float32 would lose it or overflow."""
    found = float(np.vdot(x, x))
    if math.isfinite(found) and found > 1e-20 * x.size:
        return found
    wide = x.astype(np.float64)
    return float(np.vdot(wide, wide))
