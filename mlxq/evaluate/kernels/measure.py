"""How long a model's matrix products take here, by our kernels and by mlx's, beside the speed of this machine's memory.

For every distinct matrix of a model (format, shape, dtype) and several numbers of rows of x, both are timed on random
weights: more than caches hold, used in turn. On an Apple GPU that is our Metal kernel against mlx's; elsewhere NumPy
against mlx, both on the CPU. mlx has nothing for ggml blocks: then the yardstick is its product with an affine grid of
as many bits (`matrices.yardstick`). `ops.choices` stores what the table in `ops.dispatch` goes by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxq.api import public
from mlxq.architectures.parameters import ParameterMap
from mlxq.architectures.registry import model_classes
from mlxq.checkpoint.source import open_checkpoint
from mlxq.errors import UsageError
from mlxq.evaluate.kernels.clock import clock, copy_bandwidth, on_gpu
from mlxq.evaluate.kernels.matrices import Matrix, matrices_of, product, random_weights, yardstick
from mlxq.formats.geometry import AFFINE_GROUP_SIZES
from mlxq.ops import choices
from mlxq.ops.dispatch import metal_available
from mlxq.types import CancelToken, Progress, ProgressCallback

#: Rows of x: one token, a few, prompts.
DEFAULT_ROWS = (1, 8, 64, 512)
_MOST_ROWS = 1 << 16
#: Bytes of weights used in turn: more than any cache holds (of Apple's chips 96 MB at most).
_WORKING_SET = {"gpu": 1 << 28, "cpu": 1 << 27}


@dataclass(frozen=True)
class Timing:
    """One back end's time for a product.

    Attributes:
        backend: `metal`, `mlx` or `numpy`.
        weights: what it multiplied by, if that is only a yardstick: `4-bit group 32`, say; else empty.
        seconds: of one product, the median over `passes` passes.
        nbytes: of the weights that a product reads.
    """

    backend: str
    weights: str
    seconds: float
    passes: int
    nbytes: int

    @property
    def bandwidth(self) -> float:
        """Bytes of weights a second."""
        return self.nbytes / self.seconds

    def to_dict(self) -> dict[str, Any]:
        return {
            "backend": self.backend,
            "weights": self.weights or None,
            "seconds": self.seconds,
            "passes": self.passes,
            "weight_bytes": self.nbytes,
            "gb_per_s": round(self.bandwidth / 1e9, 3),
        }


@dataclass(frozen=True)
class KernelTime:
    """A product of `rows` rows of x with one kind of matrix: `ours`, and `mlx`'s where it has one or a yardstick."""

    matrix: Matrix
    rows: int
    ours: Timing
    mlx: Timing | None

    @property
    def ratio(self) -> float | None:
        """Our time as a part of mlx's."""
        return self.ours.seconds / self.mlx.seconds if self.mlx else None

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.matrix.to_dict(),
            "rows": self.rows,
            "ours": self.ours.to_dict(),
            "mlx": self.mlx.to_dict() if self.mlx else None,
            "ours_over_mlx": None if self.ratio is None else round(self.ratio, 4),
        }


@dataclass(frozen=True)
class KernelTimes:
    """What was measured, and where.

    Attributes:
        source: the model.
        device, chip: name of mlx's default device, and its architecture.
        metal: whether our Metal kernels ran.
        copy_bandwidth: bytes a second of a copy, those read and those written both counted.
        left_out: names of matrices that were not timed, with the reason.
    """

    source: str
    device: str
    chip: str
    mlx_version: str
    metal: bool
    copy_bandwidth: float
    times: tuple[KernelTime, ...]
    left_out: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "source": self.source,
            "device": self.device,
            "chip": self.chip,
            "mlx": self.mlx_version,
            "metal": self.metal,
            "copy_gb_per_s": round(self.copy_bandwidth / 1e9, 3),
            "products": [t.to_dict() for t in self.times],
            "left_out": list(self.left_out),
        }

    def measured(self) -> dict[choices.Product, choices.Times]:
        """What `choices.store` takes: products that our Metal kernels and mlx's both compute."""
        found: dict[choices.Product, dict[int, dict[str, float]]] = {}
        for time in self.times:
            m, mlx = time.matrix, time.mlx
            if m.spec is None or mlx is None or time.ours.backend != "metal":
                continue
            key = choices.Product(m.spec.bits, m.spec.group_size, m.dtype, m.N, m.K, m.experts)
            found.setdefault(key, {})[time.rows] = {"metal": time.ours.seconds, "mlx": mlx.seconds}
        return found


@public
def kernel_times(
    source: str | Path,
    *,
    rows: Sequence[int] = DEFAULT_ROWS,
    revision: str | None = None,
    progress: ProgressCallback | None = None,
    cancel: CancelToken | None = None,
) -> KernelTimes:
    """Time the products of a model's quantized matrices. Its headers are read, no weight is.

    Args:
        source: a quantized MLX directory, a GGUF file, or a Hub id of either.
        rows: numbers of rows of x.
        progress: called with stages `download` and `measure`.
        cancel: checked before each matrix.

    Raises:
        CheckpointError: the source cannot be read.
        UsageError: `rows` are not positive, or the model has no quantized matrix.
        Cancelled: through `cancel`.
    """
    rows = sorted(set(rows))
    if not rows or rows[0] < 1 or rows[-1] > _MOST_ROWS:
        got = ", ".join(map(str, rows)) or "none"
        raise UsageError(f"rows of x to measure must be from 1 to {_MOST_ROWS}, got {got}")
    with open_checkpoint(source, revision, progress, accept=model_classes) as checkpoint:
        matrices, left_out = matrices_of(ParameterMap(checkpoint))
    if not matrices:
        raise UsageError(f"{source}: no matrix of this model is quantized, so there is nothing to measure")
    bandwidth = copy_bandwidth()
    times: list[KernelTime] = []
    for done, matrix in enumerate(matrices):
        if cancel is not None:
            cancel.check()
        if progress is not None:
            progress(Progress("measure", done, len(matrices), "matrices", str(matrix)))
        times += _times_of(matrix, rows)
    device = str(mx.device_info().get("device_name", "unknown"))
    version = mx.__version__
    return KernelTimes(
        str(source), device, choices.chip(), version, metal_available(), bandwidth, tuple(times), tuple(left_out)
    )


def _times_of(matrix: Matrix, rows: Sequence[int]) -> list[KernelTime]:
    """By ours, then by mlx: never both back ends' weights in memory."""
    ours = "metal" if metal_available() else "numpy"
    theirs = _of_mlx(matrix)
    own = _timings(matrix, rows, ours, "")
    if theirs is None:
        return [KernelTime(matrix, M, timing, None) for M, timing in zip(rows, own, strict=True)]
    others = _timings(theirs, rows, "mlx", "" if theirs is matrix else str(theirs.spec))
    return [KernelTime(matrix, *both) for both in zip(rows, own, others, strict=True)]


def _of_mlx(matrix: Matrix) -> Matrix | None:
    """What mlx multiplies by in the place of a matrix: itself, or a yardstick; None if it has neither."""
    if matrix.spec is None:
        return yardstick(matrix)
    return matrix if matrix.spec.group_size in AFFINE_GROUP_SIZES else None


def _timings(matrix: Matrix, rows: Sequence[int], backend: str, weights: str) -> list[Timing]:
    working_set = _WORKING_SET["gpu" if on_gpu() else "cpu"]
    held = random_weights(matrix, working_set, for_numpy=backend == "numpy")
    timings = []
    for M in rows:
        run = product(held, M, backend)
        timings.append(Timing(backend, weights, *clock(run), run.nbytes))
    del held, run
    mx.clear_cache()
    return timings
