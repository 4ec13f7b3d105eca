"""Gradients of a block's matrices: what a change of their weights does to whatever is differentiated."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxq.calibration.observe import rows_of_experts, watched
from mlxq.runtime.block_layout import Proxy
from mlxq.runtime.layers import with_float_weight
from mlxq.runtime.weights import on_accelerator, to_mlx


class WeightGradients:
    """The matrices of a block while it computes with other weights, and their gradients.

    Attributes:
        found: parameter name -> float32 gradient, in the shape of the weights, summed since `clear`. What is missing
            was not run backwards, or multiplies in a way that is not known.
    """

    def __init__(self) -> None:
        self.found: dict[str, np.ndarray] = {}
        self._layers: dict[str, _Differentiated] = {}

    def put(self, weights: Mapping[str, np.ndarray]) -> None:
        """Let the block compute with these, float32."""
        for name, w in weights.items():
            self._layers[name].put(to_mlx(w))

    def clear(self) -> None:
        self.found = {}

    @contextlib.contextmanager
    def of(self, owner: Any, prefix: str, names: Sequence[str]) -> Iterator[None]:
        """Layers whose weights are `names`, in `owner` whose path in the model is `prefix`, while the `with` lasts.

        The layers are left with the weights that they were given last.
        """
        with contextlib.ExitStack() as stack:
            for name in names:
                parent: Any = None
                place: Any = owner
                for part in name.removesuffix(".weight").removeprefix(f"{prefix}.").split("."):
                    parent, at = place, int(part) if isinstance(place, list) else part
                    place = parent[at]
                layer = _Differentiated(place, name, self._add)
                parent[at] = self._layers[name] = layer
                stack.callback(_give_back, parent, at, layer)
            yield

    def _add(self, name: str, gradient: np.ndarray | None, expert: int | None, shape: tuple[int, ...]) -> None:
        total = self.found.setdefault(name, np.zeros(shape, np.float32))
        if expert is None:
            total += gradient
        else:
            total[expert] += gradient


def _give_back(parent: Any, at: Any, layer: _Differentiated) -> None:
    parent[at] = layer.unread


class _Differentiated(Proxy):
    """Stands where a matrix layer was."""

    def __init__(self, layer: nn.Module, name: str, add: Callable[..., None]):
        super().__init__(layer)
        self._name = name
        self._add = add

    def put(self, weight: mx.array) -> None:
        self._module = with_float_weight(self._module, weight)

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        y = self._module(x, *args, **kwargs)
        routed = bool(args) and isinstance(args[0], mx.array)
        # Not by which of the matrices rows are multiplied, nor by which weights, is known of layers of other kinds.
        if (self._module.weight.ndim > 2 and not routed) or "scales" in self._module:
            return y
        rows, which, _ = rows_of_experts(x, args[0]) if routed else (x, None, 1)
        kept = mx.stop_gradient(rows)
        return watched(y, lambda gradient: self._take(kept, which, gradient))

    def _take(self, x: mx.array, experts: np.ndarray | None, gradient: mx.array) -> None:
        x, g = (a.reshape(-1, a.shape[-1]).astype(mx.float32) for a in (x, gradient))
        shape = tuple(self._module.weight.shape)
        if experts is None:
            self._add(self._name, _product(g, x), None, shape)
            return
        for expert in np.unique(experts):
            rows = mx.array(np.flatnonzero(experts == expert))
            self._add(self._name, _product(g[rows], x[rows]), int(expert), shape)


def _product(g: mx.array, x: mx.array) -> np.ndarray:
    """`g.T @ x`, by BLAS on the CPU, where mlx's own product is slow."""
    return np.asarray(g.T @ x) if on_accelerator() else np.asarray(g).T @ np.asarray(x)
