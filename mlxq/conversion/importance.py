"""An importance matrix on its way into a conversion: read, held against the model, never overwritten; or made."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlxq.api import public
from mlxq.architectures.parameters import ParameterMap
from mlxq.conversion.job import Job, refuse_source
from mlxq.conversion.request import CalibrationRequest, size_in_bytes
from mlxq.errors import CheckpointError, FormatError, OutputError
from mlxq.types import CancelToken, Progress, ProgressCallback, TensorPlan
from mlxq.writers.output_file import OutputFile

if TYPE_CHECKING:
    from mlxq.calibration.imatrix import ImportanceMatrix
    from mlxq.checkpoint.gguf.names import MappedTensor

#: Kinds of modules with matrices; an embedding counts where it is the head, too.
_COUNTED = ("linear", "switch", "embedding")
_SUFFIXES = (".gguf", ".dat")


def read_importance(path: str | os.PathLike[str] | None, output: Path | None) -> ImportanceMatrix | None:
    """The matrix in a file, or None where none is named. It may be a GGUF file too; `output` must not be it.

    Raises:
        CheckpointError, FormatError: the file cannot be read, or is no importance matrix.
        OutputError: the output would replace it.
    """
    if path is None:
        return None
    refuse_importance(path, *(() if output is None else (output,)))
    from mlxq.calibration.imatrix import ImportanceMatrix

    return ImportanceMatrix.read(path)


def refuse_importance(path: str | os.PathLike[str] | None, *outputs: Path) -> None:
    """No output may be the importance matrix, nor a directory that holds it. Files are compared, not names.

    Raises:
        OutputError: one does.
    """
    if path is None or not os.path.exists(path):
        return
    for output in outputs:
        if not output.exists():
            continue
        if output.samefile(path):
            raise OutputError(f"{output} is the importance matrix; choose another output")
        if any(output.samefile(p) for p in Path(path).resolve().parents):
            raise OutputError(f"{output} holds the importance matrix {os.fspath(path)}; choose another output")


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


@public
def write_importance(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    calib: str | os.PathLike[str] = "builtin",
    calib_sequences: int = 128,
    calib_length: int = 512,
    seed: int = 0,
    max_memory: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
    cancel: CancelToken | None = None,
) -> ImportanceMatrix:
    """Run a model over a text and write how large the inputs of its matrices are, as `llama-imatrix` does.

    `llama-quantize --imatrix` reads the file, and so does `convert`. Squares of what goes into each matrix are summed
    by channel, for each expert by itself (source: `tools/imatrix/imatrix.cpp` in llama.cpp), with one block in memory.

    Args:
        source: a Hugging Face or MLX directory, a GGUF file, or a Hub id `org/name`.
        output: the file to make: `.gguf`, or `.dat` for the form that older versions of llama.cpp read.
        calib, calib_sequences, calib_length, seed, max_memory: the text, as in `convert`.
        revision: branch, tag or commit of a Hub id.
        overwrite: replace an existing importance matrix, and nothing else.
        progress: called with `Progress` events, from this thread.
        cancel: stops the work within one block.

    Returns:
        The matrix: `entries` by GGUF name, each with `sums` float32 `[experts or 1, K]` and `counts` of tokens.

    Raises:
        CheckpointError: the source cannot be read, or its architecture has no GGUF form.
        CalibrationError: the text is unfit, or activations overflow.
        OutputError: the file exists, is no importance matrix, or cannot be written.
    """
    from mlxq.calibration.collect import importance_matrix
    from mlxq.calibration.stream import BlockStream
    from mlxq.checkpoint.gguf.names import architecture_for
    from mlxq.checkpoint.source import open_checkpoint
    from mlxq.conversion.calibrated import read_text

    cancel = cancel or CancelToken()
    job = Job(source, output, revision, overwrite, False, False, None, progress, cancel)
    limit = size_in_bytes(max_memory) if max_memory else None
    request = CalibrationRequest(os.fspath(calib), calib_sequences, calib_length, seed, max_memory=limit)
    stage = _MatrixFile(job.path, overwrite=overwrite)

    def report(done: int, total: int) -> None:
        cancel.check()
        if progress:
            progress(Progress("calibrate", done, total, "blocks", "importance"))

    with open_checkpoint(source, revision, progress, accept=architecture_for) as checkpoint:
        refuse_source(stage.path, checkpoint)
        parameters = ParameterMap(checkpoint)
        names = {n: m.name for n, m in gguf_names(parameters).items() if parameters.tensors[n].module in _COUNTED}
        text = read_text(job, parameters, request)
        stream = BlockStream(parameters, text.sequences, room=request.room)
        # Overflow is named where it shows.
        with np.errstate(over="ignore", invalid="ignore"), stream:
            length = text.sequences.shape[1]
            matrix = importance_matrix(stream, names, dataset=text.name, length=length, on_block=report)
    with stage:
        stage.fill(lambda _: matrix.write(stage.staged))
        stage.commit()
    return matrix


class _MatrixFile(OutputFile):
    """The place of an importance matrix: another file is not replaced."""

    kind = "an importance matrix"

    def __init__(self, path: Path, *, overwrite: bool):
        if path.suffix not in _SUFFIXES:
            raise OutputError(f"{path}: name it .gguf, or .dat for the form that older versions of llama.cpp read")
        super().__init__(path, overwrite=overwrite)

    def _is_of_kind(self) -> bool:
        from mlxq.calibration.imatrix import ImportanceMatrix

        try:
            ImportanceMatrix.read(self.path)
        except (FormatError, CheckpointError):
            return False
        return True


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
