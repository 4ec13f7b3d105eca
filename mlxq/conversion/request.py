"""What can be asked for of a GGUF file, and how it and what stands beside it are named."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

GGUF_SUFFIX = ".gguf"
MODELFILE = "Modelfile"


@dataclass(frozen=True)
class CalibrationRequest:
    """What was asked for.

    `source` is `builtin`, `self` or a file; `max_memory` bytes decide whether hidden states wait on disk.
    """

    source: str = "builtin"
    n_sequences: int = 128
    length: int = 512
    seed: int = 0
    sweeps: int = 1
    max_memory: int | None = None


@dataclass(frozen=True)
class GgufRequest:
    """What was asked for of a GGUF file; see `mlxq.convert`. `as_stored` never quantizes."""

    type: str | None = None
    tensor_types: tuple[str, ...] = ()
    imatrix: str | os.PathLike[str] | None = None
    exact: bool = False
    pre: str | None = None
    modelfile: bool = False
    as_stored: bool = False

    def beside(self, path: Path) -> tuple[str, ...]:
        """Names of the files that stand beside the GGUF file."""
        return (manifest_name(path), *((MODELFILE,) if self.modelfile else ()))


def is_gguf(output: str | os.PathLike[str] | None) -> bool:
    """Whether an output is named as a GGUF file."""
    return output is not None and os.fspath(output).lower().endswith(GGUF_SUFFIX)


def manifest_name(path: Path) -> str:
    """Name of the manifest beside a GGUF file."""
    return f"{path.stem}.mlxq.json"
