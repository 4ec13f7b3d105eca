"""Every architecture end to end: a random model written as GGUF predicts in llama.cpp what it predicts in mlx-lm."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from covering import quick_first
from gguf_zoo import VOCAB, ZOO, save, write_gguf
from llamacpp import LlamaCpp

from mlxq.architectures.arguments import effective
from mlxq.architectures.parameters import ParameterMap
from mlxq.checkpoint.gguf.fields import ACTIVATIONS
from mlxq.checkpoint.gguf.names import ALIASES, ARCHITECTURES
from mlxq.checkpoint.source import open_checkpoint
from mlxq.runtime import layers, weights

#: Longer than the sliding windows of the models that have one.
PROMPT = [72, 101, 3, 108, 111, 7, 40, 41, 42, 9, 200, 17] * 3


def predict(path: Path) -> np.ndarray:
    """Logits of the next token by our runtime, less their mean: llama.cpp tells them up to a constant."""
    with open_checkpoint(path) as checkpoint:
        source = ParameterMap(checkpoint)
        layers.install_layers(source.model, source.tensors)
        weights.load_parameters(source.model, "", source, compute_dtype=mx.float32)
    logits = np.array(source.model(mx.array([PROMPT]))[0, -1])
    return logits - logits.mean()


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def llama_cpp(path: Path) -> np.ndarray:
    logprobs = LlamaCpp(path).logprobs(PROMPT, VOCAB)
    assert len(logprobs) == VOCAB
    logits = np.array([logprobs[i] for i in range(VOCAB)])
    return logits - logits.mean()


@pytest.mark.parametrize("name", quick_first(ZOO, 2))
def test_next_token(tmp_path, name):
    directory = save(tmp_path / "model", ZOO[name])
    path = write_gguf(directory, tmp_path / "m.gguf")
    expected = predict(directory)
    assert np.std(expected) > 0.1
    # float32 on both sides, sums of at most 300 terms (sqrt(300) roundings of 6e-8) through 7 layers: measured 1e-6.
    # ggml looks GELU up in a table of float16 (relative error 5e-4): measured 3e-4.
    tolerance = 1e-3 if ZOO[name]["model_type"] in ("gpt2", *ACTIVATIONS) else 1e-5
    assert relative(llama_cpp(path), expected) < tolerance
    # Back again the numbers are the same ones. Gemma's norms lose bits to the 1 that is added, as they do in use.
    assert relative(predict(path), expected) < 1e-6
    with open_checkpoint(directory) as source, open_checkpoint(path) as result:
        assert effective(result.config) == effective(source.config)
        shapes = [{n: t.shape for n, t in ParameterMap(c).tensors.items()} for c in (source, result)]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "llama biases", "gpt2"])
def test_quantized_files_run_as_their_values_do(tmp_path, name):
    """Codes of stacked experts, permuted rows and fused matrices stand where their decoded values stand."""
    config = ZOO[name] | ({"intermediate_size": 64, "moe_intermediate_size": 64} if "n_embd" not in ZOO[name] else {})
    path = write_gguf(save(tmp_path / "model", config), tmp_path / "m.gguf", type_name="Q4_1")
    with open_checkpoint(path) as checkpoint:
        source = ParameterMap(checkpoint)
        stacks = [t for n, t in source.tensors.items() if "switch_mlp" in n]
        assert all(t.spec and t.module == "switch" and len(t.shape) == 3 for t in stacks)
        assert bool(stacks) == ("num_experts_per_tok" in config)
        model = source.new_model()
        model.load_weights([(n, mx.array(source.read(n).astype(np.float32))) for n in source.tensors])
    logits = np.array(model(mx.array([PROMPT]))[0, -1])
    # The same numbers in float32, multiplied block by block or as a whole.
    assert relative(predict(path), logits - logits.mean()) < 1e-5


def test_every_architecture_is_proven():
    assert {config["model_type"] for config in ZOO.values()} == {*ARCHITECTURES, *ALIASES}


#: case of the zoo, and a key that the model depends on with a wrong value for it.
SPOILED = [
    ("llama", "rope.freq_base", 5000.0),
    ("llama", "attention.layer_norm_rms_epsilon", 0.1),
    ("llama linear", "rope.scaling.factor", 2.0),
    ("llama yarn", "rope.scaling.factor", 2.0),
    ("llama yarn", "rope.scaling.original_context_length", 16),
    ("mixtral", "expert_used_count", 3),
    ("qwen3_moe", "expert_used_count", 2),
    ("gemma2", "attn_logit_softcapping", 2.0),
    ("gemma2", "final_logit_softcapping", 5.0),
    ("gemma3_text", "attention.sliding_window", 16),
    ("gemma3_text", "rope.freq_base", 1e4),
    ("gemma3_text", "rope.freq_base_swa", 1e4),
    ("gemma3_text", "rope.scaling.factor", 1.0),
    ("gemma3_text other pattern", "attention.sliding_window_pattern", 6),
    ("phi3 partial", "rope.dimension_count", 16),
    ("phi3 longrope", "rope.scaling.attn_factor", 1.0),
    ("granite", "attention.scale", 0.5),
    ("granite", "embedding_scale", 1.0),
    ("granite", "residual_scale", 0.5),
    ("granite", "logit_scale", 1.0),
    ("starcoder2", "attention.layer_norm_epsilon", 0.1),
    ("gpt2", "attention.layer_norm_epsilon", 0.1),
]


@pytest.mark.parametrize(("name", "key", "value"), SPOILED)
def test_a_wrong_value_would_be_seen(tmp_path, name, key, value):
    """llama.cpp reads the key, and the tiny model is one that depends on it."""

    def change(keys, ropes):
        full = next(k for k in keys if k.partition(".")[2] == key)
        keys[full] = (keys[full][0], value)

    directory = save(tmp_path / "model", ZOO[name])
    assert relative(llama_cpp(write_gguf(directory, tmp_path / "m.gguf", change)), predict(directory)) > 5e-3


@pytest.mark.parametrize("name", ["llama3", "phi3 longrope"])
def test_missing_rotary_factors_would_be_seen(tmp_path, name):
    directory = save(tmp_path / "model", ZOO[name])
    path = write_gguf(directory, tmp_path / "m.gguf", lambda keys, ropes: ropes.clear())
    assert relative(llama_cpp(path), predict(directory)) > 5e-3


@pytest.mark.parametrize("name", ["llama", "mixtral", "granite", "smollm3", "llama biases"])
def test_rows_in_the_wrong_order_would_be_seen(tmp_path, monkeypatch, name):
    directory = save(tmp_path / "model", ZOO[name])
    monkeypatch.setattr("mlxq.checkpoint.gguf.heads.permuted_rows", lambda start, stop, head_dim: np.arange(stop))
    assert relative(llama_cpp(write_gguf(directory, tmp_path / "m.gguf")), predict(directory)) > 5e-3
