"""The whole of a conversion: checkpoint, plan, quantizers, writers, proof. The only module that sees all stages."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxq.api import public
from mlxq.architectures.parameters import ParameterMap
from mlxq.architectures.registry import model_classes
from mlxq.checkpoint.base import Checkpoint
from mlxq.checkpoint.huggingface import is_tokenizer
from mlxq.checkpoint.source import open_checkpoint
from mlxq.errors import CheckpointError, OutputError, VerificationError
from mlxq.plan.planner import Plan, PlanOptions, make_plan
from mlxq.types import CancelToken, ProgressCallback
from mlxq.writers import mlx as mlx_writer
from mlxq.writers.laid_out import sha256
from mlxq.writers.manifest import NAME as MANIFEST
from mlxq.writers.manifest import manifest_json
from mlxq.writers.output import OutputDirectory
from mlxq.writers.stream import WeightStream

#: Room for tokenizer, configuration and manifest, beside the weights.
_OTHER_FILES = 64 << 20


@dataclass(frozen=True)
class ConversionResult:
    """What a conversion did. `path` is None for a dry run; `verification` is None when it was skipped."""

    path: Path | None
    plan: Plan
    config: dict[str, Any]
    verification: Any = None
    notes: tuple[str, ...] = field(default=())


@public
def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    recipe: str | None = None,
    tensor_types: str | Sequence[str] = (),
    keep: str | Sequence[str] = (),
    dtype: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
    dry_run: bool = False,
    on_plan: Callable[[Plan], None] | None = None,
    progress: ProgressCallback | None = None,
    cancel: CancelToken | None = None,
) -> ConversionResult:
    """Quantize a model into an MLX directory that stock mlx-lm loads, and prove the result.

    Args:
        source: a Hugging Face or MLX directory, a GGUF file, or a Hub id `org/name`.
        output: the directory to make; not needed for a dry run.
        bits, group_size: of the affine grid; default 4 and 64, or the codes of an already quantized source.
        recipe: `uniform` or `mixed` (more bits for sensitive tensors).
        tensor_types: `REGEX=BITS[:GROUP]` overrides; the last that matches a parameter name wins.
        keep: regular expressions of parameters that stay float.
        dtype: `float16`, `bfloat16` or `float32` for scales and kept tensors; default the source's.
        revision: branch, tag or commit of a Hub id.
        overwrite: replace an existing model directory, on success only.
        verify: run source and result over a short text, and fail when the result is broken.
        dry_run: plan only; nothing is read but headers, nothing is written.
        on_plan: called with the plan, before any work.
        progress: called with `Progress` events, from this thread.
        cancel: stops the conversion within one chunk of rows.

    Raises:
        MlxqError: a subclass for each stage; nothing is left at `output` then.
    """
    options = PlanOptions(bits, group_size, recipe, _patterns(tensor_types), _patterns(keep), dtype)
    stage = None if dry_run else OutputDirectory(_output_path(output), overwrite=overwrite)
    with open_checkpoint(source, revision, progress, accept=model_classes) as checkpoint:
        parameters = ParameterMap(checkpoint)
        plan = make_plan(
            parameters.tensors.values(),
            options,
            float_modules=parameters.float_modules,
            cast_protected=parameters.cast_protected,
            dropped=parameters.dropped,
        )
        if on_plan:
            on_plan(plan)
        if stage is None:
            return ConversionResult(None, plan, checkpoint.config)
        _refuse_source(stage.path, checkpoint.path)
        companions = checkpoint.companion_files()
        if not is_tokenizer(companions):
            raise CheckpointError(f"{checkpoint.path}: no tokenizer (tokenizer.json or tokenizer.model) is there")
        stage.check_space(plan.nbytes + _OTHER_FILES)
        target = mlx_writer.MlxTarget(parameters, plan)
        weights = WeightStream(parameters, plan, target, progress, cancel or CancelToken())
        with stage:
            for name, content in companions.items():
                stage.write(name, content)
            stage.write("config.json", mlx_writer.config_json(checkpoint.config, plan.tensors, plan.dtype))
            digests = weights.write(stage.stage)
            notes = target.notes()
            verification = _verify(parameters, stage.stage, plan, progress, cancel) if verify else None
            files = digests.written | {name: sha256(stage.stage / name) for name in ("config.json", *companions)}
            stage.write(
                MANIFEST,
                manifest_json(
                    source=_describe(source, checkpoint, digests.source),
                    options=_options(options),
                    plan=plan,
                    files=dict(sorted(files.items())),
                    verification=verification.to_dict() if verification else None,
                    notes=notes,
                ),
            )
            stage.commit()
        return ConversionResult(stage.path, plan, checkpoint.config, verification, tuple(notes))


def _patterns(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _output_path(output: str | os.PathLike[str] | None) -> Path:
    if output is None or not os.fspath(output):
        raise OutputError("no output directory given")
    return Path(output).expanduser()


def _refuse_source(output: Path, source: Path) -> None:
    """An output must neither hold its source nor lie in it. Files are compared, not names: names may differ in case."""
    above = [p for p in (output, *output.resolve().parents) if p.exists()]
    if output.exists() and any(output.samefile(p) for p in (source, *source.resolve().parents)):
        raise OutputError(f"{output} holds the source; choose another output")
    if any(p.samefile(source) for p in above):
        raise OutputError(f"{output} lies in the source directory; choose another output")


def _verify(
    parameters: ParameterMap, result: Path, plan: Plan, progress: ProgressCallback | None, cancel: CancelToken | None
) -> Any:
    from mlxq.evaluate.verify import verify

    outcome = verify(parameters, result, bpw=plan.bpw, progress=progress, cancel=cancel)
    if not outcome.passed:
        raise VerificationError(f"{parameters.checkpoint.path}: {outcome.failure}; nothing was written")
    return outcome


def _describe(source: Any, checkpoint: Checkpoint, files: dict[str, str]) -> dict[str, Any]:
    text = os.fspath(source)
    name = os.path.basename(os.path.abspath(text)) if os.path.exists(text) else text
    described: dict[str, Any] = {"name": name, "kind": checkpoint.kind}
    if checkpoint.path.parent.name == "snapshots":
        described["commit"] = checkpoint.path.name
    return described | {"files": dict(sorted(files.items()))}


def _options(options: PlanOptions) -> dict[str, Any]:
    return {
        "bits": options.bits,
        "group_size": options.group_size,
        "recipe": options.recipe,
        "tensor_types": list(options.tensor_types),
        "keep": list(options.keep),
        "dtype": options.dtype,
    }
