"""From what a person names (a directory, a GGUF file, a Hub id) to an open `Checkpoint`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlxq.checkpoint.base import Checkpoint
from mlxq.checkpoint.config import read_config
from mlxq.checkpoint.huggingface import HuggingFaceCheckpoint
from mlxq.checkpoint.mlx_directory import MlxCheckpoint
from mlxq.checkpoint.packed.checkpoint import PackedCheckpoint
from mlxq.checkpoint.packed.schemes import find_settings
from mlxq.errors import CheckpointError
from mlxq.types import ProgressCallback

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_FILE_ENDINGS = (".gguf", ".safetensors", ".bin", ".json", ".pth", ".npz")


def open_checkpoint(
    source: str | os.PathLike[str],
    revision: str | None = None,
    progress: ProgressCallback | None = None,
    accept: Callable[[dict[str, Any]], object] | None = None,
) -> Checkpoint:
    """Open a model: a Hugging Face or MLX directory, a `.gguf` file, or a Hub id `org/name`.

    Args:
        source: a path that exists is always taken as that path; else `org/name` is looked up in the Hub's cache and
            then on the Hub.
        revision: branch, tag or commit of a Hub id.
        progress: called with the bytes of a download.
        accept: called with the config.json of a Hub model before its weights are fetched; it raises to refuse it.

    Raises:
        CheckpointError: no such source, or one that cannot be read; the message says why.
        FormatError: a GGUF file that breaks the format's rules.
    """
    path = resolve(source, revision, progress, accept)
    if path.is_dir():
        return _open_directory(path)
    from mlxq.checkpoint.gguf.checkpoint import GgufCheckpoint

    return GgufCheckpoint(path)


def _open_directory(path: Path) -> Checkpoint:
    """As MLX quantized it when config.json has `quantization`, else as Hugging Face keeps it, packed or not."""
    files = sorted(p.name for p in path.glob("*.gguf"))
    if files and not (path / "config.json").exists():
        raise CheckpointError(f"{path}: a directory of GGUF files; name one of them, such as {path / files[0]}")
    config = read_config(path)
    if config.get("quantization") is not None:
        return MlxCheckpoint(path)
    return HuggingFaceCheckpoint(path) if find_settings(path, config) is None else PackedCheckpoint(path)


def resolve(
    source: str | os.PathLike[str],
    revision: str | None = None,
    progress: ProgressCallback | None = None,
    accept: Callable[[dict[str, Any]], object] | None = None,
) -> Path:
    """The directory or `.gguf` file on this machine that `source` names, downloaded if need be (see `open_checkpoint`).

    Raises:
        CheckpointError: nothing of that name, or a file that is not GGUF.
    """
    text = os.fspath(source)
    if not text:
        raise CheckpointError("the name of the model is empty; give a directory, a .gguf file or an id of the Hub")
    path = Path(text).expanduser()
    if path.exists():
        if revision is not None:
            raise CheckpointError(f"{text}: is a local path; a revision ({revision}) belongs to Hub ids only")
        if path.is_file() and path.suffix.lower() != ".gguf":
            raise CheckpointError(f"{text}: not a GGUF file; name the directory of a model, not a file in it")
        return path
    if not _is_hub_id(text):
        hint = "" if "/" in text else " (an id of the Hub has the form organization/name)"
        raise CheckpointError(f"{text}: no such file or directory{hint}")
    from mlxq.checkpoint.hub import fetch

    return fetch(text, revision, progress, accept)


def _is_hub_id(text: str) -> bool:
    return _HUB_ID.fullmatch(text) is not None and not text.lower().endswith(_FILE_ENDINGS)
