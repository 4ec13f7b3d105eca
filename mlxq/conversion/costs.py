"""What each grid would cost each tensor: measured on a part of the calibration text, in nats per token.

One forward pass gives the second moments of every matrix's input, block by block; a sample of each matrix's rows is
quantized to every grid by error feedback, as all of them will be. One backward pass says how much an error in each
output row changes the model's predictions (`calibration.sensitivity`). The cost of a grid is half the sum over rows of
sensitivity times squared output error. Nothing is in memory but a block and the sampled rows' errors.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlxq.architectures.parameters import ParameterMap
from mlxq.calibration.observe import Moments, Observations
from mlxq.calibration.sensitivity import Sensitivity, measure
from mlxq.calibration.stream import BlockStream
from mlxq.calibration.texts import digest
from mlxq.errors import CalibrationError, FormatError, PlanError
from mlxq.formats import floats
from mlxq.formats.geometry import AFFINE_GROUP_SIZES
from mlxq.plan.planner import Plan
from mlxq.plan.roles import layer_index
from mlxq.quantizers import calibrated
from mlxq.quantizers.curvature import Curvature, output_errors
from mlxq.types import CancelToken, Progress, ProgressCallback, QuantSpec
from mlxq.writers.files import writing

#: Rows of each matrix that are quantized to every grid.
_ROWS = 128
#: Experts of a stack that stand for all.
_EXPERTS = 4
#: Grids that are measured; the others follow from them by what their group size changes at 4 bits.
_BITS = (2, 3, 4, 5, 6, 8)
_BASE_GROUP = 64
#: Errors of a matrix inside a block are alike at successive tokens and in successive blocks, which the independence
#: that costs are computed with leaves out. Measured in a model of 226M weights, by quantizing one kind of matrix at a
#: time: KL divergences of 1.3 and 1.4 times what is computed for embedding and head, 1.8 to 2.1 times inside blocks.
_ALIKE = 1.5
FORMAT = "mlxq costs 2"


@dataclass(frozen=True)
class Costs:
    """What was measured of a model, to choose bits by and to weight tokens with.

    Attributes:
        by_tensor: parameter -> grid -> nats per token.
        sensitivity: what they rest on.
        text: SHA-256 of the token sequences.
    """

    by_tensor: Mapping[str, Mapping[QuantSpec, float]]
    sensitivity: Sensitivity
    text: str

    def write(self, path: Path) -> None:
        """As a NumPy archive, to be used again: costs as JSON, sensitivities as arrays (token weights in float16).

        Raises:
            OutputError: the file cannot be written.
        """
        tensors = {
            name: {f"{spec.bits}:{spec.group_size}": cost for spec, cost in costs.items()}
            for name, costs in self.by_tensor.items()
        }
        s = self.sensitivity
        head = {"format": FORMAT, "text": self.text, "tokens": s.n_tokens, "tensors": tensors}
        arrays = {"embedding": s.embedding}
        arrays |= {f"squares/{name}": a for name, a in s.squares.items()}
        arrays |= {f"weights/{name}": np.minimum(a, 6e4).astype(np.float16) for name, a in s.token_weights.items()}
        partial = path.with_name(f".{path.name}.partial")
        with writing(path):
            with open(partial, "wb") as f:
                np.savez(f, head=np.frombuffer(json.dumps(head).encode(), np.uint8), **arrays)
            os.replace(partial, path)

    @classmethod
    def read(cls, path: Path) -> Costs:
        """Raises PlanError where the file is none of ours."""
        try:
            with np.load(path, allow_pickle=False) as found:
                head = json.loads(found["head"].tobytes())
                if head["format"] != FORMAT:
                    raise ValueError(f"its format is {head['format']!r}, not {FORMAT!r}")
                tensors = {
                    name: {QuantSpec(*map(int, key.split(":"))): float(cost) for key, cost in costs.items()}
                    for name, costs in head["tensors"].items()
                }
                squares, weights = (
                    {k.removeprefix(f"{kind}/"): found[k] for k in found.files if k.startswith(f"{kind}/")}
                    for kind in ("squares", "weights")
                )
                weights = {k: a.astype(np.float32) for k, a in weights.items()}
                sensitivity = Sensitivity(squares, weights, found["embedding"], int(head["tokens"]))
                return cls(tensors, sensitivity, str(head["text"]))
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as e:
            raise PlanError(f"{path}: not a file of measured costs: {e}") from e


def measure_costs(
    parameters: ParameterMap,
    plan: Plan,
    sequences: np.ndarray,
    progress: ProgressCallback | None,
    cancel: CancelToken,
    seed: int = 0,
) -> Costs:
    """Costs of every grid for every tensor that the plan quantizes.

    Args:
        sequences: int32 `[S, L]`.

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
        sensitivity = measure(stream, run.names, seed, report, on_inputs=run.sample)
    sensitivity = dataclasses.replace(sensitivity, token_weights=run.shared(sensitivity.token_weights))
    tokens = np.bincount(sequences.ravel(), minlength=1)
    return Costs(run.costs(sensitivity, tokens), sensitivity, digest(sequences))


@dataclass(frozen=True)
class _Sample:
    """Rows of one matrix (of one expert): their squared output errors by grid, and the size of what they compute."""

    expert: int
    rows: np.ndarray
    size: np.ndarray
    errors: Mapping[QuantSpec, np.ndarray]
    #: Sum of squared outputs over all rows, and the share of the experts' tokens that this one saw.
    outputs: np.ndarray
    share: float


class _Run:
    def __init__(self, parameters: ParameterMap, plan: Plan, cancel: CancelToken):
        self.parameters = parameters
        self.plans = {p.info.name: p for p in plan.tensors if p.spec is not None and p.action != "repack"}
        self.cancel = cancel
        self.samples: dict[str, list[_Sample]] = {}
        self.groups: list[list[str]] = []

    def names(self, path: str) -> list[str]:
        return [n for n in self.plans if n.startswith(f"{path}.")]

    def shared(self, token_weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Weights of the tokens for the Hessian that matrices with the same input share: the mean of theirs."""
        out = {}
        for group in self.groups:
            found = [token_weights[name] for name in group if name in token_weights]
            if found:
                out |= dict.fromkeys(group, np.mean(found, axis=0, dtype=np.float32))
        return out

    def sample(self, seen: Observations) -> None:
        """Quantize rows of each matrix that was observed."""
        for group in seen.by_input():
            self.groups.append(group)
            moments = seen.moments[group[0]]
            busiest = np.argsort(-moments.counts, kind="stable")[:_EXPERTS]
            for i in map(int, busiest):
                try:
                    curvature = Curvature.of(moments.hessian(i))
                except FormatError as e:
                    raise CalibrationError(f"{group[0]}: {e}") from e
                for name in group:
                    self.cancel.check()
                    self.samples.setdefault(name, []).append(self._sample(name, i, moments, curvature))

    def _sample(self, name: str, expert: int, moments: Moments, curvature: Curvature) -> _Sample:
        plan = self.plans[name]
        w = self._matrix(name, expert)
        rows = np.linspace(0, len(w) - 1, min(_ROWS, len(w))).round().astype(int)
        some = np.ascontiguousarray(w[rows])
        hessian = moments.hessian(expert)
        errors = {}
        for spec in _grids(w.shape[1]):
            w_hat = calibrated.quantize(some, spec, plan.dtype, curvature=curvature, sweeps=0)[1]
            errors[spec] = output_errors(some - w_hat, hessian)
        share = float(moments.counts[expert] / max(moments.counts.sum(), 1))
        return _Sample(expert, rows, output_errors(some, hessian), errors, output_errors(w, hessian), share)

    def _matrix(self, name: str, expert: int) -> np.ndarray:
        shape = self.plans[name].info.shape
        w = self.parameters.read(name, slice(expert, expert + 1) if len(shape) > 2 else None)
        return floats.to_float32(w, floats.dtype_of(w)).reshape(-1, shape[-1])

    def costs(self, sensitivity: Sensitivity, counts: np.ndarray) -> dict[str, dict[QuantSpec, float]]:
        """`counts` `[V]` is how often each token was seen."""
        out = {}
        for name, plan in self.plans.items():
            if name in self.samples and name in sensitivity.squares:
                inside = layer_index(name) is not None
                of = self._of_samples(name, sensitivity.squares[name])
                out[name] = {spec: (_ALIKE if inside else 1.0) * cost for spec, cost in of.items()}
            elif plan.info.module == "embedding":
                out[name] = self._of_embedding(name, sensitivity.embedding, counts)
        made = {name: _with_groups(costs, self.plans[name].info.shape[-1]) for name, costs in out.items()}
        # Of the others nothing is known: they keep their grid.
        return {name: made.get(name, {}) for name in self.plans}

    def _of_samples(self, name: str, squares: np.ndarray) -> dict[QuantSpec, float]:
        """Ratio of sampled errors to sampled outputs, times all outputs; rows weighted by their sensitivity."""
        squares = squares.reshape(-1, squares.shape[-1])
        total: dict[QuantSpec, float] = {}
        seen = sum(s.share for s in self.samples[name])
        for sample in self.samples[name]:
            s = squares[sample.expert]
            all_outputs = float(s @ sample.outputs)
            weight = s[sample.rows]
            some_outputs = max(float(weight @ sample.size), 1e-30)
            # Squared gradients are means over all tokens, so an expert's already count how often it is used.
            scale = 0.5 * all_outputs / some_outputs / max(seen, 1e-30)
            for spec, errors in sample.errors.items():
                total[spec] = total.get(spec, 0.0) + scale * float(weight @ errors)
        return total

    def _of_embedding(self, name: str, gram: np.ndarray, counts: np.ndarray) -> dict[QuantSpec, float]:
        """Errors of rows that are looked up, as often as the text has them, in the directions that gradients have."""
        plan = self.plans[name]
        rows = np.argsort(-counts, kind="stable")[: min(16 * _ROWS, int((counts > 0).sum()))]
        w = np.concatenate([self.parameters.read(name, slice(r, r + 1)) for r in rows])
        w = floats.to_float32(w, floats.dtype_of(w))
        costs = {}
        for spec in _grids(w.shape[1]):
            # Without feedback: what that gains by the gradients' second moments is mostly not there when measured (a
            # 3-bit embedding cost 0.028 nats where 0.006 were computed).
            w_hat = calibrated.quantize(w, spec, plan.dtype)[1]
            costs[spec] = 0.5 * float(np.average(output_errors(w - w_hat, gram), weights=counts[rows]))
        return costs


def _grids(K: int) -> list[QuantSpec]:
    """The grids that are measured for rows of `K`."""
    groups = [g for g in AFFINE_GROUP_SIZES if K % g == 0]
    base = _BASE_GROUP if _BASE_GROUP in groups else groups[-1]
    return [QuantSpec(b, base) for b in _BITS] + [QuantSpec(4, g) for g in groups if g != base]


def _with_groups(costs: Mapping[QuantSpec, float], K: int) -> dict[QuantSpec, float]:
    """All legal grids, of which those that were not measured lose what their group size loses at 4 bits."""
    groups = [g for g in AFFINE_GROUP_SIZES if K % g == 0]
    base = _BASE_GROUP if _BASE_GROUP in groups else groups[-1]
    four = costs[QuantSpec(4, base)]
    out = {}
    for bits in _BITS:
        for g in groups:
            ratio = costs[QuantSpec(4, g)] / four if four else 1.0
            out[QuantSpec(bits, g)] = costs[QuantSpec(bits, base)] * ratio
    return out
