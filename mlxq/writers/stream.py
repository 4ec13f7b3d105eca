"""Every planned tensor from source to shard, some rows at a time, on a few threads.

In memory are a few chunks of rows, or the part of a tensor that the source can only give whole (one expert of a
stack); a budget in bytes holds threads back where that part is large. So the peak does not depend on the model's depth.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlxq.architectures.parameters import ParameterMap
from mlxq.errors import FormatError
from mlxq.formats import floats
from mlxq.ops.threads import map_in_threads
from mlxq.plan.planner import Plan
from mlxq.quantizers import rtn
from mlxq.types import CancelToken, Progress, ProgressCallback, QuantizedTensor, TensorPlan
from mlxq.writers import mlx as mlx_writer
from mlxq.writers.safetensors import HASH_PIECE, SafetensorsWriter, sha256

#: Weights that one thread has in hand: enough to amortize calls, few enough to stay far below a tensor.
_CHUNK_WEIGHTS = 1 << 21
#: Source bytes that all threads together may have in hand.
_BUDGET = 256 << 20
_MAX_THREADS = 8


class Digests(NamedTuple):
    """SHA-256 of each file written and of each source file, by name."""

    written: dict[str, str]
    source: dict[str, str]


class _Chunk(NamedTuple):
    """Rows of the first axis of a planned tensor."""

    plan: TensorPlan
    rows: slice | None

    @property
    def size(self) -> int:
        """Weights that are read at once."""
        shape = self.plan.info.shape
        return (self.rows.stop - self.rows.start) * prod(shape[1:]) if self.rows else prod(shape)


class WeightStream:
    """Converts and writes the weights of a plan. `notes` afterwards says what rounding kept tensors cost.

    Raises (from `write`):
        FormatError: weights that are not finite, or exceed the asked dtype; the message names the tensor.
        OutputError: the disk is full, or the place cannot be written.
        Cancelled: through `cancel`.
    """

    def __init__(self, parameters: ParameterMap, plan: Plan, progress: ProgressCallback | None, cancel: CancelToken):
        self.parameters = parameters
        self.plan = plan
        self.progress = progress
        self.cancel = cancel
        self.notes: list[str] = []
        self._rounding: dict[str, float] = {}
        self._lock = threading.Lock()
        self._budget = _Budget(_BUDGET)

    def write(self, directory: Path) -> Digests:
        """Write the shards and their index into `directory`."""
        writer = SafetensorsWriter(directory, [mlx_writer.entries(p) for p in self.plan.tensors])
        total = sum(p.info.nbytes for p in self.plan.tensors)
        done, source = 0, {}
        results = map_in_threads(
            lambda work: self._run(writer, work), self._work(), min(os.cpu_count() or 1, _MAX_THREADS)
        )
        try:
            with contextlib.closing(results):
                for name, outcome in results:
                    if isinstance(outcome, str):
                        source[name] = outcome
                        continue
                    done += outcome
                    self._report("quantize", min(done, total), total, name)
            self._note_rounding()
            return Digests(writer.close(self._hashing()), source)
        finally:
            writer.abort()

    def _report(self, stage: Any, done: int, total: int, item: str) -> None:
        if self.progress:
            self.progress(Progress(stage, done, total, "bytes", item))

    def _hashing(self) -> Callable[[], None]:
        """What the writer calls before it hashes each piece of a shard."""
        done = 0

        def advance() -> None:
            nonlocal done
            self.cancel.check()
            done += HASH_PIECE
            self._report("write", min(done, self.plan.nbytes), self.plan.nbytes, "")

        return advance

    def _work(self) -> Iterator[Path | _Chunk]:
        """Chunks in the model's order, and between them the source files to digest.

        A digest comes near the chunks of its file, while the system may still have it in memory.
        """
        files = self.parameters.checkpoint.files()
        total = sum(p.info.size for p in self.plan.tensors)
        done, digested = 0, 0
        for p in self.plan.tensors:
            while digested < len(files) and done * len(files) >= digested * total:
                yield files[digested]
                digested += 1
            yield from (_Chunk(p, rows) for rows in p.info.row_ranges(_CHUNK_WEIGHTS))
            done += p.info.size
        yield from files[digested:]

    def _run(self, writer: SafetensorsWriter, work: Path | _Chunk) -> tuple[str, str | int]:
        """Digest of a source file, or the source bytes that were converted."""
        self.cancel.check()
        if isinstance(work, Path):
            return work.name, sha256(work, self.cancel.check)
        name = work.plan.info.name
        try:
            with self._budget.hold(*self._memory(work)):
                self._convert(writer, work)
        except FormatError as e:
            raise FormatError(f"{name}: {e}") from e
        return name, work.plan.info.nbytes * work.size // max(work.plan.info.size, 1)

    def _memory(self, chunk: _Chunk) -> tuple[object, int]:
        """What a chunk needs, in bytes, and with which other chunks it shares that.

        A computed tensor is made whole, beside the tensors that it is made of; all its chunks read the same array.
        """
        info = chunk.plan.info
        if self.parameters.is_computed(info.name):
            return info.name, 2 * info.nbytes
        return object(), 4 * chunk.size

    def _convert(self, writer: SafetensorsWriter, chunk: _Chunk) -> None:
        plan, rows = chunk.plan, chunk.rows
        entries = mlx_writer.entries(plan)
        if plan.action == "repack":
            q = self.parameters.read_quantized(plan.info.name, rows)
            return _write(writer, entries, _parts(q), _before(entries, plan, rows))
        w = self.parameters.read(plan.info.name, rows)
        offsets = _before(entries, plan, rows)
        if plan.spec is None:
            return _write(writer, entries, [self._cast(plan, w)], offsets)
        matrix = w.reshape(-1, w.shape[-1])
        step = max(_CHUNK_WEIGHTS // matrix.shape[1], 1)
        for start in range(0, len(matrix), step):
            self.cancel.check()
            parts = _parts(rtn.quantize(matrix[start : start + step], plan.spec, plan.dtype))
            _write(writer, entries, parts, offsets)
            offsets = [o + part.nbytes for o, part in zip(offsets, parts, strict=True)]

    def _cast(self, plan: TensorPlan, w: np.ndarray) -> np.ndarray:
        """A kept tensor in its stored dtype; what rounding changes is noted."""
        if not floats.all_finite(w):
            raise FormatError("a weight is NaN or infinite")
        dtype = floats.dtype_of(w)
        if dtype == plan.dtype:
            return w
        exact = floats.to_float32(w, dtype)
        cast = floats.from_float32(exact, plan.dtype)
        if not floats.all_finite(cast):
            raise FormatError(f"the weights exceed the range of {plan.dtype}; choose another --dtype")
        largest = np.abs(exact).max(initial=0)
        error = np.abs(floats.to_float32(cast, plan.dtype) - exact).max(initial=0) / largest if largest else 0.0
        with self._lock:
            self._rounding[plan.info.name] = max(self._rounding.get(plan.info.name, 0.0), float(error))
        return cast

    def _note_rounding(self) -> None:
        rounded = {name: error for name, error in self._rounding.items() if error}
        if rounded:
            worst = max(rounded, key=lambda n: rounded[n])
            self.notes.append(
                f"{len(rounded)} kept tensors were rounded to {self.plan.dtype}; the largest error is "
                f"{rounded[worst]:.1e} of the tensor's maximum, in {worst}"
            )


class _Budget:
    """Bytes that may be held at once; holders of the same key share one share.

    A request larger than the whole budget waits until it is alone.
    """

    def __init__(self, nbytes: int):
        self._total = self._free = nbytes
        self._holders: dict[object, int] = {}
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, key: object, nbytes: int) -> Iterator[None]:
        nbytes = min(nbytes, self._total)
        with self._changed:
            self._changed.wait_for(lambda: key in self._holders or self._free >= nbytes)
            if key not in self._holders:
                self._holders[key] = 0
                self._free -= nbytes
            self._holders[key] += 1
        try:
            yield
        finally:
            with self._changed:
                self._holders[key] -= 1
                if not self._holders[key]:
                    del self._holders[key]
                    self._free += nbytes
                self._changed.notify_all()


def _before(entries: list[Any], plan: TensorPlan, rows: slice | None) -> list[int]:
    """Bytes of each stored tensor before these rows."""
    return [e.nbytes // plan.info.shape[0] * rows.start if rows else 0 for e in entries]


def _parts(q: QuantizedTensor) -> list[np.ndarray]:
    return [np.ascontiguousarray(a) for a in (q.w_q, q.scales, q.biases)]


def _write(writer: SafetensorsWriter, entries: list[Any], parts: list[np.ndarray], offsets: list[int]) -> None:
    for entry, part, offset in zip(entries, parts, offsets, strict=True):
        writer.write(entry.name, part.data, offset)
