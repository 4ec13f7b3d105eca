"""The tokenizers and chat templates of two checkpoints: found, loaded (once, if they are the same) and compared."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from mlxq.checkpoint.base import Checkpoint
from mlxq.checkpoint.huggingface import is_tokenizer
from mlxq.errors import CheckpointError
from mlxq.evaluate.comparison.templates import compare_templates
from mlxq.evaluate.comparison.tokenizers import compare_tokenizers
from mlxq.types import CancelToken


def compare_texts(
    a: Checkpoint, b: Checkpoint, parts: Collection[str], notes: list[str], cancel: CancelToken
) -> dict[str, Any]:
    """Compare what `parts` names of `tokenizer` and `template`, where both have one; `notes` grows.

    Returns:
        `tokenizer`, `template`, or `missing_tokenizer`, as `Comparison` has them.

    Raises:
        CheckpointError: a tokenizer that cannot be loaded.
        Cancelled: through `cancel`.
    """
    present = [is_tokenizer(_companions(c)) for c in (a, b)]
    if not any(present):
        notes.append("neither has a tokenizer, so none was compared")
        return {}
    if not all(present):
        return {"missing_tokenizer": f"only {'A' if present[0] else 'B'} has a tokenizer"}
    first = _tokenizer(a)
    cancel.check()
    second = first if _same_files(a, b) else _tokenizer(b)
    cancel.check()
    found: dict[str, Any] = {}
    if "tokenizer" in parts:
        found["tokenizer"] = compare_tokenizers(first, second, a, b, cancel.check)
        notes += found["tokenizer"].notes
    if "template" in parts:
        found["template"] = compare_templates(first, second)
    return found


def _companions(checkpoint: Checkpoint) -> dict[str, Path | bytes]:
    try:
        return checkpoint.companion_files()
    except CheckpointError as e:
        raise _skippable(e) from e


def _tokenizer(checkpoint: Checkpoint) -> Any:
    from mlxq.runtime.tokenizer import load_tokenizer

    try:
        return load_tokenizer(checkpoint)
    except CheckpointError as e:
        raise _skippable(e) from e


def _skippable(e: CheckpointError) -> CheckpointError:
    return CheckpointError(f"{e} (--no-tokenizer compares the rest)")


def _same_files(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether both have the same tokenizer, byte for byte: then it is loaded once."""

    def contents(checkpoint: Checkpoint) -> dict[str, bytes]:
        files = checkpoint.companion_files()
        wanted = {n: f for n, f in files.items() if not n.startswith(("LICEN", "NOTICE", "USE_", "generation_config"))}
        return {n: f if isinstance(f, bytes) else f.read_bytes() for n, f in wanted.items()}

    return a.config.get("model_type") == b.config.get("model_type") and contents(a) == contents(b)
