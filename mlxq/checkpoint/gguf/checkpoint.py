"""A GGUF file as a `Checkpoint`: Hugging Face names and row order, lazy, by rows, in bounded memory."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mlxq.checkpoint.base import Checkpoint
from mlxq.checkpoint.config import normalize
from mlxq.checkpoint.gguf import config as gguf_config
from mlxq.checkpoint.gguf.file import GgufTensor
from mlxq.checkpoint.gguf.heads import unpermuted_rows
from mlxq.checkpoint.gguf.metadata import Metadata, check_vocabulary
from mlxq.checkpoint.gguf.names import MappedTensor, architecture, map_name
from mlxq.checkpoint.gguf.split import open_gguf
from mlxq.checkpoint.gguf.tokenizer import build_tokenizer_files
from mlxq.checkpoint.safetensors import quoted
from mlxq.errors import CheckpointError, FormatError
from mlxq.formats import ggml
from mlxq.formats.floats import from_float32, storage_dtype
from mlxq.types import FLOAT_BYTES, QuantizedTensor, TensorInfo


class GgufCheckpoint(Checkpoint):
    """A GGUF file, opened and validated; `Checkpoint` describes the interface.

    Llama-family files hold the rows of q and k permuted inside each head; they are given in Hugging Face's order.
    Gemma's files hold norm weights with 1 added; it is taken off. `TensorInfo.dtype` is the ggml type's name and
    `TensorInfo.spec` the affine grid that holds the same weights exactly (`mlxq.formats.ggml.to_affine`).

    Args:
        path: the file, or any part of a split one.
        metadata_only: open files with tensor types that cannot be decoded, to see names, config and tokenizer.
            Reading such a tensor still raises.

    Raises:
        CheckpointError: a file that cannot be read, a part that is missing; an architecture, a tensor type or a rotary
            scaling that is not supported.
        FormatError: not a GGUF file, truncated or inconsistent.
    """

    kind = "gguf"

    def __init__(self, path: str | Path, *, metadata_only: bool = False):
        self._file = open_gguf(path)
        self.path = self._file.path
        try:
            self._open(metadata_only)
        except BaseException:
            self.close()
            raise

    def _open(self, metadata_only: bool) -> None:
        values = self._file.metadata
        name = values.get("general.architecture")
        self._arch = architecture(name, self.path, experts=_has_experts(values, name))
        if not metadata_only:
            self._check_types()
        self.metadata = Metadata(self.path, values)
        self._sources: dict[str, tuple[GgufTensor, MappedTensor]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for tensor in self._file.tensors.values():
            self._add(tensor)
        tied = self._tie()
        shapes = {name: info.shape for name, info in self.tensors.items()}
        config = gguf_config.build_config(self.metadata, self._arch, shapes, tied, self._read_rope)
        config["torch_dtype"] = self._dtype()
        self.config = normalize(config)
        self.generation_config = gguf_config.build_generation_config(self.metadata, self.config["vocab_size"])
        check_vocabulary(self.path, values, self.config["vocab_size"])
        self._check_permuted()

    def _check_types(self) -> None:
        for tensor in self._file.tensors.values():
            if tensor.type_name not in ggml.READABLE:
                raise CheckpointError(f"{self.path}: {_unreadable(tensor)}")

    def _add(self, tensor: GgufTensor) -> None:
        if tensor.name in self._arch.rope_tensors:
            return
        mapped = map_name(self._arch, tensor.name)
        if mapped is None:
            raise CheckpointError(
                f"{self.path}: tensor {quoted(tensor.name)} is unknown to the architecture {quoted(self.metadata.arch)}"
            )
        spec = ggml.affine_spec(tensor.type_name)
        if len(tensor.shape) == 1 and tensor.type_name not in FLOAT_BYTES:
            raise CheckpointError(
                f"{self.path}: tensor {quoted(tensor.name)} is a vector of {tensor.type_name}, not of floats"
            )
        self._sources[mapped.name] = (tensor, mapped)
        self.tensors[mapped.name] = TensorInfo(
            name=mapped.name,
            shape=tensor.shape,
            dtype=tensor.type_name,
            nbytes=tensor.nbytes,
            spec=spec,
            scales_dtype=ggml.affine_scales_dtype(tensor.type_name),
        )

    def _tie(self) -> bool:
        """Whether the output shares the embedding; a redundant output of an always tied model is dropped."""
        if self._arch.always_tied:
            self.tensors.pop("lm_head.weight", None)
        return "lm_head.weight" not in self.tensors

    def _dtype(self) -> str:
        embedding = self.tensors[f"{self._arch.top['token_embd']}.weight"].dtype
        return {"F32": "float32", "BF16": "bfloat16"}.get(embedding, self._arch.dtype)

    def _read_rope(self, name: str) -> np.ndarray | None:
        tensor = self._file.tensors.get(name)
        if tensor is None or name not in self._arch.rope_tensors:
            return None
        if tensor.type_name not in FLOAT_BYTES:
            raise CheckpointError(f"{self.path}: {name} is {tensor.type_name}, expected a float type")
        return ggml.dequantize(self._file.read_bytes(tensor.offset, tensor.nbytes), tensor.type_name)

    def _check_permuted(self) -> None:
        for tensor, mapped in self._sources.values():
            if mapped.permuted and tensor.shape[0] % (2 * self.config[mapped.heads]):
                raise CheckpointError(
                    f"{self.path}: tensor {quoted(tensor.name)} has {tensor.shape[0]} rows, which do not divide into "
                    f"{self.config[mapped.heads]} heads of even size"
                )

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        tensor, mapped = self._source(name)
        data = self._rows(name, tensor, mapped, rows)
        if tensor.type_name in FLOAT_BYTES and not mapped.norm_offset:
            return _stored(data, tensor.type_name, tensor.shape)
        values = ggml.dequantize(data, tensor.type_name).reshape(-1, *tensor.shape[1:])
        if mapped.norm_offset:
            values -= np.float32(mapped.norm_offset)
        return from_float32(values, tensor.type_name) if tensor.type_name in FLOAT_BYTES else values

    def read_quantized(self, name: str, rows: slice | None = None) -> QuantizedTensor:
        tensor, mapped = self._source(name)
        if self.tensors[name].spec is None:
            raise CheckpointError(f"{self.path}: tensor {name!r} is {tensor.type_name}, which has no affine grid")
        data = self._rows(name, tensor, mapped, rows)
        try:
            quantized = ggml.to_affine(data, tensor.type_name)
        except FormatError as e:
            raise CheckpointError(f"{self.path}: tensor {name!r}: {e}") from e
        if len(tensor.shape) == 2:
            return quantized
        lead = (-1, *tensor.shape[1:-1])
        parts = {k: getattr(quantized, k) for k in ("w_q", "scales", "biases")}
        parts = {k: a.reshape(*lead, a.shape[-1]) for k, a in parts.items() if a is not None}
        return replace(quantized, **parts, shape=(parts["w_q"].shape[0], *tensor.shape[1:]))

    def read_blocks(self, name: str, rows: slice | None = None) -> np.ndarray:
        tensor, mapped = self._source(name)
        return self._rows(name, tensor, mapped, rows).reshape(-1, *tensor.shape[1:-1], tensor.row_bytes)

    def _source(self, name: str) -> tuple[GgufTensor, MappedTensor]:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: no tensor {name!r}")
        tensor, mapped = self._sources[name]
        if tensor.type_name not in ggml.READABLE:
            raise CheckpointError(f"{self.path}: {_unreadable(tensor)}")
        return tensor, mapped

    def _rows(self, name: str, tensor: GgufTensor, mapped: MappedTensor, rows: slice | None) -> np.ndarray:
        """Bytes of rows of the first axis in Hugging Face's order, uint8 `[n * middle, row_bytes]`.

        `middle` counts the rows between first and last axis of tensors with more than two axes. The elements of a
        vector are its rows.
        """
        start, stop = _range(name, rows, tensor.shape[0])
        step = tensor.nbytes // tensor.shape[0]
        width = min(step, tensor.row_bytes)
        if not mapped.permuted:
            data = self._file.read_bytes(tensor.offset + start * step, (stop - start) * step)
            return data.reshape(-1, width)
        head_dim = tensor.shape[0] // self.config[mapped.heads]
        order = unpermuted_rows(start, stop, head_dim)
        first, last = start // head_dim * head_dim, -(-stop // head_dim) * head_dim
        data = self._file.read_bytes(tensor.offset + first * step, (last - first) * step)
        return data.reshape(last - first, step)[order - first].reshape(-1, width)

    def companion_files(self) -> dict[str, Path | bytes]:
        return dict(self._tokenizer_files)

    @cached_property
    def _tokenizer_files(self) -> dict[str, bytes]:
        """Built once: a quarter of a million merges take seconds, and conversion, proof and loading each ask."""
        return build_tokenizer_files(self.metadata, self.config["vocab_size"])

    def files(self) -> list[Path]:
        return list(self._file.files)

    def close(self) -> None:
        self._file.close()


def _has_experts(values: dict[str, Any], arch: object) -> bool:
    count = values.get(f"{arch}.expert_count", 0)
    return isinstance(count, int) and count > 0


def _range(name: str, rows: slice | None, n: int) -> tuple[int, int]:
    if rows is None:
        return 0, n
    start, stop, step = rows.indices(n)
    if step != 1:
        raise CheckpointError(f"rows of {name} are read one after another, not with step {step}")
    return start, max(start, stop)


def _stored(data: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    storage = storage_dtype(dtype)
    return data.reshape(-1).view(storage.newbyteorder("<")).astype(storage, copy=False).reshape(-1, *shape[1:])


def _unreadable(tensor: GgufTensor) -> str:
    return (
        f"tensor {quoted(tensor.name)} is {tensor.type_name}, which is no format of weights that can be decoded; "
        f"those that can are {', '.join(ggml.READABLE)}"
    )
