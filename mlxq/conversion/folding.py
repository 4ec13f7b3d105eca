"""A model whose channels are scaled where `plan.folds` allows: the same function, other weights to be rounded.

What is scaled is stored in short floats where it is a norm or a bias, so the scales are not what was asked for, but
the exact ratio between what was there and what is stored in its place; matrices, which are quantized afterwards, take
any ratio. Where a norm has a bias, or a matrix stays float, scales are powers of two, which change no digit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlxq.architectures.parameters import ParameterMap
from mlxq.calibration.stream import Block, put_weight
from mlxq.formats import floats
from mlxq.plan.folds import Fold
from mlxq.plan.planner import Plan
from mlxq.runtime.weights import to_mlx
from mlxq.types import FLOAT_BYTES

#: Share of the tokens whose output may be other than before: rounding can send one to another expert.
_OTHERS = 0.25
#: Relative difference of outputs that are the same but for the order of sums in float32.
_SAME = 1e-3
#: A ratio further from the scale that was asked for is no rounding (of a number too small for its type, say).
_ROUNDING = 0.02


class FoldedParameters:
    """A `ParameterMap` that reads scaled weights. All else is as in the map that it stands for.

    Attributes:
        folds: those that are applied, by what makes their channels.
    """

    def __init__(self, parameters: ParameterMap, plan: Plan):
        self._base = parameters
        self._plans = {p.info.name: p for p in plan.tensors}
        self.folds: dict[str, Fold] = {}
        #: Parameter -> what its columns are multiplied by, `[K]` or `[experts, K]`; what its rows are divided by,
        #: `[N]` or `[experts, N]`; what is added to it where it is used.
        self._columns: dict[str, np.ndarray] = {}
        self._rows: dict[str, np.ndarray] = {}
        self._offsets: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """As `ParameterMap.read`; what is scaled in float32, or if it stays float in the type that stores it."""
        w = self._base.read(name, rows)
        columns, divisors = self._columns.get(name), self._rows.get(name)
        if columns is None and divisors is None:
            return w
        w = floats.to_float32(w, floats.dtype_of(w))
        part = slice(None) if rows is None else rows
        if columns is not None:
            w = w * (columns if columns.ndim == 1 else columns[part][:, None, :])
        if divisors is not None:
            offset = np.float32(self._offsets.get(name, 0.0))
            by = divisors[part]
            w = (offset + w) / (by if by.ndim == w.ndim else by[..., None]) - offset
        plan = self._plans[name]
        return floats.from_float32(w, plan.dtype) if plan.action == "keep" and plan.dtype in FLOAT_BYTES else w

    def undivided(self, rows: np.ndarray, name: str, i: int = 0) -> np.ndarray:
        """Rows `[N, K]` of a scaled matrix (of one of a stack), or their errors, without what divides its outputs."""
        divisors = self._rows.get(name)
        return rows if divisors is None else rows * (divisors if divisors.ndim == 1 else divisors[i])[:, None]

    def parameters_of(self, fold: Fold) -> list[str]:
        """Names of all that a fold changes."""
        return [n for n in (fold.made_by, _bias_of(fold.made_by), *fold.taken_by) if n in self._plans]

    def columns(self, name: str, i: int = 0) -> np.ndarray | None:
        """What a matrix's inputs are divided by, float32 `[K]`; None where they are not."""
        columns = self._columns.get(name)
        return columns if columns is None or columns.ndim == 1 else columns[i]

    def unscaled(self, name: str, rows: slice | None = None) -> np.ndarray:
        """As the source has it."""
        return self._base.read(name, rows)

    def scales(self, fold: Fold) -> np.ndarray:
        """Those of a fold that is applied."""
        return self._rows[fold.made_by][..., -fold.n :]

    def is_scaled(self, name: str) -> bool:
        return name in self._columns or name in self._rows

    @property
    def scaled(self) -> list[str]:
        """Names of all parameters that are other than in the source."""
        return sorted(self._columns.keys() | self._rows.keys())

    def is_foldable(self, fold: Fold, offset: float) -> bool:
        """Whether the result can hold the same function: no tensor keeps the source's codes."""
        plans = [self._plans[n] for n in (fold.made_by, *fold.taken_by)]
        return all(p.action != "repack" for p in plans) and not (offset and self._needs_powers_of_two(fold))

    def settled(self, fold: Fold, s: np.ndarray, offset: float) -> np.ndarray:
        """The scales nearest to `s` `[n]` or `[experts, n]` that the result can hold, float32."""
        if self._needs_powers_of_two(fold):
            return np.exp2(np.rint(np.log2(s))).astype(np.float32)
        s = s.astype(np.float32)
        vector = fold.made_by if fold.is_norm else _bias_of(fold.made_by)
        plan = self._plans.get(vector)
        if plan is None or plan.dtype not in ("F16", "BF16"):
            return s
        a = self._base.read(vector)
        a = floats.to_float32(a, floats.dtype_of(a))[..., -fold.n :] + np.float32(offset)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            stored = floats.to_float32(floats.from_float32(a / s - np.float32(offset), plan.dtype), plan.dtype)
            ratio = a / (stored + np.float32(offset))
            good = np.abs(ratio / s - 1) < _ROUNDING
        return np.where(a == 0, s, np.where(good, ratio, 1)).astype(np.float32)

    def _needs_powers_of_two(self, fold: Fold) -> bool:
        """Where rounding is not made up for: a norm's weight and bias at once, matrices that stay short floats."""
        matrices = (*fold.taken_by, *(() if fold.is_norm else (fold.made_by,)))
        kept = [self._plans[n] for n in matrices if self._plans[n].spec is None and self._plans[n].action == "keep"]
        biased = [self._plans[n] for n in (_bias_of(fold.made_by),) if fold.is_norm and n in self._plans]
        return any(p.dtype in ("F16", "BF16") for p in (*kept, *biased))

    def fold(self, fold: Fold, s: np.ndarray, offset: float) -> None:
        """Apply scales, float32 `[n]` or `[experts, n]`, as `settled` gives them."""
        self.folds[fold.made_by] = fold
        for name in fold.taken_by:
            self._columns[name] = fold.spread(s)
        made = self._plans[fold.made_by].info.shape
        divisors = np.ones(made if fold.is_norm else made[:-1], np.float32)
        divisors[..., -fold.n :] = s
        for name in (fold.made_by, _bias_of(fold.made_by)):
            if name in self._plans:
                self._rows[name] = divisors
        if offset:
            self._offsets[fold.made_by] = offset

    def unfold(self, fold: Fold) -> None:
        """Take scales back."""
        del self.folds[fold.made_by]
        for name in fold.taken_by:
            del self._columns[name]
        for name in (fold.made_by, _bias_of(fold.made_by)):
            self._rows.pop(name, None)
        self._offsets.pop(fold.made_by, None)

    def explained(self, plan: Plan) -> Plan:
        """The plan, with what is scaled marked, and said in its reasons."""
        said = dict.fromkeys(self._columns, "scaled together with what makes its input")
        said |= dict.fromkeys(self._rows, "scaled together with the matrices that it goes into")
        tensors = tuple(
            dataclasses.replace(p, scaled=True, reason=f"{p.reason}; {said[p.info.name]}") if p.info.name in said else p
            for p in plan.tensors
        )
        return dataclasses.replace(plan, tensors=tensors)

    def put(self, block: Block, names: Sequence[str]) -> None:
        """Let a block compute with these parameters as they are read here, in float32."""
        start = f"{block.path}."
        for name in names:
            w = to_mlx(self.read(name), mx.float32)
            if self._plans[name].info.module == "other":
                block.module.load_weights([(name.removeprefix(start), w)], strict=False)
            else:
                put_weight(block.module, name.removesuffix(".weight").removeprefix(start), w)


def proven(folds: Sequence[Fold], folded: FoldedParameters, block: Block, hidden: mx.array) -> list[tuple[Fold, float]]:
    """Those folds that leave what a block gives as it is, tried on hidden states `[1, L, D]`, and their norms' offsets.

    The block is left with its own weights, in float32.
    """
    offsets = {fold.made_by: _offset(_module(block, fold.made_by)) if fold.is_norm else 0.0 for fold in folds}
    found = [(fold, offsets[fold.made_by]) for fold in folds if folded.is_foldable(fold, offsets[fold.made_by])]
    if not found:
        return []
    rng = np.random.default_rng(0)
    trial = FoldedParameters(folded._base, Plan((), ""))
    trial._plans = {n: _as_float32(p) for n, p in folded._plans.items() if n.startswith(f"{block.path}.")}
    before = np.array(block(hidden).astype(mx.float32))

    def holds(some: Sequence[tuple[Fold, float]]) -> bool:
        for fold, offset in some:
            lead = trial._plans[fold.made_by].info.shape[:-2]
            trial.fold(fold, np.exp2(rng.integers(-1, 2, (*lead, fold.n))).astype(np.float32), offset)
        names = trial.scaled
        trial.put(block, names)
        after = np.array(block(hidden).astype(mx.float32))
        for fold, _ in some:
            trial.unfold(fold)
        trial.put(block, names)
        with np.errstate(invalid="ignore"):
            off = np.abs(after - before).max(axis=-1) > _SAME * np.abs(before).max(axis=-1)
        return bool(off.mean() <= _OTHERS) and bool(np.isfinite(after).all())

    return found if holds(found) else [f for f in found if holds([f])]


def _as_float32(plan: Any) -> Any:
    return dataclasses.replace(plan, dtype="F32")


def _bias_of(weight: str) -> str:
    return f"{weight.removesuffix('.weight')}.bias"


def _module(block: Block, name: str) -> Any:
    module: Any = block.module
    for part in name.removesuffix(".weight").removeprefix(f"{block.path}.").split("."):
        module = module[int(part)] if isinstance(module, list) else module[part]
    return module


def _offset(norm: Any) -> float:
    """1 for a norm that multiplies by 1 + weight (Gemma's), else 0: seen with weights of 0."""
    weight = norm.weight
    x = 1 + mx.arange(weight.shape[-1])[None].astype(mx.float32)
    norm.weight = mx.zeros_like(weight)
    try:
        y = norm(x) - (norm.bias if "bias" in norm else 0)
        return 0.0 if bool((mx.abs(y) < _SAME).all()) else 1.0
    finally:
        norm.weight = weight
