"""Clocks: the median time of a product, and how fast this machine copies memory."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from statistics import median
from time import perf_counter
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxq.evaluate.kernels.matrices import Product

#: Passes, the seconds that one should take, and those after which no further one is begun.
_PASSES = 7
_PASS_SECONDS = 0.05
_SECONDS = 1.0
#: Products of a pass at most, and bytes of their outputs.
_MOST_PRODUCTS = 2000
_OUTPUTS = 1 << 28
#: Bytes that are copied, and how often.
_COPIED = {"gpu": 1 << 29, "cpu": 1 << 27}
_COPIES = 9


class Clocked(NamedTuple):
    """Seconds of one product, the median over `passes`."""

    seconds: float
    passes: int


def clock(product: Product) -> Clocked:
    """Time a product, its copies of the weights in turn.

    Of lazy ones a pass evaluates many at once, as a GPU's queue holds those of a token; its time begins when all of
    them have been described. The first product is not counted (kernels are compiled for it), unless it took so long
    that it is all there is.
    """
    copies = cycle(range(product.n_copies))
    first, nbytes = _pass(product, [next(copies)])
    if first > _SECONDS:
        return Clocked(first, 1)
    once, _ = _pass(product, [next(copies)])
    fitting = max(_OUTPUTS // max(nbytes, 1), 1) if product.lazy else _MOST_PRODUCTS
    n = min(max(int(_PASS_SECONDS / once), 1), fitting, _MOST_PRODUCTS)
    times: list[float] = []
    while len(times) < _PASSES and sum(times) * n < _SECONDS:
        times.append(_pass(product, list(islice(copies, n)))[0] / n)
    return Clocked(median(times), len(times))


def _pass(product: Product, copies: list[int]) -> tuple[float, int]:
    """Seconds of the products with some copies, and bytes of one output."""
    if not product.lazy:
        begun = perf_counter()
        for i in copies:
            y = product.run(i)
        return perf_counter() - begun, y.nbytes
    ys = [product.run(i) for i in copies]
    begun = perf_counter()
    mx.eval(ys)
    mx.synchronize()
    return perf_counter() - begun, ys[0].nbytes


def copy_bandwidth() -> float:
    """Bytes a second that this machine copies: read and written ones both counted.

    On a GPU by a kernel that reads and writes each number once; on a CPU by all processors that this process may use.
    """
    return max(_gpu_copies() if on_gpu() else _cpu_copies())


def on_gpu() -> bool:
    """Whether mlx computes on a GPU by default."""
    return mx.default_device().type == mx.DeviceType.gpu


def _gpu_copies() -> list[float]:
    a = mx.zeros(_COPIED["gpu"] // 4)
    rates = []
    for _ in range(_COPIES):
        b = -a
        begun = perf_counter()
        mx.eval(b)
        mx.synchronize()
        rates.append(2 * a.nbytes / (perf_counter() - begun))
        del b
    return rates[1:]


def _cpu_copies() -> list[float]:
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    source = np.ones(_COPIED["cpu"], np.uint8)
    target = np.ones_like(source)
    parts = list(zip(np.array_split(source, n), np.array_split(target, n), strict=True))
    rates = []
    with ThreadPoolExecutor(n) as threads:
        for _ in range(_COPIES):
            begun = perf_counter()
            list(threads.map(lambda pair: np.copyto(pair[1], pair[0]), parts))
            rates.append(2 * source.nbytes / (perf_counter() - begun))
    return rates[1:]
