"""The one thread that computes: mlx's streams belong to threads, so all generation runs on the same one, in turn.

Callers see an ordinary iterator. The worker computes an item for one caller, then for the next, and a few ahead of
each, so iterators may be open side by side and in any threads, and a short text does not wait for a long one. Leaving
an iterator (an exception, Ctrl-C, `close`, garbage collection) ends its work before the next item.
"""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

from mlxq.ops.threads import leave_mlx
from mlxq.runtime.memory import WiredLimit

T = TypeVar("T")

#: Items computed ahead of a caller.
_AHEAD = 16


class _Job(Generic[T]):
    """Work in progress. All attributes are read and changed under `_changed`, except `work`, which is the worker's."""

    def __init__(self, work: Generator[T, None, None]):
        self.work = work
        self.items: deque[T] = deque()
        self.ended = self.abandoned = False
        self.error: BaseException | None = None

    def runnable(self) -> bool:
        return self.abandoned or len(self.items) < _AHEAD


_changed = threading.Condition()
_jobs: list[_Job] = []
_thread: threading.Thread | None = None
_exiting = False


def iterate(work: Generator[T, None, None]) -> Iterator[T]:
    """Run a generator on the worker thread and yield its items here. Its exceptions are raised here.

    Nothing runs before the first item is asked for.
    """
    job = _Job(work)
    _submit(job)
    try:
        while True:
            with _changed:
                _changed.wait_for(lambda: job.items or job.ended)
                if not job.items:
                    break
                item = job.items.popleft()
                _changed.notify_all()
            yield item
        if job.error is not None:
            # The traceback refers to this frame, and this frame must not to the error: such a ring would keep the
            # model in memory until the garbage collector finds it.
            error, job.error = job.error, None
            try:
                raise error
            finally:
                del error
    finally:
        with _changed:
            job.abandoned = True
            _changed.notify_all()


def _submit(job: _Job) -> None:
    global _thread
    with _changed:
        if _thread is None or not _thread.is_alive():
            if _thread is None:
                atexit.register(_finish)
            _thread = threading.Thread(target=_loop, name="mlxq-worker", daemon=True)
            _thread.start()
        _jobs.append(job)
        _changed.notify_all()


def _loop() -> None:
    limit = WiredLimit()
    while (job := _next_job(limit)) is not None:
        limit.raise_()
        _advance(job)
        # A finished job's model must not stay alive while this thread waits.
        del job
    leave_mlx()


def _next_job(limit: WiredLimit) -> _Job | None:
    """Wait for work; None at exit."""
    with _changed:
        idle = not _jobs
    if idle:
        limit.restore()
    with _changed:
        _changed.wait_for(lambda: _exiting or any(job.runnable() for job in _jobs))
        if _exiting:
            return None
        job = next(job for job in _jobs if job.runnable())
        # The others first, next time.
        _jobs.remove(job)
        _jobs.append(job)
        return job


def _advance(job: _Job) -> None:
    """Compute one item of a job, or end it."""
    items, ended, error = [], True, None
    try:
        if job.abandoned:
            job.work.close()
        else:
            items.append(next(job.work))
            ended = False
    except StopIteration:
        pass
    except BaseException as e:
        error = e
    with _changed:
        job.items.extend(items)
        if ended:
            job.ended, job.error = True, error
            _jobs.remove(job)
        _changed.notify_all()
    # Its traceback refers to this frame.
    del error


def _finish() -> None:
    """At exit the thread must not be inside mlx while the interpreter goes away."""
    global _exiting
    with _changed:
        _exiting = True
        _changed.notify_all()
    if _thread is not None:
        _thread.join(timeout=10)
