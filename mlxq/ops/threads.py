"""Threads that use mlx: its streams belong to them and must be given back before they end.

Otherwise mlx 0.32 may abort the process at exit (`terminate called without an active exception`). A thread that has
given its streams back cannot use mlx again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


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
