"""The code that runs on a GPU, computed on the CPU: dtypes as stored, mlx's own layers, one token ahead."""

from __future__ import annotations

import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from random_models import ZOO, save_random
from tiny import make_model, write_tokenizer

import mlxq
from mlxq import ops
from mlxq.architectures.parameters import ParameterMap
from mlxq.checkpoint.source import open_checkpoint
from mlxq.runtime import decoding, weights

RAW = {"chat_template": False, "stop_tokens": ()}


@pytest.fixture(autouse=True)
def _on_accelerator(accelerator, monkeypatch):
    # Layers are mlx's own there: a product that went through `ops` all the same would fail.
    for name in ("matmul", "quantized_matmul", "gather_matmul", "gather_quantized_matmul"):
        monkeypatch.setattr(ops, name, None)


def generates(path: Path) -> mlxq.GenerationResult:
    """Load, generate and stream; both say the same."""
    with mlxq.load(path) as model:
        result = model.generate("hello there", max_tokens=6, **RAW)
        assert result.generation_tokens == 6
        pieces = list(model.stream("hello there", max_tokens=6, **RAW))
        assert pieces[-1].result.token_ids == result.token_ids
        assert "".join(p.text for p in pieces) == result.text
        logits = model.module(mx.array([model.encode("hello there", chat_template=False)]))
        assert bool(mx.isfinite(logits).all())
    return result


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_float_checkpoints(tmp_path, dtype):
    path = make_model(tmp_path / "m", dtype=dtype)
    generates(path)
    with mlxq.load(path) as model:
        stored = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}[dtype]
        assert model.module.lm_head.weight.dtype == stored
        assert model.module(mx.array([[1, 2]])).dtype == stored


@pytest.mark.parametrize("name", ["llama_4bit", "gemma3_sliding", "qwen3_moe_4bit", "deepseek_v3_4bit"])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=["bfloat16", "float16"])
def test_mlx_directories(tmp_path, name, dtype):
    path = save_random(tmp_path / "m", *ZOO[name], dtype=dtype)
    write_tokenizer(path)
    generates(path)
    with mlxq.load(path) as model:
        assert model.module(mx.array([[1, 2]])).dtype == dtype


def test_it_is_what_the_cpu_computes(tmp_path):
    # Float32 weights: the same tokens as the whole model without a cache gives.
    path = make_model(tmp_path / "m", dtype="F32")
    result = generates(path)
    with mlxq.load(path) as model:
        ids = model.encode("hello there", chat_template=False)
        for token in result.token_ids:
            assert int(mx.argmax(model.module(mx.array([ids]))[0, -1]).item()) == token
            ids.append(token)


@pytest.fixture
def write_gguf(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "checkpoint")
    import gguf_models

    def write(arch: str, type_name: str) -> Path:
        tensors = gguf_models.llama_weights(vocab=261)
        path = tmp_path / f"{arch}-{type_name}.gguf"
        numbers = {"gemma__attention__key_length": gguf_models.HEAD_DIM} if arch == "gemma" else {}
        return gguf_models.write_llama(
            path, tensors, type_name, arch, configure=gguf_models.add_byte_tokenizer, **numbers
        )

    return write


@pytest.mark.parametrize(
    ("arch", "type_name", "dtype"),
    [
        ("llama", "Q8_0", mx.float16),
        ("llama", "Q4_1", mx.float16),
        ("llama", "F16", mx.float16),
        ("llama", "BF16", mx.bfloat16),
        ("llama", "F32", mx.float32),
        ("gemma", "Q8_0", mx.float32),
        ("gemma", "F16", mx.bfloat16),
        ("gemma", "BF16", mx.bfloat16),
    ],
)
def test_gguf(write_gguf, arch, type_name, dtype):
    path = write_gguf(arch, type_name)
    generates(path)
    with open_checkpoint(path) as checkpoint:
        assert weights.default_compute_dtype(ParameterMap(checkpoint)) == dtype
    with mlxq.load(path) as model:
        assert model.module(mx.array([[1, 2]])).dtype == dtype
        assert model.module.model.norm.weight.dtype == dtype


def test_scales_of_a_gguf_stay_exact_where_the_model_wants_bfloat16(write_gguf):
    path = write_gguf("gemma", "Q8_0")
    with open_checkpoint(path) as checkpoint:
        name = "model.layers.0.mlp.up_proj.weight"
        stored = checkpoint.read_quantized(name).scales.astype(np.float32)
    with mlxq.load(path) as model:
        assert np.array_equal(np.array(model.module.model.layers[0].mlp.up_proj.scales), stored)


def test_freed_memory_is_given_back(tmp_path, monkeypatch):
    path = make_model(tmp_path / "m")
    calls = []
    monkeypatch.setattr(mx, "clear_cache", lambda: calls.append(1))
    monkeypatch.setattr(decoding, "_CHUNK", {"cpu": 4, "gpu": 4})
    monkeypatch.setattr(decoding, "_RELEASE_EVERY", 5)
    model = mlxq.load(path)
    assert len(calls) == 1
    model.generate("0123456789", max_tokens=12, **RAW)
    # Chunks of 4, 4 and 1 token before the last, then after 5 and 10 tokens.
    assert len(calls) == 1 + 3 + 2
    model.close()
    assert len(calls) == 1 + 3 + 2 + 1


def test_weights_are_wired_while_a_text_is_generated_and_no_longer(tmp_path, monkeypatch):
    limits, held = [], {"limit": 7}

    def set_wired_limit(limit):
        limits.append(limit)
        before, held["limit"] = held["limit"], limit
        return before

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 1000})
    monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
    with mlxq.load(make_model(tmp_path / "m")) as model:
        assert limits == []
        model.generate("hello", max_tokens=3, **RAW)
        deadline = time.monotonic() + 5
        while limits != [1000, 7] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert limits == [1000, 7]
        monkeypatch.setattr(mx, "device_info", lambda: {})
        model.generate("hello", max_tokens=3, **RAW)
        assert limits == [1000, 7]

        def refuse(limit):
            raise ValueError("larger than the maximum")

        monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 1000})
        monkeypatch.setattr(mx, "set_wired_limit", refuse)
        assert model.generate("hello", max_tokens=3, **RAW).generation_tokens == 3
