"""Gradients of a block's matrices against those that mlx computes."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxq.calibration.weight_gradients import WeightGradients
from mlxq.runtime import layers

N, K, EXPERTS = 24, 32, 5


class Layers(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.parts = [first]
        self.second = second


def layer(kind: type[nn.Module], shape: tuple[int, ...], seed: int) -> nn.Module:
    new = kind.__new__(kind)
    nn.Module.__init__(new)
    new.weight = array(shape, seed)
    return new


def array(shape: tuple[int, ...], seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def same(a: np.ndarray, b: mx.array, terms: int) -> None:
    # Sums of products of numbers near 1, in two orders.
    np.testing.assert_allclose(a, np.array(b), rtol=0, atol=terms * 2**-20)


def test_linear_layers_with_other_weights() -> None:
    model = Layers(layer(layers.Linear, (N, K), 0), layer(layers.Linear, (K, N), 1))
    x, w, v = array((2, 7, K), 2), array((N, K), 3), array((K, N), 4)
    gradients, names = WeightGradients(), ["block.parts.0.weight", "block.second.weight"]
    with gradients.of(model, "block", names):
        gradients.put({names[0]: np.array(w), names[1]: np.array(v)})
        mx.eval(mx.value_and_grad(lambda x: mx.square(model.second(model.parts[0](x))).sum())(x))
    expected = mx.grad(lambda w, v: mx.square((x @ w.T) @ v.T).sum(), argnums=(0, 1))(w, v)
    for name, wanted in zip(names, expected, strict=True):
        found = gradients.found[name] / float(mx.abs(wanted).max())
        same(found, wanted / mx.abs(wanted).max(), 14 * K)
    gradients.clear()
    assert gradients.found == {}
    # The layers keep what they were given last, and are no longer looked at.
    assert isinstance(model.second, layers.Linear)
    assert bool((model.second.weight == v).all())


def test_each_expert_has_its_own() -> None:
    model = Layers(layer(layers.SwitchLinear, (EXPERTS, N, K), 0), nn.Identity())
    x, w = array((2, 7, 1, 1, K), 1), np.array(array((EXPERTS, N, K), 2))
    routes = mx.array(np.random.default_rng(3).integers(0, EXPERTS - 1, (2, 7, 2)).astype(np.uint32))
    gradients, name = WeightGradients(), "block.parts.0.weight"
    with gradients.of(model, "block", [name]):
        gradients.put({name: w})
        mx.eval(mx.value_and_grad(lambda x: mx.square(model.parts[0](x, routes)).sum())(x))
    rows, which = np.repeat(np.array(x).reshape(-1, K), 2, axis=0), np.array(routes).ravel()
    for i in range(EXPERTS):
        some = rows[which == i]
        wanted = 2 * (some @ w[i].T).T @ some
        same(gradients.found[name][i] / 100, mx.array(wanted / 100), 28 * K)
    # Nothing went to the last.
    assert not gradients.found[name][-1].any()


def test_weights_that_are_not_float_are_left_out() -> None:
    quantized = nn.QuantizedLinear.from_linear(nn.Linear(64, 32, bias=False))
    model, gradients = Layers(quantized, nn.Identity()), WeightGradients()
    with gradients.of(model, "block", ["block.parts.0.weight"]):
        mx.eval(mx.value_and_grad(lambda x: model.parts[0](x).sum())(array((3, 64), 0)))
    assert gradients.found == {}
