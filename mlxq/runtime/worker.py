"""The one thread that computes: mlx's streams belong to threads, so all generation runs on the same one, in turn.

Callers see an ordinary iterator; items reach it through a bounded queue. Leaving the iterator (an exception, Ctrl-C,
`close`, garbage collection) asks the work to stop before its next item.
"""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

#: Items computed ahead of the caller.
_AHEAD = 16
#: Seconds between looks at whether the caller has left, while the queue is full.
_POLL = 0.05

_lock = threading.Lock()
_jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
_thread: threading.Thread | None = None
_exiting = threading.Event()


class _End:
    """Last thing in a job's queue: why it ended."""

    def __init__(self, error: BaseException | None = None):
        self.error = error


def iterate(work: Callable[[threading.Event], Iterator[T]]) -> Iterator[T]:
    """Run `work(stop)` on the worker thread and yield its items here.

    Nothing runs before the first item is asked for. `work` must look at `stop` before each item. Its exceptions are
    raised here. Work waits its turn behind the work of others.
    """
    items: queue.Queue[Any] = queue.Queue(maxsize=_AHEAD)
    stop = threading.Event()
    _submit(lambda: _run(work, items, stop))
    try:
        while True:
            item = items.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        stop.set()


def _run(work: Callable[[threading.Event], Iterator[Any]], items: queue.Queue[Any], stop: threading.Event) -> None:
    def put(item: Any) -> bool:
        while not (stop.is_set() or _exiting.is_set()):
            try:
                items.put(item, timeout=_POLL)
                return True
            except queue.Full:
                continue
        return False

    error = None
    try:
        for item in () if stop.is_set() else work(stop):
            if not put(item):
                return
    except BaseException as e:
        error = e
    put(_End(error))


def _submit(job: Callable[[], None]) -> None:
    global _thread
    with _lock:
        if _thread is None or not _thread.is_alive():
            if _thread is None:
                atexit.register(_finish)
            _thread = threading.Thread(target=_loop, name="mlxq-worker", daemon=True)
            _thread.start()
    _jobs.put(job)


def _loop() -> None:
    while (job := _jobs.get()) is not None:
        job()
        # Do not keep the last job's model alive while waiting for the next one.
        del job


def _finish() -> None:
    """At exit the thread must not be inside mlx while the interpreter goes away."""
    _exiting.set()
    _jobs.put(None)
    if _thread is not None:
        _thread.join(timeout=10)
