"""The whole metadata of a GGUF file: general, the architecture's numbers, the tokenizer."""

from __future__ import annotations

from typing import Any

from mlxq.checkpoint.base import Checkpoint
from mlxq.checkpoint.gguf_names import GgufArchitecture
from mlxq.errors import CheckpointError
from mlxq.plan.gguf_mixes import FILE_TYPES
from mlxq.plan.planner import Plan
from mlxq.writers.gguf import TypedMetadata
from mlxq.writers.gguf_hyperparameters import hyperparameters
from mlxq.writers.gguf_tokenizer import tokenizer_metadata


def file_metadata(
    checkpoint: Checkpoint, arch: GgufArchitecture, plan: Plan, *, source: str, pre: str | None
) -> TypedMetadata:
    """Every key of the file.

    Args:
        checkpoint: the source.
        arch: of its config.
        plan: of the file; decides `general.file_type`.
        source: as the person named it.
        pre: the pre-tokenizer's name where the person says it.

    Raises:
        CheckpointError: a setting or a tokenizer that llama.cpp cannot run as it is.
    """
    config = checkpoint.config
    files = checkpoint.companion_files()
    vocab_size = config.get("vocab_size")
    if not isinstance(vocab_size, int):
        raise CheckpointError(f"{checkpoint.path}: config.json lacks vocab_size")
    general: dict[str, Any] = {
        "general.architecture": ("string", arch.name),
        "general.type": ("string", "model"),
        "general.file_type": ("uint32", file_type_number(plan)),
        "general.quantization_version": ("uint32", 2),
    }
    tokenizer = tokenizer_metadata(files, config, checkpoint.generation_config, vocab_size=vocab_size, pre=pre)
    return general | hyperparameters(config, arch.name, arch) | tokenizer


def file_type_number(plan: Plan) -> int:
    """`general.file_type`: of the file type that was asked for, else of the type that holds most weights."""
    if plan.dtype in FILE_TYPES:
        return FILE_TYPES[plan.dtype][0]
    weights: dict[str, int] = {}
    for p in plan.tensors:
        weights[p.dtype] = weights.get(p.dtype, 0) + p.info.size
    most = max(weights, key=lambda name: weights[name])
    # Of several file types of one base type the middle one (`_M`) is the usual.
    numbers = {base: number for name, (number, base) in FILE_TYPES.items() if name == base or name.endswith("_M")}
    return numbers.get(most, 0)
