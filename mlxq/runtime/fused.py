"""Projections of a model that share their x, computed by one Metal kernel: gate and up; q, k and v.

Both are found in what a module's forward pass says, not by its name: mlx-lm has some fifty classes that say the same.
Only layers are joined whose products go to our Metal kernels; weights stay where they are, and parameters keep their
names. For more rows of x than such a kernel takes (`ops.fused.MAX_ROWS`), and where a layer was replaced since, by
one with low-rank weights, say, everything is computed as the model says.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxq import ops
from mlxq.architectures.registry import import_private
from mlxq.ops.dispatch import asked, call_on, choose
from mlxq.ops.fused import MAX_ROWS, BlockWeights, PackedWeights, Weights
from mlxq.runtime import attention
from mlxq.runtime.block_layers import BlockLinear
from mlxq.runtime.layers import QuantizedLinear

_activations = import_private("models.activations")

#: Forward passes of feed-forward layers: what they return, the activation, and the global name that they rely on with
#: what it has to be.
_GATED = {
    "self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))": ("silu", "swiglu", _activations.swiglu),
    "self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))": ("silu", "nn", nn),
    "self.down_proj(nn.gelu_approx(self.gate_proj(x)) * self.up_proj(x))": ("gelu_approx", "nn", nn),
    "self.down_proj(nn.gelu(self.gate_proj(x)) * self.up_proj(x))": ("gelu", "nn", nn),
}
#: What an attention's forward pass holds that uses one x for all three, with nothing in between.
_QKV = "(self.q_proj(x), self.k_proj(x), self.v_proj(x))"


def install_fused(model: nn.Module) -> None:
    """Join projections of `model`, in place, after `layers.install_layers`."""
    for module in model.modules():
        gated = _gated_class(type(module))
        if gated is not None and _joinable(_parts(module, "gate", "up")):
            module.__class__ = gated
        projections = _parts(module, "q", "k", "v")
        if _asks_for_qkv(type(module)) and _joinable(projections):
            group = _Group(projections)
            for layer in projections:
                layer.__class__ = _member_class(type(layer))
                layer.group = group


class _Gated(nn.Module):
    """A feed-forward layer whose gate, up projection and activation are one kernel."""

    activation: str

    def __call__(self, x: mx.array) -> mx.array:
        parts = _parts(self, "gate", "up")
        gate, up = map(_weights, parts)
        if gate is None or up is None or any("bias" in part for part in parts) or not _few(x):
            return super().__call__(x)
        return self.down_proj(ops.gated_projection(x, gate, up, activation=self.activation))


class _Group:
    """Layers that are called with the same x, one right after the other: the first call computes for all."""

    def __init__(self, layers: list[nn.Module]):
        self._layers = layers
        self._held: tuple[mx.array, dict[int, mx.array]] | None = None

    def product(self, layer: nn.Module, x: mx.array) -> mx.array | None:
        """The product of a layer, without its bias; None if it is to be computed alone.

        What waits for the other layers goes with the last of them; it is known by x itself, and so never given to
        another x.
        """
        held = self._held
        if held is not None and held[0] is x and id(layer) in held[1]:
            y = held[1].pop(id(layer))
            if not held[1]:
                self._held = None
            return y
        if not _few(x):
            return None
        products = ops.projections(x, [_weights(member) for member in self._layers])
        waiting = {id(member): y for member, y in zip(self._layers, products, strict=True)}
        y = waiting.pop(id(layer))
        self._held = x, waiting
        return y


class _Member(nn.Module):
    """One of the layers of a `_Group`."""

    group: _Group
    kind: type[nn.Module]

    def __call__(self, x: mx.array) -> mx.array:
        y = self.group.product(self, x)
        if y is None:
            return super().__call__(x)
        return y + self["bias"] if "bias" in self else y


def _parts(module: nn.Module, *names: str) -> list[Any]:
    return [module.get(f"{name}_proj") for name in names]


def _few(x: mx.array) -> bool:
    return x.size <= MAX_ROWS * x.shape[-1]


def _weights(layer: Any) -> Weights | None:
    """What `ops.fused` takes of a layer; None of one that is not ours."""
    kind = layer.kind if isinstance(layer, _Member) else type(layer)
    if kind is BlockLinear:
        return BlockWeights(layer["weight"], layer.type_name)
    if kind is QuantizedLinear:
        return PackedWeights(layer["weight"], layer["scales"], layer["biases"], layer.bits, layer.group_size)
    return None


def _joinable(layers: list[Any]) -> bool:
    """Whether all layers are of one of our kinds, and their products may go to our Metal kernels."""
    return len({type(layer) for layer in layers}) == 1 and all(_may_be_metal(layer) for layer in layers)


def _may_be_metal(layer: Any) -> bool:
    if type(layer) is BlockLinear:
        return choose(call_on("mlx", "block_matmul", 1, layer.type_name)) == "metal"
    if type(layer) is not QuantizedLinear or layer.mode != "affine":
        return False
    backend = choose(call_on("mlx", "quantized_matmul", 1, group_size=layer.group_size))
    # On a GPU a layer that is not plain has products for which ours were measured to be faster.
    return backend == "metal" or not (asked() or layer.plain or attention.on_cpu())


@cache
def _gated_class(cls: type[nn.Module]) -> type[nn.Module] | None:
    """`cls` with gate and up in one kernel, if its forward pass is one of `_GATED`."""
    body = _forward(cls)
    if len(body) != 1 or not isinstance(body[0], ast.Return) or body[0].value is None:
        return None
    activation, name, meaning = _GATED.get(ast.unparse(body[0].value), ("", "", None))
    if not activation or cls.__call__.__globals__.get(name) is not meaning:
        return None
    return type(cls.__name__, (_Gated, cls), {"activation": activation, "__module__": cls.__module__})


@cache
def _asks_for_qkv(cls: type[nn.Module]) -> bool:
    """Whether the forward pass of `cls` takes q, k and v of one x in one expression."""
    tuples = (node for part in _forward(cls) for node in ast.walk(part) if isinstance(node, ast.Tuple))
    return any(ast.unparse(node) == _QKV for node in tuples)


@cache
def _member_class(cls: type[nn.Module]) -> type[nn.Module]:
    return type(cls.__name__, (_Member, cls), {"kind": cls, "__module__": cls.__module__})


def _forward(cls: type[nn.Module]) -> list[ast.stmt]:
    """The statements of a class's own forward pass `(self, x, ...)`; none where there is no text of it."""
    call = vars(cls).get("__call__")
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(call))).body
    except (TypeError, OSError, SyntaxError, ValueError):
        return []
    return function.body if isinstance(function, ast.FunctionDef) and not function.decorator_list else []
