"""Model layers whose matrix products go through `mlxq.ops`.

On a GPU nothing is gained by going through `ops`, whose checks would cost as much as small kernels, so there each layer
is `plain`: its superclass computes, unless `MLXQ_BACKEND` asks for a back end, or a measurement on this machine says
that our kernels are faster for its shape (`ops.choices`). Layers of ggml blocks, and of groups of
16, have no superclass that computes: they go through `ops` everywhere.

All are differentiable with respect to x, and take the place of mlx's in `mlx_lm.tuner` (LoRA). Its trainer compiles the
step, where NumPy cannot compute: on the CPU it needs `MLXQ_BACKEND=mlx`.

They are subclasses of mlx's layers, so an architecture that asks `isinstance(m, nn.Linear)` or `"bias" in m` gets the
answer it expects. They are made without mlx's constructors: those would draw random weights and quantize them.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from mlxq import ops
from mlxq.architectures.registry import import_private
from mlxq.formats.geometry import AFFINE_GROUP_SIZES, BLOCK_FORMATS, block_format
from mlxq.ops import choices, kernel_check
from mlxq.ops.choices import Product
from mlxq.ops.dispatch import ENVIRONMENT_VARIABLE, METAL_TYPES, asked, call_on, choose
from mlxq.ops.kernel_cases import Blocks
from mlxq.runtime import attention
from mlxq.runtime.block_layers import BlockEmbedding, BlockLayer, BlockLinear, BlockSwitchLinear
from mlxq.types import FLOAT_BYTES, QuantSpec, TensorInfo

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


class _Experts:
    """What our layers of experts share. mlx-lm's own would not be known to its tuner either: they are of our private
    copy of it."""

    def to_lora(self, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> nn.Module:
        """mlx-lm's layer with low-rank weights beside this one."""
        return import_private("tuner.lora").LoRASwitchLinear.from_base(self, r=r, dropout=dropout, scale=scale)


class SwitchLinear(_Experts, _switch.SwitchLinear):
    """One `[out_features, in_features]` matrix for each expert; the rows of x are sent to `indices`."""

    plain = False

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        if self.plain:
            return super().__call__(x, indices, sorted_indices)
        y = ops.gather_matmul(x, self["weight"], indices, sorted_indices=sorted_indices)
        return y + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else y


class _Quantized(nn.Module):
    """What the quantized layers share: packed `weight`, `scales`, `biases` (not in a float mode) and their grid."""

    plain = False

    def _prepare(self, shape: tuple[int, ...], spec: QuantSpec, dtype: mx.Dtype) -> None:
        """Placeholders of the right shapes (lazy: nothing is allocated) for weights `[..., N, K]`."""
        *lead, width = shape
        self.group_size, self.bits, self.mode = spec.group_size, spec.bits, spec.mode
        self.weight = mx.zeros((*lead, width * spec.bits // 32), mx.uint32)
        groups = (*lead, width // spec.group_size)
        self.scales = mx.zeros(groups, dtype if spec.mode == "affine" else mx.uint8)
        if spec.mode == "affine":
            self.biases = mx.zeros(groups, dtype)

    @property
    def _grid(self) -> dict[str, Any]:
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def _matmul(self, x: mx.array) -> mx.array:
        return ops.quantized_matmul(x, self["weight"], self["scales"], self.get("biases"), **self._grid)


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


class PermutedLinear(QuantizedLinear):
    """A `QuantizedLinear` whose columns are in another order: column k multiplies column `order[k]` of x.

    GPTQ's act-order makes such: groups are contiguous only once the columns are sorted.
    """

    def __init__(self, layer: nn.Linear, spec: QuantSpec, dtype: mx.Dtype):
        super().__init__(layer, spec, dtype)
        self.order = mx.zeros((layer.weight.shape[-1],), mx.int32)
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(mx.take(x, self["order"], axis=-1))


class QuantizedEmbedding(_Quantized, nn.QuantizedEmbedding):
    """Rows of a quantized matrix `[num_embeddings, dims]`; they come out in the dtype of its scales, of a float mode in
    `compute_dtype`, bfloat16 where that is not set."""

    compute_dtype: mx.Dtype | None = None

    def __init__(self, layer: nn.Embedding, spec: QuantSpec, dtype: mx.Dtype):
        nn.Module.__init__(self)
        self.num_embeddings, self.dims = layer.weight.shape
        self._prepare(layer.weight.shape, spec, dtype)
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        biases = self.get("biases")
        if self.plain and (biases is not None or self.compute_dtype is None):
            return super().__call__(x)
        biases = biases if biases is None else biases[x]
        rows = ops.dequantize(self["weight"][x], self["scales"][x], biases, **self._grid)
        return rows if "biases" in self else rows.astype(self.compute_dtype or mx.bfloat16)

    def as_linear(self, x: mx.array) -> mx.array:
        """Tied output projection: x `[..., dims]` -> `[..., num_embeddings]`."""
        return super().as_linear(x) if self.plain else self._matmul(x)


class QuantizedSwitchLinear(_Experts, _Quantized, _switch.QuantizedSwitchLinear):
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
            x,
            self["weight"],
            self["scales"],
            self.get("biases"),
            indices,
            sorted_indices=sorted_indices,
            **self._grid,
        )
        return y + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else y


class PermutedSwitchLinear(QuantizedSwitchLinear):
    """A `QuantizedSwitchLinear` whose columns are in another order: column k of expert e multiplies column
    `order[e, k]` of x. See `PermutedLinear`.
    """

    def __init__(self, layer: Any, spec: QuantSpec, dtype: mx.Dtype):
        super().__init__(layer, spec, dtype)
        experts, _, K = layer.weight.shape
        self.order = mx.zeros((experts, K), mx.int32)
        self.freeze()

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        each = mx.broadcast_to(x, (*indices.shape, *x.shape[-2:]))
        order = mx.broadcast_to(mx.expand_dims(self["order"][indices], -2), each.shape)
        return super().__call__(mx.take_along_axis(each, order, axis=-1), indices, sorted_indices)


class _Kinds(NamedTuple):
    """Our layers in the place of one of mlx's, by how its weight is held."""

    plain: type[nn.Module]
    quantized: type[nn.Module]
    blocks: type[BlockLayer]


#: mlx's layer -> ours. Exact types: a subclass has behaviour of its own.
_LAYERS = {
    nn.Linear: _Kinds(Linear, QuantizedLinear, BlockLinear),
    nn.Embedding: _Kinds(Embedding, QuantizedEmbedding, BlockEmbedding),
    _switch.SwitchLinear: _Kinds(SwitchLinear, QuantizedSwitchLinear, BlockSwitchLinear),
}

#: Of those, layers whose columns may be in another order.
_PERMUTED = {nn.Linear: PermutedLinear, _switch.SwitchLinear: PermutedSwitchLinear}


def keeps_blocks(info: TensorInfo, compact: bool = False) -> bool:
    """Whether a matrix of a GGUF file stays in its ggml blocks, where a layer of ours holds it.

    On the CPU those stay whose type has no affine grid (Q6_K, IQ2_S ...), and if `compact` those that have one, too. A
    grid is faster: for a row of x, two threads of mlx take 0.3 ns a weight of Q4_K, blocks 0.65. But its scales are
    float32: 6 bits a weight instead of 4.5.

    Where our Metal kernels compute, all stay whose type they know: nothing is converted, and a weight has the file's
    bits. Elsewhere on a GPU nothing computes with blocks, nor does mlx: a type without a grid is decoded when loaded.
    """
    if info.dtype in FLOAT_BYTES or info.dtype not in BLOCK_FORMATS:
        return False
    backend = choose(call_on("mlx", "block_matmul", 1, info.dtype))
    if backend == "metal":
        return info.dtype in METAL_TYPES and _computes(info)
    return backend == "numpy" and attention.on_cpu() and (compact or info.spec is None)


def _computes(info: TensorInfo) -> bool:
    """Whether this GPU multiplies blocks as the reference does; whoever asks for `metal` answers for it.

    One dtype of x stands for all, the most common one: the others are checked when they are first used.
    """
    f = block_format(info.dtype)
    blocks = Blocks(info.dtype, "F16", info.shape[-1] // f.block_size * f.type_size)
    return bool(asked()) or kernel_check.passes("block_matmul", blocks, 1)


def install_layers(model: nn.Module, tensors: dict[str, TensorInfo], *, compact: bool = False) -> None:
    """Replace leaf layers of `model` by ours, in place: of blocks where `keeps_blocks` says so, else quantized where
    `TensorInfo.spec` is set, else float.

    Layers of a kind that only one architecture has stay mlx-lm's, quantized by their own `to_quantized`. No
    parameter is evaluated: the lazy random numbers of mlx's constructors are dropped, placeholders stand in for
    packed weights until `weights.load_parameters` fills them.

    Args:
        model: a whole model made by `architectures.build_model`.
        tensors: parameter name -> `TensorInfo`, as in `ParameterMap.tensors`.
        compact: as in `keeps_blocks`.
    """
    attention.install()
    plain = not attention.on_cpu() and not os.environ.get(ENVIRONMENT_VARIABLE)

    def replace(path: str, layer: Any) -> Any:
        info = tensors.get(f"{path}.weight")
        if info is None or not isinstance(layer, nn.Module):
            return layer
        new = _replacement(layer, info, compact)
        if hasattr(type(new), "plain"):
            new.plain = plain and not (isinstance(new, _Quantized) and _may_be_ours(new))
        return new

    leaves = tree_map_with_path(replace, model.leaf_modules(), is_leaf=nn.Module.is_module)
    model.update_modules(leaves)


def _may_be_ours(layer: _Quantized) -> bool:
    """Whether our kernels compute some products of a layer on a GPU: mlx has none for groups of 16, and of others ours
    may have been measured to be faster."""
    if layer.mode != "affine":
        return False
    if layer.group_size not in AFFINE_GROUP_SIZES:
        return True
    *experts, N, groups = layer.scales.shape
    K = groups * layer.group_size
    return choices.ever_faster(Product(layer.bits, layer.group_size, "", N, K, experts[0] if experts else 0))


def with_float_weight(layer: nn.Module, weight: mx.array) -> nn.Module:
    """A layer that computes as `layer`, one of ours however it holds its weight, would with another, float `weight`.

    Of a layer that is not ours the weight is replaced where it is float, in place; a quantized one stays as it is.
    """
    ours = next((k for k in _LAYERS.values() if isinstance(layer, (k.plain, k.quantized, k.blocks))), None)
    if ours is None:
        if "scales" not in layer:
            layer.weight = weight
        return layer
    new = ours.plain.__new__(ours.plain)
    nn.Module.__init__(new)
    new.weight = weight
    if "bias" in layer:
        new.bias = layer.bias
    if isinstance(new, Embedding):
        new.compute_dtype = getattr(layer, "compute_dtype", None)
    return new


def _replacement(layer: nn.Module, info: TensorInfo, compact: bool) -> nn.Module:
    ours = _LAYERS.get(type(layer))
    if ours is not None and keeps_blocks(info, compact):
        return ours.blocks(layer, info.dtype)
    if info.spec is not None:
        if ours is None:
            spec = info.spec
            return layer.to_quantized(group_size=spec.group_size, bits=spec.bits, mode=spec.mode)
        return ours.quantized(layer, info.spec, _FLOATS[info.scales_dtype or "F16"])
    if info.permuted_spec is not None and type(layer) in _PERMUTED:
        return _PERMUTED[type(layer)](layer, info.permuted_spec, _FLOATS[info.scales_dtype or "F16"])
    if ours is None:
        return layer
    new = ours.plain.__new__(ours.plain)
    nn.Module.__init__(new)
    dict.update(new, layer)
    new.__dict__.update({k: v for k, v in vars(layer).items() if k not in vars(new)})
    return new
