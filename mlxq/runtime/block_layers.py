"""Model layers whose weights stay in ggml blocks: they go through `mlxq.ops` everywhere, as mlx has no such layers."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxq import ops
from mlxq.architectures.registry import import_private
from mlxq.formats.geometry import block_format

_NAMES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}


class BlockLayer(nn.Module):
    """What the layers share whose `weight` stays in ggml blocks, uint8 `[..., N, row_bytes]` of type `type_name`.

    They are made where something computes with blocks (see `keeps_blocks`).
    """

    def __init__(self, layer: Any, type_name: str):
        super().__init__()
        self.type_name = type_name
        *lead, width = layer.weight.shape
        geometry = block_format(type_name)
        # Lazy: nothing is allocated.
        self.weight = mx.zeros((*lead, width // geometry.block_size * geometry.type_size), mx.uint8)
        if "bias" in layer:
            self.bias = layer.bias
        self.freeze()

    def unfreeze(self, *args: Any, **kwargs: Any) -> None:
        """Bytes of blocks stay frozen."""
        super().unfreeze(*args, **kwargs)
        self.freeze(recurse=False)

    def to_lora(self, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> nn.Module:
        """mlx-lm's layer with low-rank weights beside this one; what it asks for where it cannot tell the shape."""
        name, attribute = self._lora
        geometry = block_format(self.type_name)
        *rows, row_bytes = self["weight"].shape
        width = row_bytes // geometry.type_size * geometry.block_size
        # Linear layers say the inner axis first, then the rows, then experts; embeddings are laid out as they are.
        sizes = (rows[0], width) if name == "LoRAEmbedding" else (width, *reversed(rows))
        new = getattr(import_private("tuner.lora"), name)(*sizes, r=r, dropout=dropout, scale=scale)
        new[attribute] = self
        return new


class BlockLinear(BlockLayer):
    """`y = x @ w.T + bias`; x `[..., in_features]`, weight `[out_features, row_bytes]`."""

    _lora = ("LoRALinear", "linear")

    def __call__(self, x: mx.array) -> mx.array:
        y = ops.block_matmul(x, self["weight"], type_name=self.type_name)
        return y + self["bias"] if "bias" in self else y


class BlockEmbedding(BlockLayer):
    """Rows of a matrix `[num_embeddings, row_bytes]`, decoded to `compute_dtype`, or float32 where it is not set."""

    _lora = ("LoRAEmbedding", "embedding")
    compute_dtype: mx.Dtype | None = None

    def __call__(self, x: mx.array) -> mx.array:
        dtype = "F32" if self.compute_dtype is None else _NAMES[self.compute_dtype]
        return ops.block_dequantize(self["weight"][x], type_name=self.type_name, dtype=dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """Tied output projection: x `[..., dims]` -> `[..., num_embeddings]`."""
        return ops.block_matmul(x, self["weight"], type_name=self.type_name)


class BlockSwitchLinear(BlockLayer):
    """One matrix for each expert; weight `[num_experts, out_features, row_bytes]`."""

    _lora = ("LoRASwitchLinear", "linear")

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y = ops.gather_block_matmul(x, self["weight"], indices, type_name=self.type_name, sorted_indices=sorted_indices)
        return y + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else y
