"""Threads that use mlx: its streams belong to them and must be given back before they end.

Otherwise mlx 0.32 may abort the process at exit (`terminate called without an active exception`). A thread that has
given its streams back cannot use mlx again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def leave_mlx() -> None:
    """Give this thread's streams back; the last thing that a thread does with mlx."""
    mx = sys.modules.get("mlx.core")
    if mx is not None and hasattr(mx, "clear_streams"):
        mx.synchronize()
        mx.clear_streams()


def in_own_thread(compute: Callable[[], T]) -> T:
    """Run `compute` in a thread of its own, which leaves mlx afterwards; returns its result or raises its error."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(compute())
        except BaseException as e:
            future.set_exception(e)
        finally:
            leave_mlx()

    thread = Thread(target=run, name="mlxq-compute")
    thread.start()
    thread.join()
    return future.result()


def map_in_threads(compute: Callable[[T], R], items: Iterable[T], n_threads: int) -> Iterator[R]:
    """Results of `compute` for each item, as they are finished, computed by `n_threads` threads of its own.

    Items are taken one at a time as threads become free. The first error stops the others after their current item,
    and is raised here; so does leaving the iterator.
    """
    remaining, lock, stop = iter(items), Lock(), Event()
    results: SimpleQueue[Future[R] | None] = SimpleQueue()

    def take() -> tuple[T] | None:
        with lock:
            for item in remaining:
                return (item,)
        return None

    def run() -> None:
        try:
            while not stop.is_set() and (item := take()) is not None:
                future: Future[R] = Future()
                try:
                    future.set_result(compute(*item))
                except BaseException as e:
                    future.set_exception(e)
                    stop.set()
                results.put(future)
        finally:
            leave_mlx()
            results.put(None)

    threads = [Thread(target=run, name=f"mlxq-{i}") for i in range(n_threads)]
    try:
        for thread in threads:
            thread.start()
        running = n_threads
        while running:
            future = results.get()
            if future is None:
                running -= 1
            else:
                yield future.result()
    finally:
        stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
