"""Bits by budget: for every tensor one of several grids, so that the whole fits and costs least. Pure.

Costs add up, bytes add up: a knapsack with one choice for each tensor. Of a tensor's options those on the lower convex
hull of cost over bytes are taken up in the order of what a byte buys, over all tensors (the greedy solution of the
linear relaxation, which is optimal but for the last step; Kellerer, Pferschy, Pisinger, "Knapsack Problems", 2004,
chapter 11). What is left of the budget is then filled with single steps that still fit, hull or not.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from mlxq.errors import PlanError
from mlxq.types import QuantSpec, TensorPlan

#: One of MLX's, or the name of a ggml type.
Grid: TypeAlias = QuantSpec | str


@dataclass(frozen=True)
class Option:
    """One grid that a tensor may get; its bytes; what it costs, in nats per token."""

    grid: Grid
    nbytes: int
    cost: float


def is_matrix_to_quantize(plan: TensorPlan) -> bool:
    """Whether a tensor is a layer's and its codes are made anew, so that its grid can be chosen."""
    return plan.action in ("quantize", "requantize") and plan.info.module != "other"


def allocate(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """The option for each tensor, of least total cost within `budget` bytes.

    Raises:
        PlanError: even the smallest options exceed the budget; the message says what they take.
    """
    hulls = {name: _hull(choices) for name, choices in options.items()}
    chosen = dict.fromkeys(hulls, 0)
    used = sum(hull[0].nbytes for hull in hulls.values())
    if used > budget:
        raise PlanError(
            f"the quantized tensors take at least {used:,} bytes with the fewest bits that are legal; {budget:,} are"
            " left for them"
        )
    steps = [(-_gain(hull, 0), name) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, name = heapq.heappop(steps)
        hull, i = hulls[name], chosen[name]
        more = hull[i + 1].nbytes - hull[i].nbytes
        if used + more > budget:
            # Dearer steps of other tensors may be smaller and still fit.
            continue
        chosen[name], used = i + 1, used + more
        if i + 2 < len(hull):
            heapq.heappush(steps, (-_gain(hull, i + 1), name))
    result = {name: hulls[name][i] for name, i in chosen.items()}
    return _filled(options, result, budget - used)


def _hull(options: Sequence[Option]) -> list[Option]:
    """The lower convex hull of cost over bytes, from the smallest option on; costs fall."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.cost)):
        if hull and option.cost >= hull[-1].cost:
            continue
        if hull and option.nbytes == hull[-1].nbytes:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(a: Option, b: Option) -> float:
    """What a byte buys between two options."""
    return (a.cost - b.cost) / (b.nbytes - a.nbytes)


def _gain(hull: Sequence[Option], i: int) -> float:
    return _slope(hull[i], hull[i + 1])


def _filled(options: Mapping[str, Sequence[Option]], result: dict[str, Option], room: int) -> dict[str, Option]:
    """Spend what is left on the single exchanges that gain most and fit."""
    while True:
        best: tuple[float, str, Option] | None = None
        for name, now in result.items():
            for option in options[name]:
                more = option.nbytes - now.nbytes
                gain = now.cost - option.cost
                if 0 < more <= room and gain > 0 and (best is None or gain > best[0]):
                    best = gain, name, option
        if best is None:
            return result
        _, name, option = best
        room -= option.nbytes - result[name].nbytes
        result[name] = option
