"""Fused operations without a kernel: NumPy's reference, mlx's composition, and what they refuse."""

from __future__ import annotations

import math
import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from random_blocks import random_blocks

from mlxq import ops
from mlxq.errors import BackendError, FormatError
from mlxq.formats import ggml

RNG = np.random.default_rng(3)
K, N = 256, 12
X = RNG.standard_normal((2, 3, K)).astype(np.float32)
ORDER = RNG.permutation(K).astype(np.int32)


def blocks(seed: int, name: str = "Q4_K") -> ops.BlockWeights:
    return ops.BlockWeights(random_blocks(name, (N, K), seed), name)


def packed(seed: int, bits: int = 4) -> ops.PackedWeights:
    w = np.random.default_rng(seed).standard_normal((N, K)).astype(np.float32) / 16
    return ops.PackedWeights(*ops.quantize(w, bits=bits, group_size=32, backend="numpy"), bits, 32)


def decoded(w: ops.BlockWeights | ops.PackedWeights) -> np.ndarray:
    if isinstance(w, ops.BlockWeights):
        return ggml.dequantize(w.blocks, w.type_name).astype(np.float64)
    return ops.dequantize(*w[:3], bits=w.bits, group_size=w.group_size, backend="numpy").astype(np.float64)


def in_mlx(w: ops.BlockWeights | ops.PackedWeights) -> ops.BlockWeights | ops.PackedWeights:
    return w._make(mx.array(a) if isinstance(a, np.ndarray) else a for a in w)


FUNCTIONS = {
    "silu": lambda g: g / (1 + np.exp(-g)),
    "gelu_approx": lambda g: g / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))),
    "gelu": lambda g: g / 2 * np.vectorize(math.erfc)(-g / math.sqrt(2)),
}


@pytest.mark.parametrize("make", [blocks, packed])
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_gate_and_up_with_their_function(make, activation):
    gate, up = make(1), make(2)
    wide = X.astype(np.float64)[..., ORDER]
    expected = FUNCTIONS[activation](wide @ decoded(gate).T) * (wide @ decoded(up).T)
    for x, weights in ((X, (gate, up)), (mx.array(X), (in_mlx(gate), in_mlx(up)))):
        y = ops.gated_projection(x, *weights, activation=activation, g_idx=ORDER)
        assert type(y) is type(x)
        # Two products and a function of slope at most 1.13, each to float32's 1e-6.
        assert np.abs(np.asarray(y) - expected).max() <= 2.13e-6 * np.abs(expected).max()


def test_the_functions_are_those_of_mlx():
    from mlxq.ops.fused import ACTIVATIONS

    g = np.linspace(-12, 12, 1001).astype(np.float32)
    for name, function in ACTIVATIONS.items():
        theirs = np.asarray(getattr(nn, name)(mx.array(g)))
        assert np.abs(function(g) - theirs).max() <= 4 * np.spacing(np.float32(12))


def test_the_reference_rounds_once():
    gate, up = blocks(1), blocks(2)
    half = X.astype(np.float16)
    y = ops.gated_projection(half, gate, up, activation="silu")
    in_float32 = ops.gated_projection(half.astype(np.float32), gate, up, activation="silu")
    assert y.dtype == np.float16
    assert np.array_equal(y, in_float32.astype(np.float16))


def test_products_of_several_kinds():
    weights = [blocks(1), packed(2), blocks(3, "Q8_0"), packed(4, 8)]
    for x, held in ((X, weights), (mx.array(X), [in_mlx(w) for w in weights])):
        for y, w in zip(ops.projections(x, held, g_idx=ORDER), weights, strict=True):
            expected = X.astype(np.float64)[..., ORDER] @ decoded(w).T
            assert np.abs(np.asarray(y) - expected).max() <= 1e-6 * np.abs(expected).max()


def test_empty_x():
    assert ops.gated_projection(X[:0], blocks(1), blocks(2), activation="silu").shape == (0, 3, N)
    assert [y.shape for y in ops.projections(X[:0], [blocks(1), packed(2)])] == [(0, 3, N), (0, 3, N)]


SHORT = blocks(1)._replace(blocks=random_blocks("Q4_K", (N - 1, K)))
REFUSED = [
    (lambda: ops.projections(X, []), "1 to 4 matrices, got 0"),
    (lambda: ops.projections(X, [X]), "weights must be PackedWeights or BlockWeights, got ndarray"),
    (lambda: ops.projections(X[..., :64], [blocks(1)]), "x has 64 columns, but the weights multiply 256"),
    (lambda: ops.projections(X, [blocks(1), packed(1)._replace(bits=7)]), "bits"),
    (lambda: ops.projections(X, [blocks(1)], g_idx=ORDER[1:]), "g_idx must be integers [256]"),
    (lambda: ops.projections(X, [blocks(1)], g_idx=ORDER.astype(np.float32)), "g_idx must be integers [256]"),
    (lambda: ops.projections(X, [blocks(1)], g_idx=ORDER // 2), "g_idx must have each of 0..255 once"),
    (lambda: ops.gated_projection(X, blocks(1), SHORT, activation="silu"), "as many outputs, got 12 and 11"),
    (lambda: ops.gated_projection(X, blocks(1), blocks(2), activation="relu"), "one of silu, gelu_approx, gelu, got"),
]


@pytest.mark.parametrize(("call", "rule"), REFUSED, ids=[rule for _, rule in REFUSED])
def test_bad_input_is_refused_with_its_rule(call, rule):
    with pytest.raises(FormatError, match=re.escape(rule)) as refused:
        call()
    assert "\n" not in str(refused.value)


def test_metal_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    with pytest.raises(BackendError, match="needs an Apple GPU"):
        ops.projections(mx.array(X), [in_mlx(blocks(1))], backend="metal")
