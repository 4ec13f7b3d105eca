"""From a quantized model to a directory in GPTQ's or AWQ's layout, codes and weights kept."""

from __future__ import annotations

from typing import Any

from mlxq.architectures.parameters import ParameterMap
from mlxq.architectures.registry import model_classes
from mlxq.checkpoint.source import open_checkpoint
from mlxq.conversion.job import OTHER_FILES, ConversionResult, Job, companions_of, refuse_source
from mlxq.errors import CheckpointError, FormatError, PlanError
from mlxq.plan.packed_planner import PACKED_FORMATS, SAME_NAMES, PackedPlan, make_packed_plan
from mlxq.writers import packed
from mlxq.writers.laid_out import sha256
from mlxq.writers.manifest import NAME as MANIFEST
from mlxq.writers.manifest import manifest_json
from mlxq.writers.output import OutputDirectory
from mlxq.writers.stream import WeightStream


def to_packed(job: Job, to: str, *, exact: bool = False) -> ConversionResult:
    """Plan, write and prove such a directory; see `mlxq.export`. `to` is one of `PACKED_FORMATS`.

    Raises:
        PlanError: an unknown format, or a model or grid that it does not hold.
        MlxqError: a subclass for each other stage. Nothing is left at the output then.
    """
    if to not in PACKED_FORMATS:
        raise PlanError(f"--to {to}: choose one of {', '.join(PACKED_FORMATS)}, or leave it out for a GGUF file")
    stage = None if job.dry_run else OutputDirectory(job.path, overwrite=job.overwrite)
    with open_checkpoint(job.source, job.revision, job.progress, accept=_accept) as checkpoint:
        _accept(checkpoint.config)
        if stage is not None:
            refuse_source(stage.path, checkpoint)
        parameters = ParameterMap(checkpoint)
        plan = _plan(parameters, to, exact)
        if job.on_plan:
            job.on_plan(plan)
        if stage is None:
            return ConversionResult(None, plan, checkpoint.config)
        companions = companions_of(checkpoint)
        stage.check_space(plan.nbytes + OTHER_FILES)
        target = packed.PackedTarget(parameters, plan)
        weights = WeightStream(parameters, plan, target, job.progress, job.cancel, is_whole=target.is_whole)
        own = {
            "config.json": packed.config_json(checkpoint.config, plan),
            packed.SETTINGS_FILES[plan.layout]: packed.settings_json(plan),
        }
        with stage:
            for name, content in (companions | own).items():
                stage.write(name, content)
            digests = stage.fill(weights.write)
            notes = target.notes()
            verification = job.prove(parameters, stage.stage, plan)
            files = digests.written | {name: sha256(stage.stage / name) for name in (*own, *companions)}
            stage.write(
                MANIFEST,
                manifest_json(
                    source=job.describe(checkpoint, digests.source),
                    options={"to": to, "exact": exact},
                    plan=plan,
                    files=dict(sorted(files.items())),
                    verification=verification.to_dict() if verification else None,
                    notes=[*plan.notes, *notes],
                    errors=target.errors.relative_rmse,
                ),
            )
            stage.commit()
        return ConversionResult(stage.path, plan, checkpoint.config, verification, tuple(notes))


def _accept(config: dict[str, Any]) -> None:
    """Refuse a model whose tensors transformers would look for under other names."""
    model_classes(config)
    if config["model_type"] not in SAME_NAMES:
        raise CheckpointError(
            f"architecture {config['model_type']!r} cannot be exported to GPTQ or AWQ: mlx-lm names or stores its "
            f"tensors in another way than transformers, or may; the ones that can are {', '.join(sorted(SAME_NAMES))}"
        )


def _plan(parameters: ParameterMap, to: str, exact: bool) -> PackedPlan:
    try:
        return make_packed_plan(
            parameters.tensors.values(),
            to,
            lambda info: packed.grid_facts(parameters, info),
            exact=exact,
            cast_protected=parameters.cast_protected,
            dropped=parameters.dropped,
        )
    except FormatError as e:
        raise PlanError(str(e)) from e
