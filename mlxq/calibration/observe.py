"""What goes into the matrices of a block, and what comes back to them: taken down while the block runs.

Every matrix layer is wrapped for the time of a `with`. Its inputs' second moments are what error feedback needs
(`Moments.hessian`) and their diagonal is an importance matrix. Layers that are given the very same array (query, key
and value projections) share one record. Where the block runs backwards too, the squared gradients at its outputs say
how much each output row matters for the model's predictions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxq.runtime.block_layout import Proxy
from mlxq.runtime.weights import on_accelerator

#: A stack of experts has so many times the rows of one matrix put aside, all its experts together.
_STACK_ASIDE = 4


@dataclass
class Moments:
    """Second moments of the inputs of one matrix, or of each of a stack of experts.

    Attributes:
        total: float32 `[len(held), K, K]`, sums of `x x^T`.
        counts: int `[n]`, rows of x in each; n is 1, or the number of experts.
        held: whose moments these are: all, or those experts whose turn it is.
        squares: float32 `[K]`, sums of squares over the rows of all experts, held or not.
        aside: rows of x that are in none of these sums, to measure on what was made of them, by matrix, in pieces.
    """

    total: np.ndarray
    counts: np.ndarray
    held: range
    squares: np.ndarray
    aside: dict[int, list[np.ndarray]] = field(default_factory=dict)

    @classmethod
    def empty(cls, n: int, K: int, held: range | None = None) -> Moments:
        held = range(n) if held is None else held
        return cls(np.zeros((len(held), K, K), np.float32), np.zeros(n, np.int64), held, np.zeros(K, np.float32))

    def add(
        self,
        x: mx.array,
        experts: np.ndarray | None,
        weights: np.ndarray | None = None,
        aside: int | None = None,
    ) -> None:
        """Count rows of x `[..., K]`; `experts` says for each which expert of a stack it went to.

        `weights` float32 `[rows]`, of mean 1, say how much each counts; experts' rows count alike. With `aside` they
        are not counted, but so many for each matrix are put aside.
        """
        take = self._add if aside is None else partial(self._put_aside, aside)
        rows = x.reshape(-1, x.shape[-1])
        if experts is None:
            if weights is not None:
                rows = rows.astype(mx.float32) * mx.array(np.sqrt(weights))[:, None]
            take(0, rows)
            return
        for expert in np.unique(experts):
            take(int(expert), rows[mx.array(np.flatnonzero(experts == expert))])

    def _put_aside(self, most: int, i: int, rows: mx.array) -> None:
        if i not in self.held:
            return
        if len(rows) > most:
            some = np.random.default_rng(len(rows)).choice(len(rows), most, replace=False)
            rows = rows[mx.array(np.sort(some))]
        self.aside.setdefault(i, []).append(np.array(rows.astype(mx.float32)))

    def _add(self, i: int, rows: mx.array) -> None:
        self.counts[i] += len(rows)
        wide = rows.astype(mx.float32)
        self.squares += np.asarray((wide * wide).sum(axis=0))
        if i not in self.held:
            return
        if on_accelerator():
            self.total[i - self.held.start] += np.asarray(wide.T @ wide)
        else:
            # The product of an array with its own transpose takes BLAS half the work.
            rows_here = np.asarray(wide)
            self.total[i - self.held.start] += rows_here.T @ rows_here

    def hessian(self, i: int = 0) -> np.ndarray:
        """Mean of `x x^T`, float32 `[K, K]`, of one that is held; 0 where nothing was counted."""
        return self.total[i - self.held.start] / np.float32(max(self.counts[i], 1))

    def rows_aside(self, i: int = 0) -> np.ndarray:
        """Float32 `[n, K]`, of one that is held; n may be 0."""
        return np.concatenate([np.zeros((0, self.total.shape[-1]), np.float32), *self.aside.get(i, ())])

    def mean_squares(self, i: int = 0) -> np.ndarray:
        """Float32 `[K]`, of one that is held."""
        diagonal = np.ascontiguousarray(np.diagonal(self.total[i - self.held.start]))
        return diagonal / np.float32(max(self.counts[i], 1))

    def pooled_squares(self) -> np.ndarray:
        """Float32 `[K]`: mean squares over the rows of all experts."""
        return self.squares / np.float32(max(self.counts.sum(), 1))


@dataclass
class Observations:
    """Records of a block's matrices, by parameter name (`model.layers.3.mlp.up_proj.weight`).

    Attributes:
        moments: of inputs, one object for all matrices with the same input.
        squares: float64 `[N]`, or `[experts, N]`: sums of squared gradients at the outputs.
        by_token: the same summed over outputs instead, float32 `[tokens]` in pieces, as they were run; not for experts.
        order: names in the order in which the block uses them.
        weights: how much each token of what is being run counts in `moments`, by name; None: all alike.
        aside: how many rows for each matrix are put aside of what is being run, which is not counted; None: it is.
        room: bytes for the moments of a stack of experts; None: no limit. Where all have no room, those of some are
            held, the next of them at each `turn`, counted from 0: what is observed has to run again for each.
    """

    moments: dict[str, Moments] = field(default_factory=dict)
    squares: dict[str, np.ndarray] = field(default_factory=dict)
    by_token: dict[str, list[np.ndarray]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    weights: Callable[[str], np.ndarray | None] = field(default=lambda name: None)
    aside: int | None = None
    room: int | None = None
    turn: int = 0

    def _at_once(self, n: int, K: int) -> int:
        return n if self.room is None else min(n, max(1, self.room // (4 * K * K)))

    def held(self, n: int, K: int) -> range:
        """Which of a stack of `n` matrices `[.., K]` have their turn."""
        some = self._at_once(n, K)
        return range(min(self.turn * some, n), min((self.turn + 1) * some, n))

    def waiting(self) -> list[str]:
        """Names of the stacks with experts that have not had their turn."""
        return [name for name in self.order if self.moments[name].held.stop < len(self.moments[name].counts)]

    def by_input(self) -> list[list[str]]:
        """Names in order, those with the same input together."""
        groups: dict[int, list[str]] = {}
        for name in self.order:
            groups.setdefault(id(self.moments[name]), []).append(name)
        return list(groups.values())


@contextlib.contextmanager
def observing(
    owner: Any,
    prefix: str,
    names: Iterable[str],
    into: Observations,
    *,
    inputs: bool = True,
    gradients: bool = False,
    last: str | None = None,
) -> Iterator[None]:
    """Take down what reaches the layers whose weights are `names`, while the `with` lasts.

    Args:
        owner: a block, or another module; `prefix` is its path in the model.
        inputs: count second moments of inputs.
        gradients: sum squared gradients at outputs, when the module is run backwards.
        last: nothing is wanted of what comes after this one's input: the pass is left there, by `InputSeen`.
    """
    latest: list[tuple[mx.array, str]] = []
    with contextlib.ExitStack() as stack:
        for name in names:
            path = name.removesuffix(".weight").removeprefix(f"{prefix}.").split(".")
            parent = owner
            for part in path[:-1]:
                parent = parent[int(part)] if isinstance(parent, list) else parent[part]
            layer = parent[path[-1]]
            parent[path[-1]] = _Observed(layer, name, into, latest, inputs, gradients, name == last)
            stack.callback(parent.__setitem__, path[-1], layer)
        yield


class InputSeen(Exception):
    """Leaves a pass of which no more is wanted."""


class _Observed(Proxy):
    """Stands where a matrix layer was."""

    def __init__(
        self,
        layer: nn.Module,
        name: str,
        into: Observations,
        latest: list[tuple[mx.array, str]],
        inputs: bool,
        gradients: bool,
        is_last: bool,
    ):
        super().__init__(layer)
        self._name = name
        self._into = into
        #: The last input of the block and who had it first.
        self._latest = latest
        self._inputs = inputs
        self._gradients = gradients
        self._is_last = is_last
        #: Called, an embedding looks rows up; its inputs are those of `as_linear`, whatever holds its weights.
        self._looks_up = hasattr(type(getattr(layer, "unread", layer)), "as_linear")

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        routed = bool(args) and isinstance(args[0], mx.array)
        # A stack that is not called with experts is of a kind of which it is not known what multiplies what.
        if self._looks_up or (self._module.weight.ndim > 2 and not routed):
            return self._module(x, *args, **kwargs)
        experts = rows_of_experts(x, args[0]) if routed else None
        return self._seen(x, experts, lambda: self._module(x, *args, **kwargs))

    def as_linear(self, x: mx.array) -> mx.array:
        return self._seen(x, None, lambda: self._module.as_linear(x))

    def _seen(
        self, x: mx.array, experts: tuple[mx.array, np.ndarray, int] | None, compute: Callable[[], mx.array]
    ) -> mx.array:
        if self._name not in self._into.order:
            self._into.order.append(self._name)
        if self._inputs:
            self._count(x, experts)
        if self._is_last:
            raise InputSeen
        y = compute()
        return watched(y, self._square(experts)) if self._gradients else y

    def _count(self, x: mx.array, experts: tuple[mx.array, np.ndarray, int] | None) -> None:
        moments, into = self._into.moments, self._name
        if self._latest and self._latest[0][0] is x:
            moments.setdefault(into, moments[self._latest[0][1]])
            return
        self._latest[:] = [(x, into)]
        rows, which, n = experts or (x, None, 1)
        if into not in moments:
            n, K = n if experts is None else self._module.weight.shape[0], x.shape[-1]
            moments[into] = Moments.empty(n, K, self._into.held(n, K))
        aside = self._into.aside
        if aside and experts:
            aside = -(-_STACK_ASIDE * aside // len(moments[into].counts))
        moments[into].add(rows, which, None if experts else self._into.weights(into), aside)

    def _square(self, experts: tuple[mx.array, np.ndarray, int] | None) -> Callable[[mx.array], None]:
        def take(gradient: mx.array) -> None:
            g = np.asarray(gradient.astype(mx.float32)).reshape(-1, gradient.shape[-1])
            squares = self._into.squares
            if experts is None:
                squares[self._name] = squares.get(self._name, 0) + np.einsum("ij,ij->j", g, g, dtype=np.float64)
                self._into.by_token.setdefault(self._name, []).append(np.einsum("ij,ij->i", g, g))
                return
            total = squares.setdefault(self._name, np.zeros((self._module.weight.shape[0], g.shape[-1])))
            np.add.at(total, experts[1], g.astype(np.float64) ** 2)

        return take


def rows_of_experts(x: mx.array, indices: mx.array) -> tuple[mx.array, np.ndarray, int]:
    """Rows of x as they go to the experts `indices`, the expert of each, and how many rows there are."""
    shape = (*indices.shape, *x.shape[-2:])
    rows = mx.broadcast_to(x, shape).reshape(-1, x.shape[-1])
    which = np.repeat(np.asarray(indices).ravel(), x.shape[-2])
    return rows, which, len(which)


def watched(y: mx.array, take: Callable[[mx.array], None]) -> mx.array:
    """`y`; what comes back to it is shown to `take`."""

    @mx.custom_function
    def same(y: mx.array) -> mx.array:
        # mlx would take the very same array for a constant.
        return y + 0

    @same.vjp
    def show(primals: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        take(cotangent)
        return cotangent

    return same(y)
