"""The whole metadata of a GGUF file: general, the architecture's numbers, the tokenizer."""

from __future__ import annotations

from typing import Any

from mlxq.checkpoint.base import Checkpoint
from mlxq.checkpoint.gguf.checkpoint import GgufCheckpoint
from mlxq.checkpoint.gguf.names import GgufArchitecture
from mlxq.errors import CheckpointError
from mlxq.plan.gguf_file_types import FILE_TYPES
from mlxq.plan.planner import Plan
from mlxq.writers.gguf.file import TypedMetadata
from mlxq.writers.gguf.general import general_metadata, licence_text
from mlxq.writers.gguf.hyperparameters import hyperparameters
from mlxq.writers.gguf.modelfile import modelfile, ollama_parameters
from mlxq.writers.gguf.tokenizer import passthrough, tokenizer_metadata
from mlxq.writers.gguf.tokenizer_differences import tokenizer_differences


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
    config, files = checkpoint.config, checkpoint.companion_files()
    is_gguf = isinstance(checkpoint, GgufCheckpoint)
    previous = checkpoint.metadata.values if is_gguf else None
    readme = checkpoint.path / "README.md"
    general = general_metadata(
        source,
        architecture=arch.name,
        file_type=file_type_number(plan),
        generation_config=checkpoint.generation_config,
        licence_files=files,
        readme=readme if readme.is_file() else None,
        parameters=_parameters(plan),
        previous=previous,
    )
    return general | hyperparameters(config, arch.name, arch) | _tokenizer(checkpoint, previous, pre)


def _tokenizer(checkpoint: Checkpoint, previous: dict[str, Any] | None, pre: str | None) -> TypedMetadata:
    """As the source's file says it, or made from the tokenizer's files."""
    if previous is not None and pre is None:
        return passthrough(previous)
    vocab_size = checkpoint.config.get("vocab_size")
    if not isinstance(vocab_size, int):
        raise CheckpointError(f"{checkpoint.path}: config.json lacks vocab_size")
    files = checkpoint.companion_files()
    return tokenizer_metadata(files, checkpoint.config, checkpoint.generation_config, vocab_size=vocab_size, pre=pre)


def metadata_notes(checkpoint: Checkpoint) -> list[str]:
    """Where llama.cpp will give other token ids than the source's tokenizer, a line each."""
    if isinstance(checkpoint, GgufCheckpoint):
        return []
    return tokenizer_differences(checkpoint.companion_files(), checkpoint.config.get("vocab_size"))


def _parameters(plan: Plan) -> tuple[int, int, int]:
    """Numbers of all weights, of those of experts among them, and of experts in a layer."""
    stacks = [p.info for p in plan.tensors if p.info.module == "switch"]
    return plan.n_weights, sum(s.size for s in stacks), stacks[0].shape[0] if stacks else 0


def ollama_modelfile(gguf_name: str, metadata: TypedMetadata, checkpoint: Checkpoint) -> str:
    """The Modelfile of a GGUF file with this metadata."""

    def value(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.{key}", ("", default))[1]

    tokens = value("ggml.tokens", [])

    def text(name: str) -> str:
        number = value(f"ggml.{name}_token_id")
        return tokens[number] if number is not None else ""

    return modelfile(
        gguf_name,
        value("chat_template"),
        [t for t in map(text, ("eos", "eot", "eom")) if t],
        ollama_parameters(checkpoint.generation_config),
        bos=text("bos") if value("ggml.add_bos_token") else "",
        eos=text("eos"),
        licence=licence_text(checkpoint.companion_files()),
    )


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
    if most in numbers:
        return numbers[most]
    from gguf import LlamaFileType

    # Types that are read and not written; of MXFP4 there is a file type for mixtures of experts alone.
    known = (f"MOSTLY_{most}", f"MOSTLY_{most}_MOE")
    return next((int(LlamaFileType[n]) for n in known if n in LlamaFileType.__members__), 0)
