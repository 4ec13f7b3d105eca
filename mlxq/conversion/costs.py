"""What each grid would cost each tensor: measured on a part of the calibration text, in nats per token.

One forward pass gives the second moments of every matrix's input, block by block; a sample of each matrix's rows is
quantized to every grid by error feedback, as all of them will be. One backward pass says how much an error in each
output row changes the model's predictions (`calibration.sensitivity`). The cost of a grid is half the sum over rows of
sensitivity times squared output error. Nothing is in memory but a block and the sampled rows' errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mlxq.architectures.parameters import ParameterMap
from mlxq.calibration.observe import Moments, Observations
from mlxq.calibration.sensitivity import Sensitivity, forwards, measure
from mlxq.calibration.stream import BlockStream
from mlxq.calibration.texts import digest
from mlxq.conversion.coders import coder_of
from mlxq.conversion.cost_file import Costs
from mlxq.errors import CalibrationError, FormatError
from mlxq.formats import floats
from mlxq.plan.budget import Grid, is_matrix_to_quantize
from mlxq.plan.planner import Plan
from mlxq.plan.roles import layer_index
from mlxq.quantizers.curvature import Curvature, output_errors
from mlxq.types import CancelToken, Progress, ProgressCallback

#: Rows of each matrix that are quantized to every grid.
_ROWS = 128
#: Experts of a stack that stand for all.
_EXPERTS = 4
#: Errors of a matrix inside a block are alike at successive tokens and in successive blocks, which the independence
#: that costs are computed with leaves out. Measured in a model of 226M weights, by quantizing one kind of matrix at a
#: time: KL divergences of 1.3 and 1.4 times what is computed for embedding and head, 1.8 to 2.1 times inside blocks.
#: All together they add up to more: at 4.5 bpw KL was 0.0532 with 1.5, 0.0490 with 3, 0.0505 with 4.5.
_ALIKE = 3.0


def measure_costs(
    parameters: ParameterMap,
    plan: Plan,
    sequences: np.ndarray,
    progress: ProgressCallback | None,
    cancel: CancelToken,
    seed: int = 0,
    *,
    room: int | None = None,
    known: Sensitivity | None = None,
) -> Costs:
    """Costs of every grid, MLX's or ggml's as the plan has them, for every matrix that the plan quantizes.

    Args:
        sequences: int32 `[S, L]`.
        room: bytes for the second moments of a stack of experts; None: no limit.
        known: what was measured on these sequences before, with all these matrices; it saves running backwards.

    Raises:
        CalibrationError: activations that are not finite.
    """
    run = _Run(parameters, plan, cancel)

    def report(done: int, total: int) -> None:
        cancel.check()
        if progress:
            progress(Progress("measure", done, total, "passes", "what bits cost"))

    # Backwards, what went into every block is needed again.
    with BlockStream(parameters, sequences, on_disk=True) as stream:
        if known is None:
            sensitivity = measure(stream, run.names, seed, report, run.sample, room)
        else:
            sensitivity = known
            forwards(stream, run.names, run.sample, room, lambda done: report(done, stream.n_blocks))
    tokens = np.bincount(sequences.ravel(), minlength=1)
    return Costs(run.costs(sensitivity, tokens), sensitivity, digest(sequences))


@dataclass(frozen=True)
class _Sample:
    """Rows of one matrix (of one expert): their squared output errors by grid, and the size of what they compute."""

    expert: int
    rows: np.ndarray
    size: np.ndarray
    errors: Mapping[Grid, np.ndarray]
    #: Sum of squared outputs over all rows, and the share of the experts' tokens that this one saw.
    outputs: np.ndarray
    share: float


class _Run:
    def __init__(self, parameters: ParameterMap, plan: Plan, cancel: CancelToken):
        self.parameters = parameters
        self.plans = {p.info.name: p for p in plan.tensors if is_matrix_to_quantize(p)}
        self.coder = coder_of(plan)
        self.cancel = cancel
        self.samples: dict[str, list[_Sample]] = {}

    def names(self, path: str) -> list[str]:
        return [n for n in self.plans if n.startswith(f"{path}.")]

    def sample(self, seen: Observations) -> list[int]:
        """Quantize rows of each matrix that was observed; of a stack's busiest experts those whose turn it is.

        Returns:
            The later turns in which the other of the busiest are held.
        """
        turns: set[int] = set()
        for group in seen.by_input():
            moments = seen.moments[group[0]]
            for i in map(int, np.argsort(-moments.counts, kind="stable")[:_EXPERTS]):
                if i in moments.held:
                    self._sample_group(group, i, moments)
                elif seen.turn == 0:
                    turns.add(i // len(moments.held))
        return sorted(turns)

    def _sample_group(self, group: Sequence[str], expert: int, moments: Moments) -> None:
        try:
            curvature = Curvature.of(moments.hessian(expert), sizes=self.coder.sizes)
        except FormatError as e:
            raise CalibrationError(f"{group[0]}: {e}") from e
        for name in group:
            self.cancel.check()
            self.samples.setdefault(name, []).append(self._sample(name, expert, moments, curvature))

    def _sample(self, name: str, expert: int, moments: Moments, curvature: Curvature) -> _Sample:
        plan = self.plans[name]
        w = self._matrix(name, expert)
        rows = np.linspace(0, len(w) - 1, min(_ROWS, len(w))).round().astype(int)
        some = np.ascontiguousarray(w[rows])
        hessian = moments.hessian(expert)
        errors = {}
        for grid in self.coder.grids(w.shape[1]):
            w_hat = self.coder.quantize(some, self.coder.with_grid(plan, grid), curvature=curvature, sweeps=0)[1]
            errors[grid] = output_errors(some - w_hat, hessian)
        share = float(moments.counts[expert] / max(moments.counts.sum(), 1))
        return _Sample(expert, rows, output_errors(some, hessian), errors, output_errors(w, hessian), share)

    def _matrix(self, name: str, expert: int) -> np.ndarray:
        shape = self.plans[name].info.shape
        w = self.parameters.read(name, slice(expert, expert + 1) if len(shape) > 2 else None)
        return floats.to_float32(w, floats.dtype_of(w)).reshape(-1, shape[-1])

    def costs(self, sensitivity: Sensitivity, counts: np.ndarray) -> dict[str, dict[Grid, float]]:
        """`counts` `[V]` is how often each token was seen."""
        out = {}
        for name, plan in self.plans.items():
            if name in self.samples and name in sensitivity.squares:
                inside = layer_index(name) is not None
                of = self._of_samples(name, sensitivity.squares[name])
                out[name] = {grid: (_ALIKE if inside else 1.0) * cost for grid, cost in of.items()}
            elif plan.info.module == "embedding":
                out[name] = self._of_embedding(name, sensitivity.embedding, counts)
        made = {name: self.coder.completed(costs, self.plans[name].info.shape[-1]) for name, costs in out.items()}
        # Of the others nothing is known: they keep their grid.
        return {name: made.get(name, {}) for name in self.plans}

    def _of_samples(self, name: str, squares: np.ndarray) -> dict[Grid, float]:
        """Ratio of sampled errors to sampled outputs, times all outputs; rows weighted by their sensitivity."""
        squares = squares.reshape(-1, squares.shape[-1])
        total: dict[Grid, float] = {}
        seen = sum(s.share for s in self.samples[name])
        for sample in self.samples[name]:
            s = squares[sample.expert]
            all_outputs = float(s @ sample.outputs)
            weight = s[sample.rows]
            some_outputs = max(float(weight @ sample.size), 1e-30)
            # Squared gradients are means over all tokens, so an expert's already count how often it is used.
            scale = 0.5 * all_outputs / some_outputs / max(seen, 1e-30)
            for grid, errors in sample.errors.items():
                total[grid] = total.get(grid, 0.0) + scale * float(weight @ errors)
        return total

    def _of_embedding(self, name: str, gram: np.ndarray, counts: np.ndarray) -> dict[Grid, float]:
        """Errors of rows that are looked up, as often as the text has them, in the directions that gradients have."""
        plan = self.plans[name]
        rows = np.argsort(-counts, kind="stable")[: min(16 * _ROWS, int((counts > 0).sum()))]
        w = np.concatenate([self.parameters.read(name, slice(r, r + 1)) for r in rows])
        w = floats.to_float32(w, floats.dtype_of(w))
        costs = {}
        for grid in self.coder.grids(w.shape[1]):
            # Without feedback: what that gains by the gradients' second moments is mostly not there when measured (a
            # 3-bit embedding cost 0.028 nats where 0.006 were computed).
            w_hat = self.coder.quantize(w, self.coder.with_grid(plan, grid))[1]
            costs[grid] = 0.5 * float(np.average(output_errors(w - w_hat, gram), weights=counts[rows]))
        return costs
