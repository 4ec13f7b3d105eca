"""A plan within a budget: every tensor's grid by what it costs the model's predictions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from mlxq.architectures.memory import memory_to_run
from mlxq.architectures.parameters import ParameterMap
from mlxq.calibration.sensitivity import Sensitivity
from mlxq.calibration.texts import CalibrationText, digest
from mlxq.conversion.calibrated import is_needed, read_text
from mlxq.conversion.coders import Coder, coder_of
from mlxq.conversion.cost_file import Costs
from mlxq.conversion.costs import measure_costs
from mlxq.conversion.job import Job
from mlxq.conversion.request import BudgetRequest, CalibrationRequest, size_in_bytes
from mlxq.errors import PlanError
from mlxq.plan.budget import Option, allocate, is_matrix_to_quantize
from mlxq.plan.methods import FEEDBACK
from mlxq.plan.planner import Plan, planned_bytes
from mlxq.types import TensorPlan

#: Tokens that sensitivities are measured on: the costs of two halves of them agree within a few percent.
_TOKENS = 16384
#: Share of a memory of that size that is left for the system and other programs.
_HEADROOM = 0.25


@dataclass(frozen=True)
class Frontier:
    """What each number of bytes buys: the choices that a plan leaves open, with their costs.

    Attributes:
        plan: of all tensors.
        coder: of its kind of codes.
        options: parameter -> the grids that it may get.
    """

    plan: Plan
    coder: Coder
    options: Mapping[str, list[Option]]

    @classmethod
    def of(cls, plan: Plan, costs: Costs, where: object) -> Frontier:
        """Tensors that `--tensor-type` names, and those of which no costs are known, keep what they have.

        Raises:
            PlanError: the costs, of the file `where`, are of another model.
        """
        coder = coder_of(plan)
        known = costs.of_kind(coder.kind)
        free = {p.info.name: p for p in plan.tensors if is_matrix_to_quantize(p) and not _is_asked_for(p)}
        missing = [name for name in free if name not in known]
        if missing:
            raise PlanError(f"{where}: says nothing of {missing[0]}; it was measured on another model")
        options = {
            name: [Option(grid, planned_bytes(coder.with_grid(p, grid)), cost) for grid, cost in known[name].items()]
            for name, p in free.items()
            if known[name]
        }
        return cls(plan, coder, options)

    @cached_property
    def fixed(self) -> int:
        """Bytes of the other tensors."""
        return self.plan.nbytes - sum(self.plan.nbytes_by_name[name] for name in self.options)

    @property
    def least(self) -> int:
        return self.fixed + sum(min(o.nbytes for o in of) for of in self.options.values())

    @property
    def most(self) -> int:
        return self.fixed + sum(max(o.nbytes for o in of) for of in self.options.values())

    def chosen(self, nbytes: int) -> dict[str, Option]:
        """The best choices that fit.

        Raises:
            PlanError: none do; the message says the smallest possible.
        """
        try:
            return allocate(self.options, nbytes - self.fixed)
        except PlanError as e:
            raise PlanError(
                f"the budget of {nbytes / 1e6:,.1f} MB cannot be met: the smallest possible is"
                f" {self.least / 1e6:,.1f} MB ({8 * self.least / self.plan.n_weights:.2f} bpw)"
            ) from e

    def cost(self, nbytes: int) -> float:
        """Nats per token that are expected of the best choices."""
        return sum(o.cost for o in self.chosen(nbytes).values())

    def nbytes_for(self, nats: float) -> int:
        """About the fewest bytes of which no more nats are expected; the most there are where it takes more."""
        low, high = self.least, self.most
        while high - low > max(high // 2048, 1):
            middle = (low + high) // 2
            low, high = (low, middle) if self.cost(middle) <= nats else (middle, high)
        return high

    def within(self, nbytes: int) -> Plan:
        """The plan with the best choices."""
        chosen = self.chosen(nbytes)
        tensors = tuple(self._with(p, chosen[p.info.name]) if p.info.name in chosen else p for p in self.plan.tensors)
        total = sum(o.cost for o in chosen.values())
        note = f"bits by budget: {nbytes / 1e6:,.1f} MB; the measured costs add up to {total:.3g} nats per token"
        return dataclasses.replace(self.plan, tensors=tensors, notes=(*self.plan.notes, note))

    def _with(self, plan: TensorPlan, option: Option) -> TensorPlan:
        reason = f"by budget: costs {option.cost:.2g} nats per token"
        return dataclasses.replace(self.coder.with_grid(plan, option.grid), reason=reason)


@dataclass
class Known:
    """What conversions of one model share, made by the first that needs it.

    Attributes:
        text: to calibrate on.
        costs: measured ones.
        aim: bytes that the tensors may take, where a search decides and not the request.
    """

    text: CalibrationText | None = None
    costs: Costs | None = None
    aim: Callable[[Frontier], int] | None = None

    def prepare(
        self,
        job: Job,
        parameters: ParameterMap,
        plan: Plan,
        calibration: CalibrationRequest,
        budget: BudgetRequest,
    ) -> None:
        """Read the text and measure the costs, where they are needed and not known yet.

        Raises:
            PlanError: costs are asked for that would be of no use.
            CalibrationError: the text is unfit, or activations are not finite.
        """
        is_costed = bool(budget) or budget.costs is not None
        if is_costed and not budget and not any(p.method in FEEDBACK for p in plan.tensors):
            raise PlanError("--costs is for a budget, or for error feedback (--method gptq), whose tokens it weights")
        if self.text is None and (is_costed or (is_needed(plan) and not job.dry_run)):
            self.text = read_text(job, parameters, calibration)
        if self.costs is None and is_costed:
            self.costs = _costs(job, parameters, plan, self.text, calibration, budget)

    def within_budget(self, plan: Plan, request: BudgetRequest, config: dict[str, Any], beside: int = 0) -> Plan:
        """The plan with each matrix's grid chosen such that the whole fits and costs least.

        `beside` are the bytes of a file that are not of its tensors.

        Raises:
            PlanError: the budget cannot be met; the message says the smallest possible.
        """
        frontier = Frontier.of(plan, self.costs, request.costs)
        return frontier.within(self.aim(frontier) if self.aim else _budget_bytes(request, frontier, config, beside))


def _budget_bytes(request: BudgetRequest, frontier: Frontier, config: dict[str, Any], beside: int) -> int:
    """Bytes that the tensors may take.

    Raises:
        PlanError: nothing is left for weights.
    """
    if request.bpw is not None:
        return int(request.bpw * frontier.plan.n_weights / 8)
    if request.size is not None:
        return size_in_bytes(request.size) - beside
    if request.kl is not None:
        return frontier.nbytes_for(request.kl)
    memory = size_in_bytes(request.memory)
    to_run = memory_to_run(0, config, request.context)
    left = int(memory * (1 - _HEADROOM)) - to_run.total
    if left <= 0:
        raise PlanError(
            f"--fit {request.memory}: {memory * _HEADROOM / 1e9:.1f} GB are left to the system and the cache and"
            f" scratch of {request.context} tokens take {to_run.total / 1e9:.1f} GB, so there is no room for weights"
        )
    return left


def _costs(
    job: Job,
    parameters: ParameterMap,
    plan: Plan,
    text: CalibrationText,
    calibration: CalibrationRequest,
    request: BudgetRequest,
) -> Costs:
    """Costs from the file that the request names, or measured on a part of the text, and written there."""
    path = Path(request.costs).expanduser() if request.costs else None
    found = Costs.read(path) if path is not None and path.exists() else None
    kind = coder_of(plan).kind
    if found is not None and any(found.of_kind(kind).values()):
        return found
    sequences = text.sequences[: max(1, _TOKENS // text.sequences.shape[1])]
    sensitivity = None
    if found is not None:
        sensitivity = _sensitivity_of(found, plan, digest(sequences), path)
    options = {"room": calibration.room, "known": sensitivity}
    costs = measure_costs(parameters, plan, sequences, job.progress, job.cancel, calibration.seed, **options)
    if found is not None:
        names = {**found.by_tensor, **costs.by_tensor}
        both = {n: {**found.by_tensor.get(n, {}), **costs.by_tensor.get(n, {})} for n in names}
        costs = dataclasses.replace(costs, by_tensor=both)
    if path is not None:
        costs.write(path)
    return costs


def _sensitivity_of(found: Costs, plan: Plan, text: str, path: Path | None) -> Sensitivity | None:
    """What a file with costs of the other kind knows of the plan's matrices; None where it does not know all.

    Raises:
        PlanError: it is of another model, or text.
    """
    if found.text != text:
        raise PlanError(f"{path}: what it has was measured on another text; name another file for the costs of this")
    squares = found.sensitivity.squares
    shapes = {p.info.name: p.info.shape for p in plan.tensors if is_matrix_to_quantize(p)}
    common = shapes.keys() & squares.keys()
    if not common or any(squares[n].size * shapes[n][-1] != prod(shapes[n]) for n in common):
        raise PlanError(f"{path}: was measured on another model")
    return found.sensitivity if shapes.keys() <= found.by_tensor.keys() else None


def _is_asked_for(plan: TensorPlan) -> bool:
    return plan.reason.startswith("--tensor-type")
