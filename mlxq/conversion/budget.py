"""A plan within a budget: every tensor's grid by what it costs the model's predictions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mlxq.architectures.memory import memory_to_run
from mlxq.architectures.parameters import ParameterMap
from mlxq.calibration.texts import CalibrationText
from mlxq.conversion.costs import Costs, measure_costs
from mlxq.conversion.job import Job
from mlxq.conversion.request import BudgetRequest, size_in_bytes
from mlxq.errors import PlanError
from mlxq.formats.geometry import affine_bytes
from mlxq.plan.budget import Option, allocate
from mlxq.plan.planner import Plan
from mlxq.types import QuantSpec, TensorPlan

#: Tokens that sensitivities are measured on: the costs of two halves of them agree within a few percent.
_TOKENS = 16384
#: Share of a memory of that size that is left for the system and other programs.
_HEADROOM = 0.25


def budget_bytes(request: BudgetRequest, plan: Plan, config: dict[str, Any]) -> int:
    """Bytes that the weights may take.

    Raises:
        PlanError: more than one budget, or one that leaves nothing for weights.
    """
    asked = {"--target-bpw": request.bpw, "--target-size": request.size, "--fit": request.memory}
    given = [name for name, value in asked.items() if value is not None]
    if len(given) != 1:
        raise PlanError(f"one budget at a time: {' and '.join(given)} were given")
    if request.bpw:
        return int(request.bpw * plan.n_weights / 8)
    if request.size:
        return size_in_bytes(request.size)
    memory = size_in_bytes(request.memory)
    beside = memory_to_run(0, config, request.context)
    left = int(memory * (1 - _HEADROOM)) - beside.total
    if left <= 0:
        raise PlanError(
            f"--fit {request.memory}: {memory * _HEADROOM / 1e9:.1f} GB are left to the system and the cache and"
            f" scratch of {request.context} tokens take {beside.total / 1e9:.1f} GB, so there is no room for weights"
        )
    return left


def within_budget(parameters: ParameterMap, plan: Plan, costs: Costs, request: BudgetRequest) -> Plan:
    """The plan with each quantized tensor's grid chosen such that the whole fits and costs least.

    Tensors that `--tensor-type` names keep what it says.

    Raises:
        PlanError: the budget cannot be met; the message says the smallest possible.
    """
    budget = budget_bytes(request, plan, parameters.checkpoint.config)
    free = {p.info.name: p for p in plan.tensors if p.spec is not None and _is_free(p)}
    missing = [name for name in free if name not in costs.by_tensor]
    if missing:
        raise PlanError(f"{request.costs}: says nothing of {missing[0]}; it was measured on another model")
    free = {name: p for name, p in free.items() if costs.by_tensor[name]}
    fixed = plan.nbytes - sum(plan.nbytes_by_name[name] for name in free)
    options = {name: _options(p, costs.by_tensor[name]) for name, p in free.items()}
    try:
        chosen = allocate(options, budget - fixed)
    except PlanError as e:
        least = fixed + sum(min(o.nbytes for o in of) for of in options.values())
        raise PlanError(
            f"the budget of {budget / 1e6:,.1f} MB cannot be met: the smallest possible is {least / 1e6:,.1f} MB"
            f" ({8 * least / plan.n_weights:.2f} bpw)"
        ) from e
    tensors = tuple(_replaced(p, chosen.get(p.info.name)) for p in plan.tensors)
    total = sum(o.cost for o in chosen.values())
    note = f"bits by budget: {budget / 1e6:,.1f} MB; the measured costs add up to {total:.3g} nats per token"
    return dataclasses.replace(plan, tensors=tensors, notes=(*plan.notes, note))


def costs_of(
    job: Job, parameters: ParameterMap, plan: Plan, text: CalibrationText, request: BudgetRequest, seed: int
) -> Costs:
    """Costs from the file that the request names, or measured on a part of the text, and written there."""
    path = Path(request.costs).expanduser() if request.costs else None
    if path is not None and path.exists():
        return Costs.read(path)
    n = max(1, _TOKENS // text.sequences.shape[1])
    costs = measure_costs(parameters, plan, text.sequences[:n], job.progress, job.cancel, seed)
    if path is not None:
        costs.write(path)
    return costs


def _is_free(plan: TensorPlan) -> bool:
    return plan.action != "repack" and not plan.reason.startswith("--tensor-type")


def _options(plan: TensorPlan, costs: dict[QuantSpec, float]) -> list[Option]:
    return [Option(spec, affine_bytes(plan.info.shape, spec, plan.dtype), cost) for spec, cost in costs.items()]


def _replaced(plan: TensorPlan, option: Option | None) -> TensorPlan:
    if option is None:
        return plan
    reason = f"by budget: costs {option.cost:.2g} nats per token"
    return dataclasses.replace(plan, spec=option.spec, reason=reason)
