"""Model layers whose matrix products go through `mlxq.ops`.

On a GPU nothing is gained by going through `ops`, whose checks would cost as much as small kernels, so there each layer
is `plain`: its superclass computes, unless `MLXQ_BACKEND` asks for a back end.

They are subclasses of mlx's layers, so an architecture that asks `isinstance(m, nn.Linear)` or `"bias" in m` gets the
answer it expects. They are made without mlx's constructors: those would draw random weights and quantize them.
"""

from __future__ import annotations

import os
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from mlxq import ops
from mlxq.architectures.registry import import_private
from mlxq.ops.dispatch import ENVIRONMENT_VARIABLE
from mlxq.runtime import attention
from mlxq.types import QuantSpec, TensorInfo

_switch = import_private("models.switch_layers")
_FLOATS = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


class Linear(nn.Linear):
    """`y = x @ weight.T + bias`; x `[..., in_features]`, weight `[out_features, in_features]` in any float dtype."""

    plain = False

    def __call__(self, x: mx.array) -> mx.array:
        if self.plain:
            return super().__call__(x)
        y = ops.matmul(x, self["weight"])
        return y + self["bias"] if "bias" in self else y


class Embedding(nn.Embedding):
    """Rows of `weight` `[num_embeddings, dims]`, in `compute_dtype` when that is set, else as stored."""

    plain = False
    compute_dtype: mx.Dtype | None = None

    def __call__(self, x: mx.array) -> mx.array:
        rows = self["weight"][x]
        return rows if self.compute_dtype is None else rows.astype(self.compute_dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """Tied output projection: x `[..., dims]` -> `[..., num_embeddings]`."""
        return super().as_linear(x) if self.plain else ops.matmul(x, self["weight"])


class SwitchLinear(_switch.SwitchLinear):
    """One `[out_features, in_features]` matrix for each expert; the rows of x are sent to `indices`."""

    plain = False

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        if self.plain:
            return super().__call__(x, indices, sorted_indices)
        y = ops.gather_matmul(x, self["weight"], indices, sorted_indices=sorted_indices)
        return y + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else y


class _Quantized(nn.Module):
    """What the quantized layers share: packed `weight`, `scales`, `biases` and their grid."""

    plain = False

    def _prepare(self, shape: tuple[int, ...], spec: QuantSpec, dtype: mx.Dtype) -> None:
        """Placeholders of the right shapes (lazy: nothing is allocated) for weights `[..., N, K]`."""
        *lead, width = shape
        self.group_size, self.bits, self.mode = spec.group_size, spec.bits, spec.mode
        self.weight = mx.zeros((*lead, width * spec.bits // 32), mx.uint32)
        self.scales = mx.zeros((*lead, width // spec.group_size), dtype)
        self.biases = mx.zeros((*lead, width // spec.group_size), dtype)

    @property
    def _grid(self) -> dict[str, Any]:
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def _matmul(self, x: mx.array) -> mx.array:
        return ops.quantized_matmul(x, self["weight"], self["scales"], self["biases"], **self._grid)


class QuantizedLinear(_Quantized, nn.QuantizedLinear):
    """`y = x @ w_hat.T + bias` with `w_hat = scales * q + biases`; x `[..., in_features]`."""

    def __init__(self, layer: nn.Linear, spec: QuantSpec, dtype: mx.Dtype):
        nn.Module.__init__(self)
        self._prepare(layer.weight.shape, spec, dtype)
        if "bias" in layer:
            self.bias = layer.bias
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        if self.plain:
            return super().__call__(x)
        y = self._matmul(x)
        return y + self["bias"] if "bias" in self else y


class QuantizedEmbedding(_Quantized, nn.QuantizedEmbedding):
    """Rows of a quantized matrix `[num_embeddings, dims]`; they come out in the dtype of its scales."""

    def __init__(self, layer: nn.Embedding, spec: QuantSpec, dtype: mx.Dtype):
        nn.Module.__init__(self)
        self.num_embeddings, self.dims = layer.weight.shape
        self._prepare(layer.weight.shape, spec, dtype)
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        if self.plain:
            return super().__call__(x)
        return ops.dequantize(self["weight"][x], self["scales"][x], self["biases"][x], **self._grid)

    def as_linear(self, x: mx.array) -> mx.array:
        """Tied output projection: x `[..., dims]` -> `[..., num_embeddings]`."""
        return super().as_linear(x) if self.plain else self._matmul(x)


class QuantizedSwitchLinear(_Quantized, _switch.QuantizedSwitchLinear):
    """One quantized `[out_features, in_features]` matrix for each expert; weight `[num_experts, N, K]`."""

    def __init__(self, layer: Any, spec: QuantSpec, dtype: mx.Dtype):
        nn.Module.__init__(self)
        self._prepare(layer.weight.shape, spec, dtype)
        self.global_scale = None
        if "bias" in layer:
            self.bias = layer.bias
        self.freeze()

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        if self.plain:
            return super().__call__(x, indices, sorted_indices)
        y = ops.gather_quantized_matmul(
            x, self["weight"], self["scales"], self["biases"], indices, sorted_indices=sorted_indices, **self._grid
        )
        return y + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else y


#: mlx's layer -> (our float layer, our quantized layer). Exact types: a subclass has behaviour of its own.
_LAYERS = {
    nn.Linear: (Linear, QuantizedLinear),
    nn.Embedding: (Embedding, QuantizedEmbedding),
    _switch.SwitchLinear: (SwitchLinear, QuantizedSwitchLinear),
}


def install_layers(model: nn.Module, tensors: dict[str, TensorInfo]) -> None:
    """Replace leaf layers of `model` by ours, in place: quantized where `TensorInfo.spec` is set, float elsewhere.

    Layers of a kind that only one architecture has stay mlx-lm's, quantized by their own `to_quantized`. No
    parameter is evaluated: the lazy random numbers of mlx's constructors are dropped, placeholders stand in for
    quantized weights until `weights.load_parameters` fills them.

    Args:
        model: a whole model made by `architectures.build_model`.
        tensors: parameter name -> `TensorInfo`, as in `ParameterMap.tensors`.
    """
    attention.install()
    plain = not attention.on_cpu() and not os.environ.get(ENVIRONMENT_VARIABLE)

    def replace(path: str, layer: Any) -> Any:
        info = tensors.get(f"{path}.weight")
        if info is None or not isinstance(layer, nn.Module):
            return layer
        new = _replacement(layer, info)
        if hasattr(type(new), "plain"):
            new.plain = plain
        return new

    leaves = tree_map_with_path(replace, model.leaf_modules(), is_leaf=nn.Module.is_module)
    model.update_modules(leaves)


def _replacement(layer: nn.Module, info: TensorInfo) -> nn.Module:
    ours = _LAYERS.get(type(layer))
    if info.spec is not None:
        if ours is None:
            spec = info.spec
            return layer.to_quantized(group_size=spec.group_size, bits=spec.bits)
        return ours[1](layer, info.spec, _FLOATS[info.scales_dtype or "F16"])
    if ours is None:
        return layer
    new = ours[0].__new__(ours[0])
    nn.Module.__init__(new)
    dict.update(new, layer)
    new.__dict__.update({k: v for k, v in vars(layer).items() if k not in vars(new)})
    return new
