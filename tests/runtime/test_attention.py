"""NumPy attention and SwiGLU against mlx's own."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxq.architectures.registry import import_private
from mlxq.runtime import attention


def tensors(B, heads, kv_heads, L, T, D, Dv, dtype=mx.float32):
    rng = np.random.default_rng(L * 1000 + T)
    shapes = ((B, heads, L, D), (B, kv_heads, T, D), (B, kv_heads, T, Dv))
    return [mx.array(rng.standard_normal(s, dtype=np.float32)).astype(dtype) for s in shapes]


def check(q, k, v, mask, tolerance=2e-6):
    scale = q.shape[-1] ** -0.5
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    ours = attention.attention(q, k, v, scale=scale, mask=mask)
    assert ours.shape == expected.shape
    assert ours.dtype == expected.dtype
    # Outputs are averages of standard normal values, at most 4 in size; float32 sums of up to 600 terms of weights
    # that add to 1 err by a few 6e-8 of that.
    assert float(mx.abs(ours.astype(mx.float32) - expected.astype(mx.float32)).max()) <= tolerance


@pytest.mark.parametrize(
    ("heads", "kv_heads", "L", "T"), [(4, 4, 7, 7), (6, 2, 300, 300), (8, 1, 130, 600), (4, 2, 1, 33), (2, 2, 1, 1)]
)
@pytest.mark.parametrize("kind", ["none", "causal", "boolean", "additive", "per_head"])
def test_attention_is_mlx_attention(heads, kv_heads, L, T, kind):
    q, k, v = tensors(2, heads, kv_heads, L, T, 16, 24)
    rng = np.random.default_rng(5)
    seen = rng.random((L, T)) < 0.7
    seen[:, 0] = True
    masks = {
        "none": None,
        "causal": "causal",
        "boolean": mx.array(seen),
        "additive": mx.array(np.where(seen, rng.standard_normal((L, T)), -np.inf).astype(np.float32)),
        "per_head": mx.array(rng.standard_normal((2, heads, L, T), dtype=np.float32)),
    }
    check(q, k, v, masks[kind])


def test_blocks_bound_the_memory_and_change_nothing(monkeypatch):
    q, k, v = tensors(1, 4, 2, 100, 150, 16, 16)
    monkeypatch.setattr(attention, "_SCORES_BYTES", 4 * 2 * 150 * 7)  # 7 rows at a time
    check(q, k, v, "causal")


def test_views_of_a_cache_and_transposed_queries():
    q, k, v = tensors(1, 40, 64, 4, 64, 16, 16)
    k, v = k[:, :2, :50], v[:, :2, :50]
    q = q.transpose(0, 2, 1, 3)  # [1, 4, 40, 16], not contiguous
    check(q, k, v, "causal")


def test_half_precision_comes_back_in_its_dtype():
    q, k, v = tensors(1, 4, 2, 30, 30, 16, 16, mx.bfloat16)
    # One rounding to bfloat16 of values up to 4, spacing 2**-6; mlx rounds the scores, too.
    check(q, k, v, "causal", tolerance=4 * 2**-6)


def test_softmax_survives_large_scores():
    q, k, v = tensors(1, 2, 2, 20, 20, 8, 8)
    q = q * 1e4
    out = attention.attention(q, k, v, scale=1.0, mask="causal")
    assert bool(mx.isfinite(out).all())


def test_models_use_it_even_if_imported_before(monkeypatch):
    llama = import_private("models.llama")
    attention.install()
    monkeypatch.setattr(attention, "on_cpu", lambda: True)
    calls = []
    monkeypatch.setattr(attention, "attention", lambda *a, **k: calls.append("attention") or a[0])
    monkeypatch.setattr(attention, "swiglu", lambda gate, x: calls.append("swiglu") or x)
    q, k, v = tensors(1, 4, 2, 8, 8, 16, 16)
    llama.scaled_dot_product_attention(q, k, v, cache=None, scale=0.25, mask="causal")
    llama.swiglu(q, q)
    assert calls == ["attention", "swiglu"]


def test_sinks_and_quantized_caches_stay_with_mlx():
    base = import_private("models.base")
    attention.install()
    q, k, v = tensors(1, 4, 2, 8, 8, 32, 32)
    sinks = mx.array([0.5, -1.0, 0.0, 2.0])
    ours = base.scaled_dot_product_attention(q, k, v, cache=None, scale=0.2, mask="causal", sinks=sinks)
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.2, mask="causal", sinks=sinks)
    assert mx.array_equal(ours, expected)
    cache = import_private("models.cache").QuantizedKVCache(group_size=32, bits=8)
    keys, values = cache.update_and_fetch(k, v)
    # First, because mlx-lm's function scales the queries in place.
    exact = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.2, mask="causal")
    ours = base.scaled_dot_product_attention(q, keys, values, cache=cache, scale=0.2, mask="causal")
    # Keys and values of 8 bits: steps of about 5/255, half of which is the largest error of a value.
    assert float(mx.abs(ours - exact).max()) < 0.05


@pytest.mark.parametrize("shape", [(1, 1, 64), (1, 50, 257)])
def test_swiglu(shape):
    rng = np.random.default_rng(0)
    gate, x = (mx.array(rng.standard_normal(shape, dtype=np.float32) * 30) for _ in range(2))
    g = np.array(gate, dtype=np.float64)
    expected = g / (1 + np.exp(-g)) * np.array(x, dtype=np.float64)
    ours = np.array(attention.swiglu(gate, x), dtype=np.float64)
    # Four float32 operations, each within one unit in the last place, exp within two.
    assert np.all(np.abs(ours - expected) <= 6 * 1.2e-7 * np.abs(expected) + 1e-30)


def test_swiglu_of_extreme_gates():
    gate = mx.array([-1e30, -200.0, 0.0, 200.0], mx.float32)
    assert attention.swiglu(gate, mx.ones(4)).tolist() == [0.0, 0.0, 0.0, 200.0]


@pytest.mark.parametrize("mask", [None, "causal", "window"])
def test_gradients_of_attention_are_mlx_s(mask):
    """Sums of some dozen products of numbers near 1, in float32 by two orders: 1e-5 is 80 roundings."""
    mx.random.seed(5)
    q, k, v, d = (mx.random.normal((2, heads, 150, 16)) for heads in (6, 2, 2, 6))
    if mask == "window":
        at = mx.arange(150)
        mask = (at[:, None] >= at) & (at[:, None] < at + 20)
    own = mx.vjp(lambda *a: attention.attention(*a, scale=0.25, mask=mask), [q, k, v], [d])
    theirs = mx.vjp(lambda *a: mx.fast.scaled_dot_product_attention(*a, scale=0.25, mask=mask), [q, k, v], [d])
    for a, b in zip(own[1], theirs[1], strict=True):
        assert float(mx.abs(a - b).max()) < 1e-5 * float(mx.abs(b).max())


@pytest.mark.parametrize("shape", [(2, 6, 150, 150), (6, 1, 150), (150, 150), (150, 1)])
def test_gradients_of_additive_masks(shape):
    """Scores that a model adds itself, as latent attention does; mlx has no gradient for these, but for products."""
    mx.random.seed(7)
    q, k, v, d = (mx.random.normal((2, heads, 150, 16)) for heads in (6, 2, 2, 6))
    mask = mx.random.normal(shape)

    def plain(q, k, v, mask):
        k, v = (mx.repeat(a, 3, axis=1) for a in (k, v))
        return mx.softmax(0.25 * q @ k.swapaxes(-1, -2) + mask, axis=-1) @ v

    own = mx.vjp(lambda q, k, v, m: attention.attention(q, k, v, scale=0.25, mask=m), [q, k, v, mask], [d])
    theirs = mx.vjp(plain, [q, k, v, mask], [d])
    for a, b in zip(own[1], theirs[1], strict=True):
        assert a.shape == b.shape
        # A row of scores moved as one changes nothing: that gradient is a sum that cancels.
        assert float(mx.abs(a - b).max()) < 1e-5 * max(float(mx.abs(b).max()), 10)


def test_gradients_of_swiglu_are_mlx_s():
    mx.random.seed(6)
    gate, x, d = (3 * mx.random.normal((7, 33)) for _ in range(3))
    own = mx.vjp(attention.swiglu, [gate, x], [d])
    theirs = mx.vjp(lambda g, x: g * mx.sigmoid(g) * x, [gate, x], [d])
    for a, b in zip(own[1], theirs[1], strict=True):
        assert float(mx.abs(a - b).max()) < 1e-6 * float(mx.abs(b).max())
