"""An importance matrix on its way into a conversion: read, held against the model, never overwritten; or made."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mlxq.architectures.parameters import ParameterMap
from mlxq.errors import CheckpointError, OutputError
from mlxq.types import Progress, TensorPlan

if TYPE_CHECKING:
    from mlxq.calibration.imatrix import ImportanceMatrix
    from mlxq.checkpoint.gguf.names import MappedTensor
    from mlxq.conversion.job import Job
    from mlxq.conversion.request import CalibrationRequest


def read_importance(path: str | os.PathLike[str] | None, output: Path | None) -> ImportanceMatrix | None:
    """The matrix in a file, or None where none is named. It may be a GGUF file too; `output` must not be it."""
    if path is None:
        return None
    if output is not None and output.exists() and os.path.exists(path) and output.samefile(path):
        raise OutputError(f"{output} is the importance matrix; choose another output")
    from mlxq.calibration.imatrix import ImportanceMatrix

    return ImportanceMatrix.read(path)


def gguf_names(parameters: ParameterMap) -> dict[str, MappedTensor]:
    """Parameter -> its name in a GGUF file, under which importance matrices have it too.

    Raises:
        CheckpointError: an architecture without a GGUF form, or a parameter that it has no name for.
    """
    from mlxq.checkpoint.gguf.names import architecture_for, to_gguf

    _, arch = architecture_for(parameters.checkpoint.config)
    names = {}
    for name in parameters.tensors:
        mapped = to_gguf(arch, name)
        if mapped is None:
            raise CheckpointError(
                f"{parameters.checkpoint.path}: {name} has no place in a GGUF file of the architecture {arch.name!r}"
            )
        names[name] = mapped
    return names


def write_importance(job: Job, path: str | os.PathLike[str], request: CalibrationRequest) -> ImportanceMatrix:
    """Make the importance matrix of a job's source on a calibration text, and write it for `llama-quantize`.

    Args:
        job: its source is read; nothing is converted.
        path: of the file, in the old form where it ends in `.dat`.

    Raises:
        CheckpointError: an architecture without a GGUF form.
        CalibrationError: the text is unfit, or activations overflow.
        OutputError: the file cannot be written.
    """
    from mlxq.calibration.collect import importance_matrix
    from mlxq.calibration.stream import BlockStream
    from mlxq.checkpoint.gguf.names import architecture_for
    from mlxq.checkpoint.source import open_checkpoint
    from mlxq.conversion.calibrated import read_text

    def report(done: int, total: int) -> None:
        job.cancel.check()
        if job.progress:
            job.progress(Progress("calibrate", done, total, "blocks", "importance"))

    with open_checkpoint(job.source, job.revision, job.progress, accept=architecture_for) as checkpoint:
        parameters = ParameterMap(checkpoint)
        kinds = ("linear", "switch", "embedding")
        names = {n: m.name for n, m in gguf_names(parameters).items() if parameters.tensors[n].module in kinds}
        text = read_text(job, parameters, request)
        with BlockStream(parameters, text.sequences) as stream:
            length = text.sequences.shape[1]
            matrix = importance_matrix(stream, names, dataset=text.name, length=length, on_block=report)
    matrix.write(path)
    return matrix


def check_importance(
    matrix: ImportanceMatrix | None, plans: Iterable[TensorPlan], names: Mapping[str, MappedTensor]
) -> list[str]:
    """Notes on quantized tensors that the matrix says nothing about.

    Raises:
        PlanError: the matrix was computed for another model.
    """
    if matrix is None:
        return []
    quantized = [(names[p.info.name].name, p.info.shape) for p in plans if p.action in ("quantize", "requantize")]
    missing = matrix.check(quantized)
    if not missing:
        return []
    count = f"{len(missing)} tensors have" if len(missing) > 1 else "one tensor has"
    return [f"{count} no importance in the matrix, so all their channels count alike: {missing[0]}"]
