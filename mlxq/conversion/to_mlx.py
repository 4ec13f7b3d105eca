"""From any source to an MLX directory."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlxq.architectures.parameters import ParameterMap
from mlxq.architectures.registry import model_classes
from mlxq.checkpoint.source import open_checkpoint
from mlxq.conversion.budget import Known
from mlxq.conversion.calibrated import calibrate, is_needed
from mlxq.conversion.importance import check_importance, gguf_names, read_importance
from mlxq.conversion.job import OTHER_FILES, ConversionResult, Job, companions_of, refuse_source
from mlxq.conversion.method_choice import MethodChoice
from mlxq.conversion.request import BudgetRequest, CalibrationRequest
from mlxq.plan.planner import Plan, PlanOptions, make_plan
from mlxq.types import Method
from mlxq.writers import mlx as mlx_writer
from mlxq.writers.laid_out import sha256
from mlxq.writers.manifest import NAME as MANIFEST
from mlxq.writers.manifest import manifest_json
from mlxq.writers.output import OutputDirectory
from mlxq.writers.stream import WeightStream
from mlxq.writers.weighting import Weighting


def to_mlx(
    job: Job,
    options: PlanOptions,
    imatrix: str | os.PathLike[str] | None = None,
    calibration: CalibrationRequest = CalibrationRequest(),  # noqa: B008
    budget: BudgetRequest = BudgetRequest(),  # noqa: B008
    before_commit: Callable[[Path, dict[str, Any]], None] = lambda staged, source: None,
    known: Known | None = None,
    choice: MethodChoice | None = None,
) -> ConversionResult:
    """Plan, write and prove an MLX directory; see `mlxq.convert`.

    `imatrix` weights the errors of the portable recipe; `calibration` is for methods that read a text, `budget`
    for bits chosen by measurement, `known` what other conversions of the model have made already, and `choice` decides
    on the method where `options` has none.
    `before_commit` is called with the stage and what the manifest says of the source, when all is staged.
    """
    stage = None if job.dry_run else OutputDirectory(job.path, overwrite=job.overwrite)
    importance = read_importance(imatrix, stage.path if stage else None)
    with open_checkpoint(job.source, job.revision, job.progress, accept=model_classes) as checkpoint:
        if stage is not None:
            refuse_source(stage.path, checkpoint)
        parameters = ParameterMap(checkpoint)
        choice = choice or MethodChoice(options.method)
        plan = choice.plan(lambda method: _plan(parameters, options, method), has_own=options.recipe == "portable")
        known = known or Known()
        with choice.trying():
            known.prepare(job, parameters, plan, calibration, budget)
        if budget:
            plan = known.within_budget(plan, budget, checkpoint.config)
        names = gguf_names(parameters) if importance else {}
        without = check_importance(importance, plan.tensors, names)
        if job.on_plan:
            job.on_plan(plan)
        if stage is None:
            return ConversionResult(None, plan, checkpoint.config)
        companions = companions_of(checkpoint)
        stage.check_space(plan.nbytes + OTHER_FILES)
        weighting = Weighting(importance, {name: mapped.name for name, mapped in names.items()})
        codes, calibrated, scaled = None, list[str](), parameters
        if is_needed(plan):
            with choice.trying():
                found = calibrate(job, stage.path, parameters, plan, known.text, calibration, known.costs)
            codes, calibrated, scaled = found
            plan = scaled.explained(plan)
        target = mlx_writer.MlxTarget(scaled, plan, weighting, codes)
        weights = WeightStream(scaled, plan, target, job.progress, job.cancel)
        with stage, codes or contextlib.nullcontext():
            for name, content in companions.items():
                stage.write(name, content)
            stage.write("config.json", mlx_writer.config_json(checkpoint.config, plan.tensors, plan.dtype))
            digests = stage.fill(weights.write)
            notes = [*target.notes(), *without, *calibrated]
            verification = job.prove(parameters, stage.stage, plan, scaled)
            files = digests.written | {name: sha256(stage.stage / name) for name in ("config.json", *companions)}
            described = job.describe(checkpoint, digests.source)
            stage.write(
                MANIFEST,
                manifest_json(
                    source=described,
                    options=_options(options, imatrix, calibration if codes else None, budget) | choice.described(),
                    plan=plan,
                    files=dict(sorted(files.items())),
                    verification=verification.to_dict() if verification else None,
                    notes=notes,
                    errors=target.errors.relative_rmse,
                ),
            )
            before_commit(stage.stage, described)
            stage.commit()
        return ConversionResult(stage.path, plan, checkpoint.config, verification, tuple(notes))


def _plan(parameters: ParameterMap, options: PlanOptions, method: Method | None) -> Plan:
    return make_plan(
        parameters.tensors.values(),
        dataclasses.replace(options, method=method),
        float_modules=parameters.float_modules,
        cast_protected=parameters.cast_protected,
        dropped=parameters.dropped,
        model_dtype=parameters.checkpoint.config.get("torch_dtype"),
    )


def _options(
    options: PlanOptions,
    imatrix: str | os.PathLike[str] | None,
    calibration: CalibrationRequest | None,
    budget: BudgetRequest,
) -> dict[str, Any]:
    """What was asked for, as the manifest says it: file names without their places."""
    out = dataclasses.asdict(options)
    if imatrix:
        out["imatrix"] = Path(imatrix).name
    if calibration is not None:
        out["calibration"] = dataclasses.asdict(calibration) | {"source": Path(calibration.source).name}
    if budget:
        out["budget"] = budget.described()
    return out
