"""A Hugging Face directory with packed weights as a `Checkpoint`: the logical tensors, decoded or as affine codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mlxq.checkpoint.huggingface import SafetensorsDirectory
from mlxq.checkpoint.packed.base import Packed, RawTensors, Source
from mlxq.checkpoint.packed.schemes import SETTINGS_KEYS, find_scheme, find_settings
from mlxq.checkpoint.safetensors import quoted
from mlxq.errors import CheckpointError, FormatError
from mlxq.types import QuantizedTensor, TensorInfo

_T = TypeVar("_T")


class PackedCheckpoint(SafetensorsDirectory):
    """A directory whose weights another tool has quantized, and says so in its configuration.

    Attributes:
        settings: of that quantization, as the directory spells them. `config` is without them.

    Raises:
        CheckpointError: a method, format or version that is not known; parts whose shapes or dtypes disagree with each
            other or the settings.
    """

    kind = "huggingface"

    def __init__(self, path: str | Path):
        super().__init__(Path(path))
        found = find_settings(self.path, self.config)
        if found is None:
            raise CheckpointError(f"{self.path}: nothing says that these weights are quantized")
        self.settings = found.settings
        self.config = _without_settings(self.config)
        scheme = find_scheme(found, str(self.path))
        self._open_weights()
        self._raw = RawTensors(self._stored)
        self._packed = scheme.collect(Source(self.settings, self.config, self._raw, str(self.path)))
        self.tensors = self._logical()

    def _logical(self) -> dict[str, TensorInfo]:
        """In the order of the files, a packed tensor where its first part lies; a part may belong to several."""
        owners: dict[str, list[Packed]] = {}
        for packed in self._packed.values():
            for part in packed.parts:
                owners.setdefault(part, []).append(packed)
        tensors: dict[str, TensorInfo] = {}
        for name, entry in self._stored.tensors.items():
            infos = [p.info for p in owners[name]] if name in owners else [self._float_info(name, entry)]
            for info in infos:
                tensors.setdefault(info.name, info)
        return tensors

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Values as `Checkpoint.read` gives them; packed ones by their producer's formula, in float32."""
        if name not in self._packed:
            return super().read(name, rows)
        return self._named(name, lambda p: p.values(self._raw, rows))

    def read_quantized(self, name: str, rows: slice | None = None) -> QuantizedTensor:
        """The weights as affine codes; columns in the order of `read_order` where `TensorInfo.permuted_spec` is set.

        Raises:
            CheckpointError: no such tensor, it has no affine grid, or its parts hold what they must not.
        """
        info = self.tensors.get(name)
        if info is None or (info.spec or info.permuted_spec) is None:
            what = "no tensor" if info is None else "no affine grid for"
            raise CheckpointError(f"{self.path}: {what} {quoted(name)}")
        return self._named(name, lambda p: p.codes(self._raw, rows))

    def read_order(self, name: str) -> np.ndarray:
        """Column of tensor `name` that each column of `read_quantized` is, int32 `[K]`.

        Raises:
            CheckpointError: no such tensor, or its columns are in order.
        """
        info = self.tensors.get(name)
        if info is None or info.permuted_spec is None:
            raise CheckpointError(f"{self.path}: {quoted(name)} has no columns out of order")
        return self._named(name, lambda p: p.order(self._raw))

    def _named(self, name: str, read: Callable[[Packed], _T]) -> _T:
        try:
            return read(self._packed[name])
        except FormatError as e:
            raise CheckpointError(f"{self.path}: tensor {quoted(name)}: {e}") from e

    def close(self) -> None:
        self._raw.close()
        super().close()


def _without_settings(config: dict[str, Any]) -> dict[str, Any]:
    out = {k: v for k, v in config.items() if k not in SETTINGS_KEYS}
    if isinstance(out.get("text_config"), dict):
        out["text_config"] = {k: v for k, v in out["text_config"].items() if k not in SETTINGS_KEYS}
    return out
