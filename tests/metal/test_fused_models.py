"""Models whose projections are joined: which, when not, and that nothing but the launches changes."""

from __future__ import annotations

import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from block_models import PROMPT, logits_of, write
from pretended_gpu import pretend_gpu

import mlxq
from mlxq import ops
from mlxq.architectures.registry import import_private
from mlxq.ops import fused_cases, kernel_check, metal_fused
from mlxq.ops.kernel_cases import Affine, Blocks
from mlxq.runtime import fused

#: Models that were read by hand: module -> activation, and whether q, k and v are asked for at once.
KNOWN = {
    **dict.fromkeys(["llama", "qwen2", "qwen3", "granite", "olmo2", "cohere2", "ministral3"], "silu"),
    **{"gemma": "gelu", "gemma2": "gelu_approx", "gemma3_text": "gelu_approx"},
}


@pytest.fixture
def gpu(metal, monkeypatch):
    pretend_gpu(monkeypatch, metal=True)
    with metal.options(mode="fast"):
        yield metal


def names(metal) -> list[str]:
    return [name for name, _ in metal.launches]


@pytest.mark.parametrize(("model", "activation"), KNOWN.items())
def test_the_forward_passes_of_known_models_are_recognized(model, activation):
    module = import_private(f"models.{model}")
    joined = fused._gated_class(module.MLP)
    assert joined.activation == activation
    assert issubclass(joined, module.MLP)
    assert fused._asks_for_qkv(module.Attention)


def test_classes_that_do_something_else_are_left_alone():
    # One matrix for both; a clipped function; a router; q and k of parts of x.
    assert fused._gated_class(import_private("models.phi3").MLP) is None
    assert fused._gated_class(import_private("models.gpt_oss").MLPBlock) is None
    assert fused._gated_class(import_private("models.gemma3n").MLP) is None
    assert not fused._asks_for_qkv(import_private("models.phi3").Attention)

    def swiglu(a, b):
        return a + b

    class Same(nn.Module):
        def __call__(self, x):
            return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))

    assert fused._gated_class(Same) is None


@pytest.mark.parametrize("type_name", ["Q4_K", "Q6_K"])
def test_a_block_of_a_model_takes_four_launches_for_seven_matrices(gpu, tmp_path, type_name):
    with mlxq.load(write(tmp_path / "m.gguf", type_name, tied=True)) as model:
        gpu.launches.clear()
        model.module(mx.array([PROMPT[:1]]))
        layers = len(model.module.layers)
        if not gpu.real:
            of_layers = [n.split(f"_{type_name.lower()}")[0] for n in names(gpu)][1:-1]
            assert of_layers == layers * ["ggml_qmv_each_3", "ggml_qmv", "ggml_qmv_gated_silu", "ggml_qmv"]
        gpu.launches.clear()
        model.module(mx.array([PROMPT]))
        assert not any("each" in n or "gated" in n for n in names(gpu))


def test_joining_changes_neither_parameters_nor_logits(metal, tmp_path, monkeypatch):
    monkeypatch.setenv("MLXQ_BACKEND", "metal")
    path = write(tmp_path / "m.gguf", "Q4_K")
    with metal.options(mode="fast"):
        with mlxq.load(path) as model:
            joined, held = logits_of(model.module, PROMPT[:3]), dict(nn.utils.tree_flatten(model.module.parameters()))
            nbytes = model.nbytes
        monkeypatch.setattr("mlxq.runtime.load.install_fused", lambda model: None)
        with mlxq.load(path) as model:
            apart, plain = logits_of(model.module, PROMPT[:3]), dict(nn.utils.tree_flatten(model.module.parameters()))
            assert model.nbytes == nbytes
    assert {k: v.shape for k, v in held.items()} == {k: v.shape for k, v in plain.items()}
    # The same sums; only the rounding of the function between gate and up differs.
    assert np.abs(joined - apart).max() <= 1e-5 * np.abs(apart).max()


def test_a_replaced_layer_is_called(gpu, tmp_path):
    with mlxq.load(write(tmp_path / "m.gguf", "Q4_K", tied=True)) as model:
        block = model.module.layers[0]
        x = mx.random.normal((1, 1, 256)).astype(mx.float16)
        before = block.mlp(x), block.self_attn(x)
        assert any("gated" in n for n in names(gpu))

        class Doubled(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def __call__(self, x):
                return 2 * self.inner(x)

        block.mlp.up_proj = Doubled(block.mlp.up_proj)
        block.self_attn.v_proj = Doubled(block.self_attn.v_proj)
        gpu.launches.clear()
        after = block.mlp(x), block.self_attn(x)
        assert not any("gated" in n for n in names(gpu))
        for old, new in zip(before, after, strict=True):
            assert mx.abs(new - 2 * old).max() <= 4e-3 * mx.abs(new).max()


def test_what_was_computed_for_the_others_is_given_to_the_same_x_only(gpu, tmp_path):
    with mlxq.load(write(tmp_path / "m.gguf", "Q4_K", tied=True)) as model:
        attention = model.module.layers[0].self_attn
        x, other = (mx.random.normal((1, 1, 256)).astype(mx.float16) for _ in range(2))
        alone = ops.block_matmul(other, attention.k_proj.weight, type_name="Q4_K", backend="metal")
        attention.q_proj(x)
        assert mx.array_equal(attention.k_proj(other), alone)
        # And everything is handed out and let go.
        attention.q_proj(other), attention.v_proj(other)
        assert attention.q_proj.group._held is None


def test_a_chip_whose_joined_kernels_are_wrong_computes_each_product_alone(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_check, "agrees", lambda case, run, instead: not isinstance(case, fused_cases.FusedCase))
    with mlxq.load(write(tmp_path / "m.gguf", "Q4_K", tied=True)) as model:
        model.module(mx.array([PROMPT[:1]]))
        if not gpu.real:
            assert {n.split("_q4_k")[0] for n in names(gpu)} == {"ggml_dequantize", "ggml_qmv"}


def test_on_the_cpu_nothing_is_joined(tmp_path):
    with mlxq.load(write(tmp_path / "m.gguf", "Q6_K")) as model:
        assert not any(isinstance(m, fused._Gated | fused._Member) for m in model.module.modules())


CASES = [
    ("silu", (Blocks("Q4_K", "F16", 144 * 3),) * 2, 1, False),
    ("", (Blocks("Q4_K", "F32", 144 * 8), Blocks("Q8_0", "F32", 34 * 64), Blocks("Q6_K", "F32", 210 * 8)), 4, False),
    ("gelu", (Affine(4, 64, "BF16", "BF16", 1280, 50),) * 2, 12, True),
    ("", (Affine(4, 64, "F16", "F16", 1280, 50), Affine(6, 32, "F16", "F16", 1280, 20)), 1, True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: str(fused_cases.case_of(*c)))
def test_the_check_of_a_kernel_when_it_is_first_used(metal, monkeypatch, case):
    monkeypatch.setattr(kernel_check, "_verdicts", {})
    monkeypatch.setattr(kernel_check, "launches_on_gpu", lambda: True)
    monkeypatch.setattr("mlxq.ops.dispatch.metal_available", lambda: True)
    with metal.options(mode="fast"):
        made = fused_cases.case_of(*case)
        assert kernel_check.agrees(made, fused_cases.outcomes, "")
        if not metal.real:
            assert [("gated" if case[0] else "each") in n for n in names(metal)] == [True]
    monkeypatch.setattr(kernel_check, "_verdicts", {})
    for function in ("block_gated", "block_each", "affine_gated", "affine_each"):
        original = getattr(metal_fused, function)
        monkeypatch.setattr(metal_fused, function, lambda *args, original=original: _spoiled(original(*args)))
    with metal.options(mode="fast"), pytest.warns(UserWarning, match="is not used on .*, each product"):
        assert not kernel_check.agrees(made, fused_cases.outcomes, "each product is computed alone")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernel_check.agrees(made, fused_cases.outcomes, "each product is computed alone")


def _spoiled(y):
    return [_spoiled(a) for a in y] if isinstance(y, list) else y * 1.1
