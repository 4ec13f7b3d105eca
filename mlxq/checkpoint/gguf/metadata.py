"""Typed access to the metadata of a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mlxq.checkpoint.gguf.file import shown
from mlxq.errors import CheckpointError, FormatError

_LARGEST = float(np.finfo(np.float32).max)


class Metadata:
    """Typed access to the metadata, every failure one line naming the key."""

    def __init__(self, path: Path, values: dict[str, Any]):
        self.path = path
        self.values = values
        self.arch = values["general.architecture"]

    def number(self, key: str, default: float | None = None) -> float | None:
        """`<arch>.<key>` as a finite float, in the shortest decimal form of its float32."""
        value = self.values.get(f"{self.arch}.{key}")
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _LARGEST:
            raise FormatError(f"{self.path}: {self.arch}.{key} is {shown(value)}, expected a number in float32's range")
        return float(str(np.float32(value)))

    def positive(self, key: str, default: float) -> float:
        """`number`, refused where it is not above 0."""
        value = self.number(key, default)
        if not value > 0:
            raise FormatError(f"{self.path}: {self.arch}.{key} is {value!r}, expected a positive number")
        return value

    def text(self, name: str, default: str | None = None) -> str | None:
        """The text under a full key, or `default` where it is absent."""
        value = self.values.get(name, default)
        if value is not None and not isinstance(value, str):
            raise FormatError(f"{self.path}: {name} is {shown(value)}, expected a text")
        return value

    def has(self, key: str) -> bool:
        """Whether `<arch>.<key>` is there and not 0, which writers use for none."""
        value = self.values.get(f"{self.arch}.{key}")
        return value is not None and not (isinstance(value, (bool, int, float)) and value == 0)

    def integer(self, key: str, default: int | None = None) -> int:
        """`<arch>.<key>` as a positive int; an array of equal values counts as one.

        Raises:
            CheckpointError: absent without a default, not a positive integer, or different from layer to layer.
        """
        name = f"{self.arch}.{key}"
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise FormatError(f"{self.path}: the metadata lacks {name}")
            return default
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if isinstance(value, np.ndarray):
            raise CheckpointError(f"{self.path}: {name} differs from layer to layer, which is not supported")
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise FormatError(f"{self.path}: {name} is {shown(value)}, expected a positive integer")
        return value

    def token_id(self, name: str, vocab_size: int) -> int | None:
        """`tokenizer.ggml.<name>_token_id`, or None when absent or outside the vocabulary (as llama.cpp reads it)."""
        value = self.values.get(f"tokenizer.ggml.{name}_token_id")
        ok = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size
        return value if ok else None


def check_vocabulary(path: Path, values: dict[str, Any], rows: int) -> None:
    """Hold the vocabulary, where there is one, against the `rows` of the embedding: one for each token, as llama.cpp.

    Raises:
        FormatError: more tokens than rows, or fewer.
    """
    tokens = values.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) != rows:
        raise FormatError(
            f"{path}: tokenizer.ggml.tokens has {len(tokens)} entries, but token_embd.weight has {rows} rows, "
            "expected one for each"
        )
