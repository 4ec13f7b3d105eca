"""The one interface of every source: names, shapes and formats first, bytes only when asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mlxq.types import QuantizedTensor, TensorInfo


class Checkpoint(ABC):
    """A model on disk, validated when it is opened, read tensor by tensor (or by rows of one).

    Attributes:
        path: the directory or file it was opened from.
        kind: `huggingface`, `gguf` or `mlx` (a directory that MLX already quantized).
        config: the model's `config.json` as Hugging Face spells it, normalized by `config.normalize`.
        generation_config: `generation_config.json`, or an empty dict.
        tensors: every logical tensor by its Hugging Face name. An MLX-quantized weight and its scales and
            biases are one entry, named after the weight.
    """

    path: Path
    kind: Literal["huggingface", "gguf", "mlx"]
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @abstractmethod
    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Values of a tensor, or of a range of its first axis.

        Returns an array of `tensors[name].shape` (first axis cut by `rows`) in NumPy storage: float32,
        float16, or uint16 holding the bits of bfloat16 when the dtype is `BF16`. Tensors of a quantized
        format come decoded, in float32. The array is the caller's own: it does not alias a mapped file.

        Raises:
            CheckpointError: no such tensor, or the file changed or ended early.
        """

    def read_quantized(self, name: str, rows: slice | None = None) -> QuantizedTensor:
        """Codes and grid of a tensor whose `TensorInfo.spec` is set, exactly as the source stores them.

        Raises:
            CheckpointError: the tensor has no affine grid.
        """
        raise NotImplementedError(f"{type(self).__name__} holds no quantized tensors")

    def read_order(self, name: str) -> np.ndarray:
        """Column of a tensor that each column of `read_quantized` is, int32 `[K]`.

        For tensors whose `TensorInfo.permuted_spec` is set: `w @ x` is `w[:, order] @ x[order]`.

        Raises:
            CheckpointError: no such tensor, or its columns are in order.
        """
        raise NotImplementedError(f"{type(self).__name__} holds no columns out of order")

    def read_blocks(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Blocks of a tensor whose `TensorInfo.dtype` is a ggml type, uint8 `[..., row_bytes]`.

        As the source stores them, rows in the order of `tensors[name].shape`, as they come from `read`.

        Raises:
            CheckpointError: no such tensor.
        """
        raise NotImplementedError(f"{type(self).__name__} holds no ggml blocks")

    @abstractmethod
    def companion_files(self) -> dict[str, Path | bytes]:
        """Tokenizer, chat template, generation config and licence files, by the name they keep in the output.

        A `Path` is copied byte for byte; `bytes` (made from a GGUF's metadata) are written as they are.
        """

    @abstractmethod
    def files(self) -> list[Path]:
        """The weight files, whose SHA-256 digests identify the source."""

    @abstractmethod
    def close(self) -> None:
        """Release file handles; reading afterwards is an error."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
