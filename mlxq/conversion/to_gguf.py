"""From any source to a GGUF file."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlxq.architectures.parameters import ParameterMap
from mlxq.checkpoint.gguf.fields import config_name
from mlxq.checkpoint.gguf.names import GgufArchitecture, MappedTensor, architecture_for
from mlxq.checkpoint.source import open_checkpoint
from mlxq.conversion.budget import Known
from mlxq.conversion.calibrated import calibrate, is_needed
from mlxq.conversion.importance import check_importance, gguf_names, read_importance
from mlxq.conversion.job import OTHER_FILES, ConversionResult, Job, companions_of, refuse_source
from mlxq.conversion.method_choice import MethodChoice
from mlxq.conversion.request import MODELFILE, BudgetRequest, CalibrationRequest, GgufRequest, manifest_name
from mlxq.errors import PlanError
from mlxq.formats import crossings
from mlxq.formats.geometry import BLOCK_FORMATS
from mlxq.formats.superblocks import K_TYPES, SUPER_BLOCK
from mlxq.plan.gguf_mixes import GgufModel
from mlxq.plan.gguf_planner import GgufOptions, GgufSource, make_gguf_plan, with_nearest_file_type
from mlxq.plan.methods import CALIBRATED
from mlxq.plan.planner import Plan
from mlxq.types import Method, TensorInfo
from mlxq.writers.gguf.hyperparameters import rope_tensors
from mlxq.writers.gguf.metadata import file_metadata, file_type_number, metadata_notes, ollama_modelfile
from mlxq.writers.gguf.target import GgufTarget, bytes_beside
from mlxq.writers.manifest import manifest_json
from mlxq.writers.output_file import OutputFile
from mlxq.writers.stream import WeightStream
from mlxq.writers.weighting import Weighting

#: Rows of scales that are looked at together.
_ROWS = 1 << 14


def to_gguf(
    job: Job,
    request: GgufRequest,
    compare: Callable[[Path], list[str]] = lambda staged: [],
    calibration: CalibrationRequest = CalibrationRequest(),  # noqa: B008
    budget: BudgetRequest = BudgetRequest(),  # noqa: B008
    known: Known | None = None,
    choice: MethodChoice | None = None,
) -> ConversionResult:
    """Plan, write and prove a GGUF file; see `mlxq.convert`.

    `compare` is called with the file while that is staged, and gives notes for the manifest. `calibration` is for
    methods that read a text, `budget` for types chosen by measurement, `known` what other conversions of the model
    have made already, and `choice` decides on the method where `request` has none.
    """
    options = GgufOptions(request.type, request.tensor_types, request.exact, request.as_stored, request.method)
    stage = None
    if not job.dry_run:
        stage = OutputFile(job.path, overwrite=job.overwrite, beside=request.beside(job.path))
    importance = read_importance(request.imatrix, stage.path if stage else None)
    with open_checkpoint(job.source, job.revision, job.progress, accept=architecture_for) as checkpoint:
        if stage is not None:
            refuse_source(stage.path, checkpoint)
        if checkpoint.kind != "gguf":
            companions_of(checkpoint)
        _, arch = architecture_for(checkpoint.config)
        parameters = ParameterMap(checkpoint)
        names = gguf_names(parameters)
        model = _model(checkpoint.config, arch)
        sources = _sources(parameters, names, options)
        choice = choice or MethodChoice(request.method)

        def planned(method: Method | None) -> Plan:
            how = dataclasses.replace(options, method=method)
            has_imatrix = importance is not None or method in CALIBRATED
            return make_gguf_plan(sources, how, model, has_imatrix=has_imatrix, dropped=parameters.dropped)

        plan = choice.plan(planned, has_own=importance is not None or request.as_stored)
        without = check_importance(importance, plan.tensors, names)
        # Made before any work: most of what can be wrong with a tokenizer or a setting shows here.
        metadata = file_metadata(checkpoint, arch, plan, source=job.source_name, pre=request.pre)
        rope = rope_tensors(checkpoint.config)
        known = known or Known()
        with choice.trying():
            known.prepare(job, parameters, plan, calibration, budget)
        stored_names = {name: mapped.name for name, mapped in names.items()}
        if budget:
            # What is said of types that do not fit rows is of the types that are replaced.
            plan = dataclasses.replace(plan, notes=())
            beside = bytes_beside(metadata, plan, stored_names, rope)
            plan = known.within_budget(plan, budget, checkpoint.config, beside)
            plan = with_nearest_file_type(plan, stored_names, model)
            metadata |= {"general.file_type": ("uint32", file_type_number(plan))}
        if job.on_plan:
            job.on_plan(plan)
        if stage is None:
            return ConversionResult(None, plan, checkpoint.config, stored_names=stored_names)
        stage.check_space(plan.nbytes + OTHER_FILES)
        weighting = Weighting(importance, stored_names)
        codes, calibrated, scaled = None, list[str](), parameters
        if is_needed(plan):
            with choice.trying():
                found = calibrate(job, stage.path, parameters, plan, known.text, calibration, known.costs)
            codes, calibrated, scaled = found
            plan = scaled.explained(plan)
        target = GgufTarget(scaled, plan, names, metadata, rope, weighting, stage.path.name, codes)
        weights = WeightStream(scaled, plan, target, job.progress, job.cancel)
        with stage, codes or contextlib.nullcontext():
            digests = stage.fill(weights.write)
            notes = [*target.notes(), *without, *calibrated, *metadata_notes(checkpoint)]
            if request.exact:
                _refuse_changed(target.errors.relative_rmse, names)
            verification = job.prove(parameters, stage.staged, plan, scaled)
            notes += compare(stage.staged)
            if request.modelfile:
                stage.write(MODELFILE, ollama_modelfile(stage.path.name, metadata, checkpoint).encode())
            stage.write(
                manifest_name(stage.path),
                manifest_json(
                    source=job.describe(checkpoint, digests.source),
                    options=job.options
                    | _options(request, calibration if codes else None, budget)
                    | choice.described(),
                    plan=plan,
                    files=digests.written,
                    verification=verification.to_dict() if verification else None,
                    notes=notes,
                    errors=target.errors.relative_rmse,
                    stored_names=stored_names,
                ),
            )
            stage.commit()
        return ConversionResult(
            stage.path, plan, checkpoint.config, verification, tuple(notes), stored_names=stored_names
        )


def _options(request: GgufRequest, calibration: CalibrationRequest | None, budget: BudgetRequest) -> dict[str, Any]:
    """What was asked for, as the manifest says it: file names without their places."""
    out = dataclasses.asdict(request)
    out["imatrix"] = None if request.imatrix is None else Path(request.imatrix).name
    if budget:
        out["budget"] = budget.described()
    if calibration is not None:
        out["calibration"] = dataclasses.asdict(calibration) | {"source": Path(calibration.source).name}
    return out


def _model(config: dict[str, Any], arch: GgufArchitecture) -> GgufModel:
    def number(key: str, default: int = 0) -> int:
        return config.get(config_name(arch.model_type, key)) or default

    heads = number("attention.head_count")
    return GgufModel(
        arch=arch.name,
        n_layers=number("block_count"),
        n_heads=heads,
        n_kv_heads=number("attention.head_count_kv", heads),
        n_experts=number("expert_count"),
    )


def _sources(parameters: ParameterMap, names: dict[str, MappedTensor], options: GgufOptions) -> list[GgufSource]:
    # Blocks that are stored as they are need no other type.
    asked = bool(options.file_type or options.tensor_types)
    return [
        GgufSource(
            info,
            names[info.name].name,
            _exact_types(parameters, info) if info.dtype not in BLOCK_FORMATS or asked else (),
        )
        for info in parameters.tensors.values()
    ]


def _exact_types(parameters: ParameterMap, info: TensorInfo) -> tuple[str, ...]:
    """The block types that hold a tensor's codes exactly, the smallest first: its scales decide, and are read."""
    if info.spec is None:
        return ()
    found = [n for n in crossings.candidates(info.spec) if n not in K_TYPES or info.shape[-1] % SUPER_BLOCK == 0]
    for rows in info.row_ranges(_ROWS * info.shape[-1]):
        if not found:
            break
        q = parameters.read_quantized(info.name, rows)
        exact = crossings.exact_types(q)
        found = [name for name in found if name in exact]
    return tuple(found)


def _refuse_changed(errors: dict[str, float], names: dict[str, MappedTensor]) -> None:
    changed = [name for name, error in errors.items() if error]
    if not changed:
        return
    name = names[changed[0]].name.removesuffix(".weight")
    what = f"{name} changed" if len(changed) == 1 else f"{len(changed)} tensors changed, such as {name},"
    raise PlanError(
        f"--exact: {what} by {errors[changed[0]]:.1e} of its size; --tensor-type '{name}=F32' keeps it, and mlxq "
        "export keeps all that a GGUF file can hold"
    )
