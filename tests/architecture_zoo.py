"""Small random models of many architectures, in the names that a checkpoint has, for what runs block by block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxq.architectures.registry import build_model

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 101,
    "rms_norm_eps": 1e-5,
    "norm_epsilon": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
TIED = {"tie_word_embeddings": True}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_tied": {"model_type": "llama", **TIED},
    "llama_sliding": {
        "model_type": "llama",
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 8,
    },
    "qwen2": TIED,
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 16.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 2},
    "phi3": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "granite": {
        "logits_scaling": 4.0,
        "attention_multiplier": 0.25,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "starcoder2": TIED,
    "gpt2": {
        "n_ctx": 64,
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 3,
        "n_positions": 64,
        "layer_norm_epsilon": 1e-5,
    },
    "cohere2": {"layer_norm_eps": 1e-5, "sliding_window": 8, "logit_scale": 0.25, "layer_norm_bias": False},
    "gemma3": {
        "text_config": {
            **BASE,
            "num_hidden_layers": 7,
            "model_type": "gemma3_text",
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
        }
    },
}


def save(directory: Path, config: dict[str, Any], bits: int | None = None) -> Path:
    """Random weights, in the names that a Hugging Face checkpoint has, or quantized in the model's own."""
    mx.random.seed(3)
    directory.mkdir()
    model = build_model(config)
    # Norms and biases start as ones and zeros: make every parameter matter.
    noise = [(n, a + 0.1 * mx.random.normal(a.shape)) for n, a in tree_flatten(model.parameters())]
    model.load_weights(noise)
    if bits is not None:
        nn.quantize(model, group_size=32, bits=bits)
        config = {**config, "quantization": {"group_size": 32, "bits": bits}}
    arrays = dict(tree_flatten(model.parameters()))
    if bits is None:
        arrays = _hugging_face_names(config["model_type"], arrays)
    mx.save_safetensors(str(directory / "model.safetensors"), arrays, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _hugging_face_names(model_type: str, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    if model_type == "gpt2":
        stored = {n.removeprefix("model."): a for n, a in arrays.items()}
        linear = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
        return {n: mx.contiguous(a.T) if n.endswith(linear) else a for n, a in stored.items()}
    if model_type == "mixtral":
        letters = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
        out = {}
        for name, a in arrays.items():
            if "switch_mlp" not in name:
                out[name] = a
                continue
            prefix, _, rest = name.partition("switch_mlp.")
            for e in range(a.shape[0]):
                out[f"{prefix}experts.{e}.{letters[rest.split('.')[0]]}.weight"] = a[e]
        return out
    return arrays


def config_of(name: str) -> dict[str, Any]:
    return {**BASE, "model_type": name, **CONFIGS[name]}
