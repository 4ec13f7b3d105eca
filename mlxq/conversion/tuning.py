"""The last stage: codes of a block moved by gradient steps until it gives what the float block gives for float inputs.

What goes into the quantized block is what the quantized blocks before it make of the text, so it makes up for a part of
their errors, too. The loss is the squared error of the block's output: by token and dimension as much as the model's
predictions depend on it where that was measured, else relative to the token's size and the dimension's, so that no
massive activation decides. A block keeps what was tuned where it loses less on sequences that are held out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxq.calibration.observe import Observations, observing
from mlxq.calibration.sensitivity import Sensitivity
from mlxq.calibration.stream import Activations, Block, BlockStream
from mlxq.calibration.weight_gradients import WeightGradients
from mlxq.conversion.matrices import Found, Matrices
from mlxq.quantizers.tuned_grid import Rates, TunedGrid
from mlxq.types import CancelToken, Progress, ProgressCallback, QuantizedTensor

#: Of some sequences, and a matrix's name: float32 weights of their tokens `[s * L]`, or None.
OfTokens = Callable[[np.ndarray], Callable[[str], np.ndarray | None]]
#: Sequences whose gradient a step goes down.
_BATCH = 2
#: Measured on block 1 of a model of 226M weights, 3 bits, 16 sequences of 512 tokens, held-out error against untuned
#: codes: 20 steps 0.978, 50 steps 0.940, 100 steps 0.931; codes kept 0.984 to 0.986; codes at twice the rate 1.34 (a
#: step's noise takes those at the edge of rounding with it); batches of 4 instead of 2 at 50 steps 0.935. At 4 bits 50
#: steps 0.988.
RATES = Rates(scales=3e-4, centres=3e-3, codes=2e-3)
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
        steps: for each block; 0: nothing is done.
        aside: bool `[S]`, sequences that are held out; where none are, all decide.
        seed: of the order of the sequences.
        matrices: the float weights, and how codes are put together.
    """

    def __init__(
        self,
        steps: int,
        aside: np.ndarray,
        seed: int,
        matrices: Matrices,
        cancel: CancelToken,
        progress: ProgressCallback | None = None,
    ):
        self._steps, self._aside, self._seed = steps, aside, seed
        self._matrices, self._cancel, self._progress = matrices, cancel, progress
        self._floats: Activations | None = None
        self._n_blocks = 0
        #: Block -> what was noted of it.
        self._noted: dict[str, dict[str, Any]] = {}
        self._whole: str | None = None

    def begin(self, stream: BlockStream) -> None:
        """Before the first block, whose float inputs are made here."""
        self._whole, self._n_blocks = stream.whole, stream.n_blocks
        if self._steps and not stream.whole:
            stream.embed()
            self._floats = stream.activations

    def run_float(self, block: Block) -> None:
        """Run the float model through a block that still has its own weights."""
        for i, hidden in enumerate(self._floats or ()):
            self._cancel.check()
            self._floats[i] = block(hidden)

    def of_block(
        self, block: Block, activations: Activations, found: Found, measured: Sensitivity | None, of_tokens: OfTokens
    ) -> tuple[dict[str, QuantizedTensor], dict[str, Any]]:
        """Tuned codes of a block's matrices where they lose less than those that were found, and notes for JSON.

        Args:
            activations: what goes into the quantized block, whose other parameters are as they will be stored.
            measured: how much errors matter, or None.
            of_tokens: the weights of the tokens of some sequences, by a matrix's name.
        """
        if self._floats is None:
            return {}, {}
        plans, coder = self._matrices.plans, self._matrices.coder
        codes = {name: coder.stacked(parts, plans[name].info.shape) for name, parts in found.parts.items()}
        try:
            weighting = self._weighting(block, measured, list(codes), of_tokens)
            tuned, notes = self._tuned(block, activations, codes, weighting)
        except (ValueError, RuntimeError, NotImplementedError) as e:
            # What mlx says of an operation that has no gradient.
            tuned, notes = {}, {"refused": str(e)}
        return tuned, {"tuned": {block.path: notes}}

    def take_up(self, notes: Mapping[str, Any]) -> None:
        """What was noted of a block that is done."""
        self._noted |= notes.get("tuned", {})

    def said(self) -> list[str]:
        """What came of it."""
        if not self._steps:
            return []
        if self._whole:
            return ["no block was tuned: the model cannot be taken apart into blocks"]
        done = {path: n for path, n in self._noted.items() if "refused" not in n}
        ratios = [n["after"] / n["before"] for n in done.values() if n["after"] < n["before"]]
        text = f"{len(ratios)} of {_counted(len(self._noted), 'block')} were tuned by {self._steps} steps each"
        if ratios:
            less = 100 * (1 - float(np.exp(np.mean(np.log(np.maximum(ratios, _TINY))))))
            text += f": the held-out errors of their outputs are {less:.1f} % smaller"
        said = [text]
        if len(done) > len(ratios):
            n = _counted(len(done) - len(ratios), "block")
            said.append(f"{n} would lose more by tuning, on text that is held out, and kept the codes that were there")
        refused = {path: n["refused"] for path, n in self._noted.items() if "refused" in n}
        if refused:
            n, first = _counted(len(refused), "block"), min(refused)
            said.append(f"{n} cannot be run backwards and kept the codes that were there: {first}: {refused[first]}")
        missing = sorted(name for n in done.values() for name in n["missing"])
        if missing:
            n = _counted(len(missing), "tensor")
            said.append(f"{n} in tuned blocks were not tuned, as it is not known what they multiply: {missing[0]}")
        return said

    def _tuned(
        self, block: Block, activations: Activations, codes: Mapping[str, QuantizedTensor], weighting: Weighting
    ) -> tuple[dict[str, QuantizedTensor], dict[str, Any]]:
        grids = {name: TunedGrid(q, self._matrices.weights(name), RATES) for name, q in codes.items()}
        gradients = WeightGradients()
        judges = np.flatnonzero(self._aside) if self._aside.any() else np.arange(len(self._aside))
        missing: list[str] = []
        with gradients.of(block.module, block.path, list(grids)):
            gradients.put({name: grid.decoded() for name, grid in grids.items()})
            before = self._loss(block, activations, judges, weighting)
            for done, which in enumerate(self._batches(block.index)):
                self._cancel.check()
                gradients.clear()
                if not math.isfinite(self._backwards(block, activations, which, weighting)):
                    break
                missing = [name for name in grids if name not in gradients.found]
                for name, gradient in gradients.found.items():
                    grids[name].step(gradient, 1 - done / self._steps)
                gradients.put({name: grids[name].decoded() for name in gradients.found})
                self._report(block, done + 1)
            after = self._loss(block, activations, judges, weighting)
        tuned = {name: grid.stored() for name, grid in grids.items() if name not in missing}
        return tuned if after < before else {}, {"before": before, "after": after, "missing": missing}

    def _report(self, block: Block, done: int) -> None:
        if self._progress:
            total = self._steps * self._n_blocks
            item = f"block {block.index + 1}"
            self._progress(Progress("tune", self._steps * block.index + done, total, "passes", item))

    def _weighting(
        self, block: Block, measured: Sensitivity | None, names: Sequence[str], of_tokens: OfTokens
    ) -> Weighting:
        name = self._residual(block, names)
        if measured and name in measured.squares:
            squares = measured.squares[name]
            dimensions = (squares / max(float(squares.mean()), _TINY)).astype(np.float32)
            length = self._floats[0].shape[1]

            def tokens(which: np.ndarray) -> np.ndarray | None:
                weights = of_tokens(which)(name)
                return None if weights is None else weights.reshape(len(which), length)

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
        rng = np.random.default_rng([self._seed % 2**32, index])
        fit = np.flatnonzero(~self._aside)
        size = min(_BATCH, len(fit))
        turns = -(-self._steps * size // len(fit))
        order = np.concatenate([rng.permutation(fit) for _ in range(turns)])
        return [np.sort(order[i * size : (i + 1) * size]) for i in range(self._steps)]

    def _backwards(self, block: Block, activations: Activations, which: np.ndarray, weighting: Weighting) -> float:
        """The loss of these sequences; `WeightGradients` finds its gradients."""
        target = _rows(self._floats, which)
        weights = weighting.of(which, target)

        def loss(hidden: mx.array) -> mx.array:
            return (weights * mx.square(block(hidden) - target)).sum()

        value, _ = mx.value_and_grad(loss)(_rows(activations, which))
        return value.item()

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


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
