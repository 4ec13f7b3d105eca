"""An importance matrix on its way into a conversion: read, held against the model, never overwritten."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mlxq.architectures.parameters import ParameterMap
from mlxq.errors import CheckpointError, OutputError
from mlxq.types import TensorPlan

if TYPE_CHECKING:
    from mlxq.calibration.imatrix import ImportanceMatrix
    from mlxq.checkpoint.gguf.names import MappedTensor


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
