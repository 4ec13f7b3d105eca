"""Models of a GGUF file run by the Metal kernels on the file's own blocks: logits, tokens, bytes."""

from __future__ import annotations

from pathlib import Path

import covering
import mlx.core as mx
import numpy as np
import pytest
from block_models import PROMPT, assert_same, decoded, logits_of, matrices, write
from gguf_models import HEAD_DIM, add_byte_tokenizer, llama_weights, write_llama
from pretended_gpu import pretend_gpu

import mlxq
from mlxq.architectures.parameters import ParameterMap
from mlxq.checkpoint.source import open_checkpoint
from mlxq.errors import BackendError
from mlxq.ops import kernel_check
from mlxq.ops.dispatch import METAL_TYPES
from mlxq.runtime import layers
from mlxq.runtime.blocks import StreamedModel

RAW = {"chat_template": False, "stop_tokens": (), "temperature": 0.0}


@pytest.fixture
def gpu(metal, monkeypatch):
    """A GPU that takes our kernels."""
    pretend_gpu(monkeypatch, metal=True)
    with metal.options(mode="fast"):
        yield metal


@pytest.fixture
def float32(metal, monkeypatch):
    """Our kernels asked for where activations are float32."""
    monkeypatch.setenv("MLXQ_BACKEND", "metal")
    with metal.options(mode="fast"):
        yield metal


def expected_logits(path: Path, tokens: list[int]) -> np.ndarray:
    """By mlx-lm's own model with float32 weights that NumPy decoded."""
    with open_checkpoint(path) as checkpoint:
        return logits_of(decoded(ParameterMap(checkpoint)), tokens)


def relative_error(logits: mx.array, expected: np.ndarray) -> float:
    error = np.array(logits.astype(mx.float32))[0] - expected
    return float(np.linalg.norm(error) / np.linalg.norm(expected))


def block_layers(model: mlxq.Model) -> list[layers.BlockLayer]:
    return [m for m in model.module.modules() if isinstance(m, layers.BlockLayer)]


@pytest.mark.slow
@pytest.mark.parametrize("type_name", METAL_TYPES if covering.EVERY else METAL_TYPES[::2])
def test_logits_in_float32_are_those_of_decoded_weights(float32, tmp_path, type_name):
    path = write(tmp_path / "m.gguf", type_name, tied=type_name in ("Q6_K", "Q8_0"))
    with mlxq.load(path) as model, open_checkpoint(path) as checkpoint:
        assert {m.type_name for m in block_layers(model)} == {type_name}
        assert len(block_layers(model)) == len(matrices(ParameterMap(checkpoint)))
        # A prompt in tiles, a short one, one row.
        for n in (20, 5, 1):
            assert_same(logits_of(model.module, PROMPT[:n]), expected_logits(path, PROMPT[:n]))
    assert float32.real or float32.launches


@pytest.mark.slow
@pytest.mark.parametrize("type_name", METAL_TYPES if covering.EVERY else METAL_TYPES[1::2])
def test_on_a_gpu_blocks_are_held_as_they_are_stored(gpu, tmp_path, type_name):
    path = write(tmp_path / "m.gguf", type_name, tied=True)
    with mlxq.load(path) as model, open_checkpoint(path) as checkpoint:
        source = ParameterMap(checkpoint)
        assert len(block_layers(model)) == len(matrices(source))
        # Norms are float32 in the file.
        assert model.nbytes <= sum(info.nbytes for info in checkpoint.tensors.values()) <= path.stat().st_size
        logits = model.module(mx.array([PROMPT[:3]]))
        assert logits.dtype == mx.float16
        # Each of some 30 steps on the way to a logit rounds by 2^-12 on average: 30 ** 0.5 * 2^-12 = 1.3e-3, and what
        # the residual stream carries is rounded in every layer.
        assert relative_error(logits, expected_logits(path, PROMPT[:3])) <= 4e-3


@pytest.mark.slow
@pytest.mark.parametrize(("type_name", "where"), [("Q4_K", "gpu"), ("Q6_K", "float32"), ("Q4_0", "float32")])
def test_experts(request, tmp_path, type_name, where):
    path = write(tmp_path / "m.gguf", type_name, "qwen3moe")
    request.getfixturevalue(where)
    with mlxq.load(path) as model:
        assert isinstance(model.module.model.layers[0].mlp.switch_mlp.up_proj, layers.BlockSwitchLinear)
        # 40 rows of 2 experts each are sorted by expert, 20 are not.
        for tokens in (PROMPT * 2, PROMPT[:1]) if where == "float32" else (PROMPT[:5],):
            logits = model.module(mx.array([tokens]))
            bound = 2e-5 if where == "float32" else 4e-3
            assert relative_error(logits, expected_logits(path, tokens)) <= bound


def gemma(path: Path, type_name: str) -> Path:
    numbers = {"gemma__attention__key_length": HEAD_DIM}
    weights = llama_weights(vocab=261)
    return write_llama(path, weights, type_name, "gemma", configure=add_byte_tokenizer, **numbers)


def test_a_model_made_for_bfloat16_is_computed_in_it(gpu, tmp_path, monkeypatch):
    path = gemma(tmp_path / "m.gguf", "Q8_0")
    with mlxq.load(path) as model:
        logits = model.module(mx.array([[1, 2, 3]]))
        assert logits.dtype == mx.bfloat16
        assert model.module.model.embed_tokens(mx.array([1])).dtype == mx.bfloat16
        assert model.module.model.norm.weight.dtype == mx.bfloat16
        # As for float16, with 3 bits less.
        assert relative_error(logits, expected_logits(path, [1, 2, 3])) <= 8 * 4e-3
    # mlx computes with affine grids, whose float16 scales bfloat16 cannot hold.
    monkeypatch.setenv("MLXQ_BACKEND", "mlx")
    with mlxq.load(path) as model:
        assert not block_layers(model)
        assert model.module(mx.array([[1, 2, 3]])).dtype == mx.float32


def test_the_streamed_model_computes_with_our_kernels(gpu, tmp_path):
    with open_checkpoint(write(tmp_path / "m.gguf", "Q4_K", tied=True)) as checkpoint:
        source = ParameterMap(checkpoint)
        with StreamedModel(source) as model:
            n = model.run([PROMPT])
            logits = model.logits(np.arange(n))
        assert_same(logits, logits_of(decoded(source), PROMPT))
    assert gpu.real or gpu.launches


def test_types_without_kernels_are_decoded(gpu, tmp_path):
    path = write(tmp_path / "m.gguf", "IQ3_S", tied=True)
    with mlxq.load(path) as model:
        assert not block_layers(model)
        assert model.module.model.embed_tokens.weight.dtype == mx.float16
        assert relative_error(model.module(mx.array([PROMPT[:3]])), expected_logits(path, PROMPT[:3])) <= 4e-3
    assert not gpu.launches


@pytest.mark.slow
def test_tokens_on_a_gpu_are_those_of_whole_passes(gpu, tmp_path):
    path = write(tmp_path / "m.gguf", "Q5_K", tied=True)
    with mlxq.load(path) as model:
        result = model.generate("hi", max_tokens=3, **RAW)
        ids = model.encode("hi", chat_template=False)
        for token in result.token_ids:
            logits = model.module(mx.array([ids]))[0, -1]
            # Half floats: the chosen one is the best, or as good as rounding can tell.
            assert float(logits.max() - logits[token]) <= 4e-3 * float(mx.abs(logits).max())
            ids.append(token)
        assert len(result.token_ids) == 3


def test_metal_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXQ_BACKEND", "metal")
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    with pytest.raises(BackendError, match="MLXQ_BACKEND: the back end 'metal' needs an Apple GPU"):
        mlxq.load(tmp_path / "nothing.gguf")


@pytest.mark.parametrize("type_name", ["Q4_K", "Q6_K"])
def test_tokens_are_the_same_on_every_back_end(metal, tmp_path, monkeypatch, type_name):
    path = write(tmp_path / "m.gguf", type_name)
    said = {}
    for backend in ("numpy", "mlx", "metal"):
        monkeypatch.setenv("MLXQ_BACKEND", backend)
        with metal.options(mode="fast"), mlxq.load(path) as model:
            # mlx computes with affine grids of Q4_K, and with float16 for Q6_K; the others with blocks.
            said[backend] = model.generate("hello there, this is a prompt", max_tokens=6, **RAW).token_ids
    assert said["metal"] == said["mlx"] == said["numpy"]
    assert len(said["metal"]) == 6


@pytest.mark.slow
def test_a_real_file_says_the_same_on_every_back_end(metal, smollm2_gguf, monkeypatch):
    """SmolLM2, Q4_1 and Q8_0: a prompt in tiles, then rows."""
    said = {}
    for backend in ("numpy", "mlx", "metal"):
        monkeypatch.setenv("MLXQ_BACKEND", backend)
        with metal.options(mode="fast"), mlxq.load(smollm2_gguf) as model:
            assert bool(block_layers(model)) == (backend == "metal")
            said[backend] = model.generate("What is the capital of France?", max_tokens=4, temperature=0.0).token_ids
            if backend == "metal":
                # No more than the file, which has a tokenizer, too.
                assert model.nbytes <= smollm2_gguf.stat().st_size
    assert said["metal"] == said["mlx"] == said["numpy"]
    assert len(said["metal"]) == 4
    if not metal.real:
        used = {name.split("_float32")[0] for name, _ in metal.launches}
        tiles, rows = {"ggml_dequantize_q8_0", "ggml_qmm_q4_1"}, {"ggml_qmv_q4_1", "ggml_qmv_q8_0"}
        assert used == tiles | rows | {"ggml_qmv_each_3_q4_1_w_8", "ggml_qmv_gated_silu_q4_1_w_8"}


def test_a_chip_whose_kernel_is_wrong_gets_decoded_weights(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_check, "passes", lambda op, blocks, rows: False)
    path = write(tmp_path / "m.gguf", "Q6_K", tied=True)
    with mlxq.load(path) as model:
        assert not block_layers(model)
        assert relative_error(model.module(mx.array([PROMPT[:3]])), expected_logits(path, PROMPT[:3])) <= 4e-3
    assert not gpu.launches
