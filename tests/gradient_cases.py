"""Layers of every kind and format with what they compute: decoded float weights, through which mlx differentiates."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from random_blocks import random_blocks

from mlxq import ops
from mlxq.architectures.registry import import_private
from mlxq.formats import ggml
from mlxq.formats.floats import from_float32
from mlxq.formats.geometry import BLOCK_FORMATS
from mlxq.ops.arrays import mlx_dtype, to_mlx
from mlxq.runtime import layers
from mlxq.types import QuantSpec

KINDS = ("linear", "embedding", "switch")
N, K, EXPERTS = 37, 256, 3
#: Largest error by the largest value: sums in float32, and the rounding of half floats.
TOLERANCES = {"F32": 2e-6, "F16": 5e-4, "BF16": 4e-3}

_MLX = {
    "linear": lambda: nn.Linear(K, N, bias=False),
    "embedding": lambda: nn.Embedding(N, K),
    "switch": lambda: import_private("models.switch_layers").SwitchLinear(K, N, EXPERTS, bias=False),
}


def layer(kind: str, how: str, seed: int = 0) -> tuple[nn.Module, mx.array]:
    """A layer with random weights, and they decoded in float32.

    Args:
        how: a ggml type, a float dtype, or bits, group size and dtype of an affine grid: `4 16 F32`.
    """
    original = _MLX[kind]()
    shape = original.weight.shape
    floats, quantized, blocks = layers._LAYERS[type(original)]
    if how in BLOCK_FORMATS and BLOCK_FORMATS[how].block_size > 1:
        new = blocks(original, how)
        held = random_blocks(how, shape, seed)
        new.weight = mx.array(held)
        return new, mx.array(ggml.dequantize(held, how))
    w = (np.random.default_rng(seed).standard_normal(shape) * K**-0.5).astype(np.float32)
    bits, _, rest = how.partition(" ")
    if not rest:
        new = floats.__new__(floats)
        nn.Module.__init__(new)
        new.weight = to_mlx(from_float32(w, how))
        return new, new.weight.astype(mx.float32)
    group_size, dtype = rest.split()
    grid = {"bits": int(bits), "group_size": int(group_size), "backend": "numpy"}
    new = quantized(original, QuantSpec(int(bits), int(group_size)), mlx_dtype(dtype))
    packed = ops.quantize(from_float32(w, dtype), **grid)
    new.weight, new.scales, new.biases = map(to_mlx, packed)
    # The weights of a product are not rounded to the dtype of their scales.
    wide = (packed[0], *(np.array(to_mlx(p).astype(mx.float32)) for p in packed[1:]))
    return new, mx.array(ops.dequantize(*wide, **grid))


def check_gradient(kind: str, how: str, dtype: str, rows: int) -> None:
    """The gradient of a layer with respect to x is that of the product with its decoded weights."""
    module, w = layer(kind, how)
    rng = np.random.default_rng(rows)

    def normal(*shape: int) -> mx.array:
        return to_mlx(from_float32(rng.standard_normal(shape).astype(np.float32), dtype))

    if kind == "switch":
        # Each row goes to two experts: the gradient is a sum.
        x, chosen = normal(rows, 1, 1, K), mx.array(rng.integers(0, EXPERTS, (rows, 2)).astype(np.uint32))
        seed = normal(rows, 2, 1, N)
        computed, exact = (lambda x: module(x, chosen)), (lambda x: x @ w[chosen].swapaxes(-1, -2))
    else:
        x, seed = normal(2, rows, K), normal(2, rows, N)
        computed, exact = getattr(module, "as_linear", module), (lambda x: x @ w.T)
    (y,), (gradient,) = _vjp(computed, x, seed)
    (expected_y,), (expected,) = _vjp(exact, x.astype(mx.float32), seed.astype(mx.float32))
    assert (gradient.shape, gradient.dtype) == (x.shape, x.dtype)
    # Two products of half floats are added up: each is rounded, and so is their sum.
    for got, want, roundings in ((y, expected_y, 1), (gradient, expected, 3 if kind == "switch" else 1)):
        error = mx.abs(got.astype(mx.float32) - want).max().item()
        assert error <= roundings * TOLERANCES[dtype] * mx.abs(want).max().item()


def _vjp(function: Any, x: mx.array, seed: mx.array) -> tuple[list[mx.array], list[mx.array]]:
    # The output may be wider than x: float32 where the scales are.
    (y,), _ = mx.vjp(function, [x], [seed])
    return mx.vjp(function, [x], [seed.astype(y.dtype)])


class Tiny(nn.Module):
    """Two linear layers and an output, in mlx-lm's structure of blocks."""

    def __init__(self, how: str):
        super().__init__()
        self.layers = [_Block(how)]

    def __call__(self, x: mx.array) -> mx.array:
        return self.layers[0](x)


class _Block(nn.Module):
    def __init__(self, how: str):
        super().__init__()
        self.up, self.head = layer("linear", how, 1)[0], layer("linear", how, 2)[0]
        self.lift = mx.array(np.random.default_rng(3).standard_normal((N, K)).astype(np.float32)) / N**0.5

    def __call__(self, x: mx.array) -> mx.array:
        return self.head(nn.silu(self.up(x)) @ self.lift)


def losses_of_lora(how: str, steps: int) -> list[float]:
    """Losses of training low-rank weights beside both layers of `Tiny`; the layers themselves stay as they are."""
    from mlx.optimizers import Adam
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    mx.random.seed(0)
    model = Tiny(how)
    model.freeze()
    linear_to_lora_layers(model, 1, {"rank": 4, "scale": 1.0, "dropout": 0.0})
    names = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert names == {f"layers.0.{m}.lora_{side}" for m in ("up", "head") for side in "ab"}
    before = [mx.array(block.linear.weight) for block in (model.layers[0].up, model.layers[0].head)]
    rng = np.random.default_rng(5)
    x, target = (mx.array(rng.standard_normal((6, n)).astype(np.float32)) for n in (K, N))
    step = nn.value_and_grad(model, lambda model: mx.mean((model(x) - target) ** 2))
    optimizer, losses = Adam(learning_rate=0.01), []
    for _ in range(steps):
        loss, gradients = step(model)
        optimizer.update(model, gradients)
        losses.append(loss.item())
    after = [block.linear.weight for block in (model.layers[0].up, model.layers[0].head)]
    assert all(mx.array_equal(a, b) for a, b in zip(before, after, strict=True))
    return losses
