"""One quantization in two containers: an MLX directory and a GGUF file whose weights decode to the same numbers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mlxq.conversion.importance import refuse_importance
from mlxq.conversion.job import ConversionResult, Job
from mlxq.conversion.method_choice import MethodChoice
from mlxq.conversion.request import GGUF_SUFFIX, CalibrationRequest, GgufRequest, is_gguf
from mlxq.conversion.to_gguf import to_gguf
from mlxq.conversion.to_mlx import to_mlx
from mlxq.errors import OutputError, PlanError, VerificationError
from mlxq.plan.planner import PlanOptions
from mlxq.plan.recipes import RECIPES_OF_BOTH
from mlxq.writers.output_file import OutputFile, kept


def to_both(
    job: Job,
    outputs: Sequence[str | os.PathLike[str]],
    options: PlanOptions,
    request: GgufRequest,
    imatrix: str | os.PathLike[str] | None = None,
    calibration: CalibrationRequest = CalibrationRequest(),  # noqa: B008
    choice: MethodChoice | None = None,
) -> ConversionResult:
    """Quantize by the portable or four-way recipe, write both, and compare them tensor by tensor; see `mlxq.convert`.

    The GGUF file is made from the directory while that is still staged, so its blocks are the directory's codes. It
    takes its place first; if the directory then cannot, what the file has replaced is put back.

    Raises:
        PlanError: not one directory and one `.gguf` file, or another recipe.
        OutputError: one of the two cannot be written, or is the importance matrix.
        VerificationError: a weight differs between the two. Neither is left then.
    """
    files = [o for o in outputs if is_gguf(o)]
    directories = [o for o in outputs if not is_gguf(o)]
    if len(files) != 1 or len(directories) != 1:
        raise PlanError(
            f"more than one output is one directory and one file that ends in {GGUF_SUFFIX}, by the portable or "
            f"four-way recipe; got {', '.join(map(os.fspath, outputs))}"
        )
    if options.recipe not in RECIPES_OF_BOTH:
        raise PlanError(
            f"two outputs need --recipe {' or '.join(RECIPES_OF_BOTH)}: those alone choose codes that both hold"
        )
    first = replace(job, output=directories[0])
    second = replace(job, output=files[0], verify=False, on_plan=None, name=job.source)
    beside = request.beside(second.path)
    if not job.dry_run:
        refuse_importance(imatrix, first.path, second.path, *(second.path.with_name(name) for name in beside))
        # What is wrong with its place shows before any work.
        OutputFile(second.path, overwrite=job.overwrite, beside=beside)
        if second.path.resolve().is_relative_to(first.path.resolve()):
            raise OutputError(f"{second.path} lies in the directory {first.path} that is to be made")
    made: list[ConversionResult] = []
    is_new = not os.path.lexists(second.path)

    def export(staged: Path, source: dict[str, Any]) -> None:
        of_stage = replace(second, source=staged, origin=source, options=asdict(options))
        made.append(to_gguf(of_stage, request, lambda file: _compare(staged, file, first, second)))

    if job.dry_run:
        return to_mlx(first, options, imatrix, calibration, choice=choice)
    with kept(second.path, beside):
        try:
            result = to_mlx(first, options, imatrix, calibration, before_commit=export, choice=choice)
        except BaseException:
            if made and is_new:
                for name in (second.path.name, *beside):
                    second.path.with_name(name).unlink(missing_ok=True)
            raise
    return replace(result, gguf=second.path, gguf_plan=made[0].plan)


def _compare(staged: Path, file: Path, first: Job, second: Job) -> list[str]:
    from mlxq.evaluate.comparison.compare import compare

    comparison = compare(staged, file, only=("tensors",), progress=second.progress, cancel=second.cancel)
    if not comparison.passed:
        raise VerificationError(f"{second.path}: {comparison.failure}; nothing was written")
    name = os.path.basename(os.path.abspath(first.path))
    return [f"each of {len(comparison.tensors)} tensors decodes to the numbers of the MLX directory {name}"]
