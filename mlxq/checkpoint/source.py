"""From what a person names (a directory, a GGUF file, a Hub id) to an open `Checkpoint`."""

from __future__ import annotations

import re
from pathlib import Path

from mlxq.checkpoint.base import Checkpoint
from mlxq.errors import CheckpointError
from mlxq.types import ProgressCallback

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")


def open_checkpoint(
    source: str | Path, revision: str | None = None, progress: ProgressCallback | None = None
) -> Checkpoint:
    """Open a model directory, a `.gguf` file, or a Hub id `org/name`, fetching the latter when the cache lacks it."""
    path = resolve(source, revision, progress)
    if path.is_dir():
        return open_directory(path)
    from mlxq.checkpoint.gguf import GgufCheckpoint

    return GgufCheckpoint(path)


def open_directory(path: Path) -> Checkpoint:
    """A directory as MLX quantized it when its config.json says so, else as Hugging Face keeps it."""
    from mlxq.checkpoint.config import read_config
    from mlxq.checkpoint.huggingface import HuggingFaceCheckpoint

    if read_config(path).get("quantization") is not None:
        from mlxq.checkpoint.mlx_directory import MlxCheckpoint

        return MlxCheckpoint(path)
    return HuggingFaceCheckpoint(path)


def resolve(source: str | Path, revision: str | None = None, progress: ProgressCallback | None = None) -> Path:
    """The directory or file that `source` names on this machine, downloaded if need be."""
    path = Path(source).expanduser()
    if path.is_dir() or path.is_file():
        return path
    raise CheckpointError(f"{source}: no such file or directory")
