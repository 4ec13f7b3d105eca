"""An importance matrix on its way into a conversion: read, held against the model, never overwritten."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from mlxq.architectures.parameters import ParameterMap
from mlxq.calibration.imatrix import ImportanceMatrix
from mlxq.checkpoint.gguf.names import GgufArchitecture, MappedTensor
from mlxq.checkpoint.gguf.names import to_gguf as gguf_name
from mlxq.errors import CheckpointError, OutputError
from mlxq.types import TensorPlan


def read_importance(path: str | os.PathLike[str] | None, output: Path | None) -> ImportanceMatrix | None:
    """The matrix in a file, or None where none is named. It may be a GGUF file too; `output` must not be it."""
    if path is None:
        return None
    if output is not None and output.exists() and os.path.exists(path) and output.samefile(path):
        raise OutputError(f"{output} is the importance matrix; choose another output")
    return ImportanceMatrix.read(path)


def gguf_names(parameters: ParameterMap, arch: GgufArchitecture) -> dict[str, MappedTensor]:
    """Parameter -> its name in a GGUF file, under which importance matrices have it too.

    Raises:
        CheckpointError: a parameter that the architecture has no name for.
    """
    names = {}
    for name in parameters.tensors:
        mapped = gguf_name(arch, name)
        if mapped is None:
            raise CheckpointError(
                f"{parameters.checkpoint.path}: {name} has no place in a GGUF file of the architecture {arch.name!r}"
            )
        names[name] = mapped
    return names


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
