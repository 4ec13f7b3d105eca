"""Which scales of a block's channels lose least: candidates are quantized and measured, on rows of the matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxq.calibration.observe import Moments, Observations
from mlxq.calibration.stream import Block
from mlxq.conversion.folding import proven
from mlxq.conversion.matrices import Matrices, held_out_errors
from mlxq.plan.folds import Fold, folds_of
from mlxq.plan.methods import SCALING
from mlxq.quantizers import awq
from mlxq.quantizers.curvature import Curvature
from mlxq.types import TensorPlan

#: Rows of each matrix that are quantized for each candidate, and experts of a stack that stand for all.
_ROWS, _EXPERTS = 128, 4
#: Share of the error that scales have to save: less is not told from chance.
_LEAST_GAIN = 0.01


@dataclass(frozen=True)
class _Sample:
    """Rows of one matrix, float32 `[n, K]`, and what goes into it."""

    plan: TensorPlan
    expert: int
    w: np.ndarray
    moments: Moments
    curvature: Curvature | None
    importance: np.ndarray


class Scaling:
    """Of a model's channels, block by block, for methods that scale."""

    def __init__(self, matrices: Matrices):
        self.matrices = matrices
        #: What makes channels that could be scaled, and whether they are; None where the model does not allow it.
        self._places: dict[str, bool | None] = {}

    def of_block(self, block: Block, hidden: mx.array, names: Sequence[str]) -> BlockScaling:
        """`hidden` `[1, L, D]` are states to try the block with, `names` its matrices."""
        if not any(self.matrices.plans[name].method in SCALING for name in names):
            return BlockScaling(self.matrices, {}, [])
        folded = self.matrices.folded
        config = folded.checkpoint.config
        heads = config.get("text_config", config).get("num_attention_heads")
        thinkable = folds_of(folded.tensors, block.path, heads)
        places = dict(proven(thinkable, folded, block, hidden))
        return BlockScaling(self.matrices, places, [f.made_by for f in thinkable if f not in places])

    def take_up(self, notes: Mapping[str, Any], read: Callable[[str], np.ndarray]) -> None:
        """Apply what was noted of a block; `read` gives the arrays that were stored with it."""
        self._places |= notes.get("places", {})
        for described in notes.get("folds", ()):
            fold = Fold(**{k: v for k, v in described.items() if k != "offset"})
            self.matrices.folded.fold(fold, read(_name_of(fold)), described["offset"])

    def said(self) -> list[str]:
        """In how many of the places that were tried channels are scaled."""
        if not any(p.method in SCALING for p in self.matrices.plans.values()):
            return []
        if not self._places:
            return ["no channels are scaled: no place is known where this model allows that"]
        refused = [name for name, is_scaled in self._places.items() if is_scaled is None]
        n, done = len(self._places) - len(refused), sum(map(bool, self._places.values()))
        notes = [f"channels are scaled in {done} of {n} places where that changes nothing but what rounding costs"]
        if refused:
            what = "1 place is" if len(refused) == 1 else f"{len(refused)} places are"
            notes.append(f"{what} not scaled, because the model or its stored types do not allow it: {min(refused)}")
        return notes


class BlockScaling:
    """Of one block: `places` are folds that leave its output as it is, with the offsets of their norms."""

    def __init__(self, matrices: Matrices, places: Mapping[Fold, float], refused: Sequence[str]):
        self._matrices = matrices
        self._places = places
        self._refused = refused

    @property
    def _applied(self) -> list[Fold]:
        return [f for f in self._places if f.made_by in self._matrices.folded.folds]

    @property
    def has_places(self) -> bool:
        return bool(self._places)

    @property
    def changed(self) -> list[str]:
        """Parameters that are scaled."""
        return sorted({n for f in self._applied for n in self._matrices.folded.parameters_of(f)})

    def choose(self, seen: Observations) -> None:
        """Find scales and apply them; `seen` are inputs of the block as it is without."""
        found = {f: best_scales(f, offset, seen, self._matrices) for f, offset in self._places.items()}
        for fold, s in found.items():
            if s is not None:
                self._matrices.folded.fold(fold, s, self._places[fold])

    def take_back(self, errors: Mapping[str, np.ndarray]) -> bool:
        """Undo scales with which a matrix loses more than by rounding to nearest without them; whether any did.

        `errors` are, by name, those of what was made and of that rounding.
        """
        worse = {name for name, (made, plain) in errors.items() if made > plain}
        losing = [f for f in self._applied if worse & {f.made_by, *f.taken_by}]
        for fold in losing:
            self._matrices.folded.unfold(fold)
        return bool(losing)

    def arrays(self) -> dict[str, np.ndarray]:
        """What `Scaling.take_up` reads."""
        return {_name_of(f): self._matrices.folded.scales(f) for f in self._applied}

    def notes(self) -> dict[str, Any]:
        """For JSON."""
        applied = self._applied
        return {
            "folds": [asdict(f) | {"offset": self._places[f]} for f in applied],
            "places": {f.made_by: f in applied for f in self._places} | dict.fromkeys(self._refused),
        }


def _name_of(fold: Fold) -> str:
    """The name that a store knows the scales of a fold by."""
    return f"scales of {fold.made_by}"


def best_scales(fold: Fold, offset: float, seen: Observations, matrices: Matrices) -> np.ndarray | None:
    """Scales `[n]`, or `[experts, n]` where a stack makes the channels; None where no candidate beats 1 clearly.

    The method that the codes will be made by quantizes each candidate's weights, without descent; errors are relative
    to what each matrix computes, on rows that are held out.
    """
    names = [n for n in fold.taken_by if n in seen.moments and n in matrices.plans]
    of_stack = len(matrices.folded.tensors[fold.made_by].shape) > 2
    whole = all(len(seen.moments[n].held) == len(seen.moments[n].counts) for n in names)
    if not names or (of_stack and not whole):
        return None
    samples = [sample for name in names for sample in _samples(name, seen.moments[name], matrices)]
    inputs, weights = _sizes(names, seen, matrices, of_stack)
    curvature = None if of_stack else next((s.curvature for s in samples if len(s.moments.counts) == 1), None)
    least, best = (1 - _LEAST_GAIN) * _error(samples, None, matrices), None
    for s in awq.candidates(inputs, weights, curvature):
        s = fold.gathered(s)
        s = matrices.folded.settled(fold, s / np.exp(np.log(s).mean(axis=-1, keepdims=True)), offset)
        error = _error(samples, fold.spread(s), matrices)
        if error < least:
            least, best = error, s
    return best


def _samples(name: str, moments: Moments, matrices: Matrices) -> Iterator[_Sample]:
    busiest = [i for i in np.argsort(-moments.counts, kind="stable") if i in moments.held and moments.counts[i]]
    for i in map(int, busiest[:_EXPERTS]):
        w = matrices.weights(name, i, scaled=False)
        rows = np.linspace(0, len(w) - 1, min(_ROWS, len(w))).round().astype(int)
        curvature = matrices.curvature_of(moments, i, [name])
        importance = matrices.importance_of(moments, i, curvature)
        yield _Sample(matrices.plans[name], i, np.ascontiguousarray(w[rows]), moments, curvature, importance)


def _sizes(names: list[str], seen: Observations, matrices: Matrices, of_stack: bool) -> tuple[np.ndarray, np.ndarray]:
    """Root mean squares of inputs and of the weights' columns, `[K]` or `[experts, K]`."""
    moments = min((seen.moments[n] for n in names), key=lambda m: len(m.counts))
    squares = moments.pooled_squares()
    if of_stack:
        own = [moments.mean_squares(i) if n else squares for i, n in enumerate(moments.counts)]
        weights = [_columns(matrices.weights(names[0], i, scaled=False)) for i in range(len(own))]
        return np.sqrt(own), np.sqrt(weights)
    stacks = [(n, int(seen.moments[n].counts.argmax())) for n in names]
    weights = [_columns(matrices.weights(n, i, scaled=False)) for n, i in stacks]
    return np.sqrt(squares), np.sqrt(np.mean(weights, axis=0))


def _columns(w: np.ndarray) -> np.ndarray:
    """Mean squares of the columns, relative to the whole."""
    squares = np.square(w).mean(axis=0)
    return squares / max(float(squares.mean()), 1e-30)


def _error(samples: list[_Sample], s: np.ndarray | None, matrices: Matrices) -> float:
    """Sum over the matrices of their relative errors with inputs divided by `s`, `[K]` or `[experts, K]`."""
    total = 0.0
    for sample in samples:
        w, curvature, importance = sample.w, sample.curvature, sample.importance
        errors_of = held_out_errors(sample.moments, sample.expert)
        columns = None if s is None else s if s.ndim == 1 else s[sample.expert]
        if columns is not None:
            w, importance = w * columns, importance / columns**2
            curvature = curvature and curvature.scaled(columns)
        w_hat = matrices.coder.quantize(w, sample.plan, curvature=curvature, importance=importance, sweeps=0)[1]
        lost = w - w_hat if columns is None else (w - w_hat) / columns
        total += errors_of(lost) / max(errors_of(sample.w), 1e-30)
    return total
