"""`inspect`: what a model is, how each tensor is stored, and what it takes to run. Reads headers only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxq.api import DEFAULT_CONTEXT, public
from mlxq.architectures.memory import MemoryEstimate, memory_to_run
from mlxq.checkpoint.base import Checkpoint
from mlxq.checkpoint.config import context_length
from mlxq.checkpoint.source import open_checkpoint, resolve
from mlxq.errors import CheckpointError
from mlxq.formats.geometry import BLOCK_FORMATS
from mlxq.types import FLOAT_BYTES, TensorInfo


@dataclass(frozen=True)
class TensorSummary:
    """One tensor: its weights `[..., K]`, what it is stored as, and all bytes stored for it."""

    name: str
    shape: tuple[int, ...]
    format: str
    bpw: float
    nbytes: int


@dataclass(frozen=True)
class FormatSummary:
    """All tensors of one format."""

    format: str
    n_tensors: int
    n_weights: int
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """What a model is and weighs.

    Attributes:
        source, kind: what was opened, and `huggingface`, `gguf` or `mlx`.
        architecture: `model_type` of config.json.
        context_length: tokens the model was made for, or None.
        n_weights, nbytes: of all tensors; bytes count scales and biases.
        bpw: bits per weight over all tensors; `quantized_bpw` over quantized ones, None when there are none.
        formats: totals by format, the largest first.
        tensors: every tensor, sorted by name with numbers in order.
        memory: to run it at `memory.context` tokens.
    """

    source: str
    kind: str
    architecture: str
    context_length: int | None
    n_weights: int
    nbytes: int
    bpw: float
    quantized_bpw: float | None
    formats: tuple[FormatSummary, ...]
    tensors: tuple[TensorSummary, ...]
    memory: MemoryEstimate

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "source": self.source,
            "kind": self.kind,
            "architecture": self.architecture,
            "context_length": self.context_length,
            "weights": self.n_weights,
            "bytes": self.nbytes,
            "bpw": round(self.bpw, 4),
            "quantized_bpw": None if self.quantized_bpw is None else round(self.quantized_bpw, 4),
            "memory": self.memory.to_dict(),
            "formats": [
                {"format": f.format, "tensors": f.n_tensors, "weights": f.n_weights, "bytes": f.nbytes}
                for f in self.formats
            ],
            "tensors": [
                {"name": t.name, "shape": list(t.shape), "format": t.format, "bpw": round(t.bpw, 4), "bytes": t.nbytes}
                for t in self.tensors
            ],
        }


@public
def inspect(source: str | Path, *, revision: str | None = None, context: int | None = None) -> Inspection:
    """Say what a model is, from its headers and configuration; no weight is read.

    Args:
        source: a directory, a `.gguf` file, or a Hub id `org/name`.
        revision: branch, tag or commit of a Hub id.
        context: tokens for the memory estimate; default 4096, or the model's context length if that is shorter.

    Raises:
        CheckpointError: the source cannot be read, or `context` is not positive.
    """
    if context is not None and context < 1:
        raise CheckpointError(f"context must be at least 1 token, got {context}")
    with _open(source, revision) as checkpoint:
        infos = sorted(checkpoint.tensors.values(), key=lambda t: _natural(t.name))
        longest = context_length(checkpoint.config)
        context = context or min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)
        nbytes = sum(t.nbytes for t in infos)
        return Inspection(
            source=str(source),
            kind=checkpoint.kind,
            architecture=str(checkpoint.config.get("model_type")),
            context_length=longest,
            n_weights=sum(t.size for t in infos),
            nbytes=nbytes,
            bpw=bits_per_weight(infos) or 0.0,
            quantized_bpw=bits_per_weight([t for t in infos if t.dtype not in FLOAT_BYTES]),
            formats=_formats(infos),
            tensors=tuple(
                TensorSummary(t.name, t.shape, _format(t), bits_per_weight([t]) or 0.0, t.nbytes) for t in infos
            ),
            memory=memory_to_run(nbytes, checkpoint.config, context),
        )


def _open(source: str | Path, revision: str | None) -> Checkpoint:
    """Like `open_checkpoint`, but a GGUF may hold tensor types whose weights cannot be decoded."""
    path = resolve(source, revision)
    if path.is_dir():
        return open_checkpoint(path)
    from mlxq.checkpoint.gguf.checkpoint import GgufCheckpoint

    return GgufCheckpoint(path, metadata_only=True)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _format(info: TensorInfo) -> str:
    if info.dtype == "AFFINE" and info.spec is not None:
        return f"{info.spec}, {info.scales_dtype} scales"
    grid = info.spec or info.permuted_spec
    if grid is None or grid.mode != "affine" or info.dtype in BLOCK_FORMATS:
        return info.dtype
    return f"{info.dtype}, {grid}" + (", columns out of order" if info.permuted_spec else "")


def _formats(infos: list[TensorInfo]) -> tuple[FormatSummary, ...]:
    groups: dict[str, list[TensorInfo]] = {}
    for info in infos:
        groups.setdefault(_format(info), []).append(info)
    found = [
        FormatSummary(name, len(group), sum(t.size for t in group), sum(t.nbytes for t in group))
        for name, group in groups.items()
    ]
    return tuple(sorted(found, key=lambda f: -f.nbytes))


def bits_per_weight(infos: list[TensorInfo]) -> float | None:
    """Bits per weight of some tensors, everything stored counted; None when they hold no weights."""
    size = sum(t.size for t in infos)
    return 8 * sum(t.nbytes for t in infos) / size if size else None
