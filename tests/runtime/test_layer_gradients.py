"""Gradients of our layers with respect to x, and low-rank training on top of them, as the CPU computes them."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from gradient_cases import KINDS, check_gradient, layer, losses_of_lora
from mlx_lm.tuner.utils import linear_to_lora_layers
from random_blocks import BLOCK_TYPES

from mlxq.ops import dispatch, gradients
from mlxq.runtime import layers
from mlxq.types import QuantSpec, TensorInfo

AFFINE = ("2 64 F16", "3 16 F32", "4 16 BF16", "4 64 F32", "5 16 F16", "6 128 BF16", "8 16 F32")
FLOATS = ("F32", "F16", "BF16")
BACKENDS = ("numpy", "mlx", None)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.delenv("MLXQ_BACKEND", raising=False)
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)


def pairs(formats: tuple[str, ...]) -> list[tuple[str, str | None]]:
    """Formats with each back end that computes them: mlx has no groups of 16."""
    return [(how, b) for how in formats for b in BACKENDS if not (b == "mlx" and " 16 " in how)]


def ask_for(monkeypatch: pytest.MonkeyPatch, backend: str | None) -> None:
    if backend:
        monkeypatch.setenv("MLXQ_BACKEND", backend)


@pytest.mark.parametrize(("how", "backend"), pairs((*AFFINE, "F32", "Q4_K", "Q6_K")))
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_decoded_weights(monkeypatch, kind, how, backend):
    ask_for(monkeypatch, backend)
    for rows in (1, 5):
        check_gradient(kind, how, "F32", rows)


@pytest.mark.parametrize("how", BLOCK_TYPES)
def test_every_type_of_blocks(monkeypatch, how):
    # In parts of 5 rows, and of one expert.
    monkeypatch.setattr(gradients, "_DECODED", 5 * 256)
    for kind in KINDS:
        check_gradient(kind, how, "F32", 3)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("how", ["4 16 F32", "4 16 F16", "4 64 BF16", "F16", "F32", "Q5_K", "Q8_0"])
def test_half_floats(monkeypatch, how, dtype):
    monkeypatch.setenv("MLXQ_BACKEND", "numpy")
    for kind in KINDS:
        check_gradient(kind, how, dtype, 3)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["linear", "switch"])
def test_float_weights_have_a_gradient_too(monkeypatch, kind, dtype):
    monkeypatch.setenv("MLXQ_BACKEND", "numpy")
    module, w = layer(kind, dtype)
    x = mx.random.normal((4, 1, w.shape[-1]), key=mx.random.key(0)).astype(module.weight.dtype)
    chosen = mx.array([0, 2, 2, 1], mx.uint32)

    def computed(weight: mx.array) -> mx.array:
        module.weight = weight
        return (module(x, chosen) if kind == "switch" else module(x)).astype(mx.float32).sum()

    def exact(w: mx.array) -> mx.array:
        wide = x.astype(mx.float32)
        return (wide @ (w[chosen].swapaxes(-1, -2) if kind == "switch" else w.T)).sum()

    gradient, expected = mx.grad(computed)(module.weight), mx.grad(exact)(w)
    assert gradient.dtype == x.dtype
    assert mx.abs(gradient.astype(mx.float32) - expected).max() <= 4e-3 * mx.abs(expected).max()


def test_no_rows_have_no_gradient():
    for how in ("4 16 F32", "Q4_K", "F32"):
        module, w = layer("linear", how)
        gradient = mx.grad(lambda x, module=module: module(x).sum())(mx.zeros((0, w.shape[1])))
        assert gradient.shape == (0, w.shape[1])


@pytest.mark.parametrize(("how", "backend"), pairs(("4 16 F32", "4 64 F16", "Q4_K", "F32")))
def test_low_rank_training_lowers_the_loss(monkeypatch, how, backend):
    ask_for(monkeypatch, backend)
    losses = losses_of_lora(how, 12)
    assert losses[-1] < 0.9 * losses[0], losses


@pytest.mark.parametrize("how", ["4 16 F32", "4 64 F16", "Q4_K"])
@pytest.mark.parametrize("kind", KINDS)
def test_with_metal_nothing_is_evaluated_on_the_way(monkeypatch, kind, how):
    """mlx's trainer compiles its step, in which nothing can be. The launchers are traced, with kernels that give 0."""

    def launch(*, output_shapes, output_dtypes, **_) -> list[mx.array]:
        return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]

    monkeypatch.setattr(mx.fast, "metal_kernel", lambda **_: launch)
    monkeypatch.setenv("MLXQ_BACKEND", "metal")
    monkeypatch.setattr(dispatch, "metal_available", lambda: True)
    module, w = layer(kind, how)
    chosen = mx.array([[0, 2], [1, 1]], mx.uint32)

    def loss(x: mx.array) -> mx.array:
        y = module(x, chosen) if kind == "switch" else getattr(module, "as_linear", module)(x)
        return (y**2).sum()

    x = mx.zeros((2, 1, 1, w.shape[-1]))
    assert mx.compile(mx.grad(loss))(x).shape == x.shape
    # NumPy evaluates: the same would be an error.
    monkeypatch.setenv("MLXQ_BACKEND", "numpy")
    with pytest.raises(ValueError, match="eval"):
        mx.compile(mx.grad(loss))(x)


@pytest.mark.parametrize("how", ["Q6_K", "4 16 F32", "F16"])
@pytest.mark.parametrize("kind", KINDS)
def test_low_rank_weights_have_the_shape_of_the_layer(kind, how):
    """As mlx-lm's tuner makes them: it asks the layer, or knows it as a subclass of its own."""
    module, w = layer(kind, how)
    model = nn.Module()
    model.layers = [nn.Module()]
    model.layers[0].part = module
    linear_to_lora_layers(model, 1, {"rank": 2, "scale": 1.0, "dropout": 0.0})
    lora = model.layers[0].part
    assert type(lora).__name__ == {"switch": "LoRASwitchLinear", "embedding": "LoRAEmbedding"}.get(kind, "LoRALinear")
    x, chosen = mx.random.normal((2, 1, 1, w.shape[-1])).astype(mx.float16), mx.array([[0], [2]], mx.uint32)
    if kind == "switch":
        assert mx.array_equal(lora(x, chosen), module(x, chosen))
    elif kind == "embedding":
        assert mx.array_equal(lora(chosen), module(chosen))
        assert mx.array_equal(lora.as_linear(x), module.as_linear(x))
    else:
        assert mx.array_equal(lora(x), module(x))


def test_blocks_stay_frozen():
    module, _ = layer("linear", "Q4_K")
    module.unfreeze()
    assert not module.trainable_parameters()


@pytest.mark.parametrize(("group_size", "plain"), [(16, False), (64, True)])
def test_layers_of_groups_of_16_are_never_mlx_s(monkeypatch, group_size, plain):
    monkeypatch.setattr(layers.attention, "on_cpu", lambda: False)
    model = nn.Sequential(nn.Linear(64, 8, bias=False))
    spec = QuantSpec(4, group_size)
    info = TensorInfo("layers.0.weight", (8, 64), "AFFINE", 0, spec, "F16")
    layers.install_layers(model, {info.name: info})
    assert (type(model.layers[0]), model.layers[0].plain) == (layers.QuantizedLinear, plain)
    assert mx.array_equal(model(mx.ones((2, 64))), mx.zeros((2, 8)))
