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
from typing import Any, NamedTuple, Protocol

from mlxq.architectures.parameters import ParameterMap
from mlxq.errors import FormatError
from mlxq.ops.threads import map_in_threads
from mlxq.plan.planner import Plan
from mlxq.types import CancelToken, Progress, ProgressCallback, TensorPlan
from mlxq.writers.laid_out import HASH_PIECE, LaidOutFiles, sha256

#: Weights that one thread has in hand: enough to amortize calls, few enough to stay far below a tensor.
CHUNK_WEIGHTS = 1 << 21
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


class Target(Protocol):
    """What a container format makes of a planned tensor."""

    def open(self, directory: Path) -> LaidOutFiles:
        """Lay the files out in `directory`."""

    def parts(
        self, plan: TensorPlan, rows: slice | None, check: Callable[[], None]
    ) -> Iterator[tuple[str, int, memoryview]]:
        """What is stored for these rows: name of the stored tensor, first byte in it, bytes. `check` may raise."""


class WeightStream:
    """Converts and writes the weights of a plan.

    Raises (from `write`):
        FormatError: weights that are not finite, or exceed the asked dtype; the message names the tensor.
        OutputError: the disk is full, or the place cannot be written.
        Cancelled: through `cancel`.
    """

    def __init__(
        self,
        parameters: ParameterMap,
        plan: Plan,
        target: Target,
        progress: ProgressCallback | None,
        cancel: CancelToken,
        *,
        is_whole: Callable[[TensorPlan], bool] = lambda plan: False,
    ):
        """`is_whole` says which tensors the target takes at once."""
        self._is_whole = is_whole
        self.parameters = parameters
        self.plan = plan
        self.target = target
        self.progress = progress
        self.cancel = cancel
        self._budget = _Budget(_BUDGET)

    def write(self, directory: Path) -> Digests:
        """Write the target's files into `directory`."""
        writer = self.target.open(directory)
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
            yield from (_Chunk(p, rows) for rows in self._row_ranges(p))
            done += p.info.size
        yield from files[digested:]

    def _row_ranges(self, plan: TensorPlan) -> Iterator[slice | None]:
        return iter([None]) if self._is_whole(plan) else plan.info.row_ranges(CHUNK_WEIGHTS)

    def _run(self, writer: LaidOutFiles, work: Path | _Chunk) -> tuple[str, str | int]:
        """Digest of a source file, or the source bytes that were converted."""
        self.cancel.check()
        if isinstance(work, Path):
            return work.name, sha256(work, self.cancel.check)
        name = work.plan.info.name
        try:
            with self._budget.hold(*self._memory(work)):
                for stored, offset, data in self.target.parts(work.plan, work.rows, self.cancel.check):
                    writer.write(stored, data, offset)
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
