"""Gradients of our layers with respect to x, and low-rank training on top of them, by the Metal kernels."""

from __future__ import annotations

import mlx.core as mx
import pytest
from gradient_cases import KINDS, check_gradient, layer, losses_of_lora

from mlxq.ops.dispatch import METAL_TYPES


@pytest.fixture(autouse=True)
def _asked_for(metal, monkeypatch):
    monkeypatch.setenv("MLXQ_BACKEND", "metal")


def slow(*cases: object) -> list:
    return [pytest.param(*(c if isinstance(c, tuple) else (c,)), marks=pytest.mark.slow) for c in cases]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("how", "dtype", "rows"),
    [
        ("4 16 F32", "F32", 3),
        ("4 64 F16", "F16", 20),
        *slow(("3 16 F16", "F16", 1), ("8 32 BF16", "BF16", 20), ("5 128 F32", "F16", 3), ("2 16 F16", "F32", 1)),
        *slow(("6 64 F32", "BF16", 3)),
    ],
)
def test_affine(metal, kind, how, dtype, rows):
    with metal.options(mode="fast"):
        check_gradient(kind, how, dtype, rows)
    if not metal.real:
        used = {name.split("_")[1] for name, _ in metal.launches}
        # The product and, from the other side, its gradient.
        assert used == ({"gather"} if kind == "switch" else {"qmv" if rows < 8 else "qmm", "qmm"})


@pytest.mark.parametrize("how", ["Q4_K", *slow(*(t for t in METAL_TYPES if t != "Q4_K"))])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks(metal, kind, how):
    with metal.options(mode="fast"):
        check_gradient(kind, how, "F32", 3)
    if not metal.real:
        assert any(name.startswith("ggml_dequantize") for name, _ in metal.launches)


@pytest.mark.parametrize("how", ["4 16 F32", "Q6_K"])
def test_low_rank_training_lowers_the_loss(metal, how):
    with metal.options(mode="fast"):
        losses = losses_of_lora(how, 12)
    assert losses[-1] < 0.9 * losses[0], losses


def test_a_gradient_may_be_compiled(metal):
    """mlx's trainer compiles its step. The checker cannot run inside one, but Metal can."""
    module, w = layer("linear", "4 16 F32")
    x = mx.random.normal((3, w.shape[1]), key=mx.random.key(0))
    step = mx.grad(lambda x: (module(x) ** 2).sum())
    if metal.real:
        step = mx.compile(step)
    expected = mx.grad(lambda x: ((x @ w.T) ** 2).sum())(x)
    assert mx.abs(step(x) - expected).max() <= 1e-5 * mx.abs(expected).max()
