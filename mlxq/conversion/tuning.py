"""The last stage: codes of a block moved by gradient steps until it gives what the float block gives for float inputs.

What goes into the quantized block is what the quantized blocks before it make of the text, so it makes up for a part of
their errors, too. The loss is the squared error of the block's output: by token and dimension as much as the model's
predictions depend on it where that was measured, else relative to the token's size and the dimension's, so that no
massive activation decides. A block keeps what was tuned where it loses less on sequences that are held out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxq.calibration.observe import Observations, observing
from mlxq.calibration.sensitivity import Sensitivity
from mlxq.calibration.stream import Activations, Block, BlockStream
from mlxq.calibration.weight_gradients import WeightGradients
from mlxq.errors import CalibrationError
from mlxq.quantizers.tuned_grid import Rates, TunedGrid
from mlxq.types import CancelToken, QuantizedTensor

#: Sequences whose gradient a step goes down.
_BATCH = 4
RATES = Rates(scales=2e-3, centres=0.02, codes=0.01)
#: Relative difference of gradients that are the same but for the order of sums in float32.
_SAME = 1e-3
_TINY = 1e-30


@dataclass(frozen=True)
class Weighting:
    """How much squared errors of a block's output count: `tokens` gives float32 `[s, L]` for sequences int `[s]`, or
    None where none was measured; `dimensions` float32 `[D]`."""

    tokens: Callable[[np.ndarray], np.ndarray | None]
    dimensions: np.ndarray

    def of(self, which: np.ndarray, target: mx.array) -> mx.array:
        """Float32 `[s, L, D]` for sequences `which` whose float output is `target`."""
        dimensions = mx.array(self.dimensions)
        tokens = self.tokens(which)
        if tokens is None:
            size = (mx.square(target.astype(mx.float32)) * dimensions).mean(axis=-1)
            return dimensions / mx.maximum(size, _TINY)[..., None]
        return dimensions * mx.array(tokens)[..., None]


class Tuning:
    """Tunes block after block; keeps what the float model makes of the text.

    Args:
        steps: for each block.
        aside: bool `[S]`, sequences that are held out; where none are, all decide.
        seed: of the order of the sequences.
    """

    def __init__(self, steps: int, aside: np.ndarray, seed: int, cancel: CancelToken, rates: Rates = RATES):
        self._steps, self._aside, self._seed, self._cancel, self._rates = steps, aside, seed, cancel, rates
        self._floats: Activations | None = None

    def begin(self, stream: BlockStream) -> None:
        """Before the first block, with the float embedding."""
        stream.embed()
        self._floats = stream.activations

    def run_float(self, block: Block) -> None:
        """Run the float model through a block that still has its own weights."""
        for i, hidden in enumerate(self._floats):
            self._cancel.check()
            self._floats[i] = block(hidden)

    def tuned(
        self,
        block: Block,
        activations: Activations,
        codes: Mapping[str, QuantizedTensor],
        weights: Callable[[str], np.ndarray],
        weighting: Weighting,
        on_step: Callable[[int], None] = lambda done: None,
    ) -> tuple[dict[str, QuantizedTensor], dict[str, Any]]:
        """Codes of the matrices of a block, tuned from `codes` where that lost less, else no codes.

        Args:
            activations: what goes into the quantized block.
            weights: float32 weights by name, which the codes stand for.
            on_step: called after each step.

        Returns:
            The codes; and for JSON the loss before and after on what is held out, and names without a gradient.

        Raises:
            CalibrationError: the block cannot be run backwards.
        """
        grids = {name: TunedGrid(q, weights(name), self._rates) for name, q in codes.items()}
        gradients = WeightGradients()
        judges = np.flatnonzero(self._aside) if self._aside.any() else np.arange(len(self._aside))
        missing: list[str] = []
        with gradients.of(block.module, block.path, list(grids)):
            gradients.put({name: grid.decoded() for name, grid in grids.items()})
            before = self._loss(block, activations, judges, weighting)
            for done, which in enumerate(self._batches(block.index)):
                self._cancel.check()
                gradients.clear()
                self._backwards(block, activations, which, weighting)
                missing = [name for name in grids if name not in gradients.found]
                rate = 1 - done / self._steps
                for name, gradient in gradients.found.items():
                    grids[name].step(gradient, rate)
                gradients.put({name: grids[name].decoded() for name in gradients.found})
                on_step(done + 1)
            after = self._loss(block, activations, judges, weighting)
            found = {name: grid.stored() for name, grid in grids.items() if name not in missing}
        kept = after < before
        return found if kept else {}, {"before": before, "after": after, "missing": missing}

    def weighting(
        self, block: Block, measured: Sensitivity | None, names: Sequence[str], of_tokens: Callable[..., Any]
    ) -> Weighting:
        """How errors of a block's output count; `names` are its matrices, `of_tokens(which)(name)` gives weights."""
        name = self._residual(block, names) if measured else None
        if name is not None:
            squares = measured.squares[name]
            dimensions = (squares / max(float(squares.mean()), _TINY)).astype(np.float32)
            length = self._floats[0].shape[1]

            def tokens(which: np.ndarray) -> np.ndarray:
                return of_tokens(which)(name).reshape(len(which), length)

            return Weighting(tokens, dimensions)
        squares, n = 0.0, 0
        for target in self._floats:
            wide = target.astype(mx.float32)
            squares = squares + np.asarray(mx.square(wide).sum(axis=(0, 1)), np.float64)
            n += target.shape[0] * target.shape[1]
        squares = squares / n
        return Weighting(lambda which: None, (1 / np.maximum(squares, 1e-6 * squares.mean())).astype(np.float32))

    def _residual(self, block: Block, names: Sequence[str]) -> str | None:
        """A matrix whose output is added to the block's as it is: what comes back to both is the same."""
        hidden = self._floats[0][:1]
        back = mx.array(np.random.default_rng(0).standard_normal(hidden.shape, dtype=np.float32)).astype(hidden.dtype)
        seen = Observations()
        with observing(block.module, block.path, names, seen, inputs=False, gradients=True):
            _, given = mx.vjp(block, [hidden], [back])
            mx.eval(given)
        expected = np.asarray(mx.square(back.astype(mx.float32)).sum(axis=(0, 1)))
        for name in reversed(seen.order):
            squares = seen.squares.get(name)
            if squares is not None and squares.shape == expected.shape and np.allclose(squares, expected, rtol=_SAME):
                return name
        return None

    def _batches(self, index: int) -> list[np.ndarray]:
        """Sequences of each step; all have their turn before any comes again."""
        rng = np.random.default_rng([self._seed, index])
        fit = np.flatnonzero(~self._aside)
        size = min(_BATCH, len(fit))
        turns = -(-self._steps * size // len(fit))
        order = np.concatenate([rng.permutation(fit) for _ in range(turns)])
        return [np.sort(order[i * size : (i + 1) * size]) for i in range(self._steps)]

    def _backwards(self, block: Block, activations: Activations, which: np.ndarray, weighting: Weighting) -> None:
        target = _rows(self._floats, which)
        weights = weighting.of(which, target)

        def loss(hidden: mx.array) -> mx.array:
            return (weights * mx.square(block(hidden) - target)).sum()

        value, _ = mx.value_and_grad(loss)(_rows(activations, which))
        if not np.isfinite(value.item()):
            raise CalibrationError(f"{block.path}: its output is not finite while its codes are tuned")

    def _loss(self, block: Block, activations: Activations, which: np.ndarray, weighting: Weighting) -> float:
        """Mean over tokens and dimensions of the weighted squared error."""
        total = n = 0
        for i in which:
            self._cancel.check()
            one = np.array([i])
            target = _rows(self._floats, one)
            lost = weighting.of(one, target) * mx.square(block(_rows(activations, one)) - target)
            total += lost.sum().item()
            n += lost.size
        return total / n


def _rows(activations: Activations, which: np.ndarray) -> mx.array:
    """Hidden states `[s, L, D]` of sequences int `[s]`."""
    size = activations.chunks[0].stop
    pieces = []
    for chunk in np.unique(which // size):
        inside = which[which // size == chunk] - chunk * size
        pieces.append(activations[int(chunk)][mx.array(inside)])
    return mx.concatenate(pieces)
