"""A tiny random model of each architecture that has a GGUF form, and that model as a GGUF file of float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

VOCAB = 300
BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
#: Head sizes that are not hidden size over heads, 16.
WIDE = {"head_dim": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
#: Eight pairs are rotated of 16 numbers.
LONGROPE = {
    "type": "longrope",
    "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 11.0, 14.0],
    "short_factor": [1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35],
}
GRANITE = {
    "attention_bias": False,
    "mlp_bias": False,
    "attention_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 2.0,
}
QWEN3_MOE = {
    **WIDE,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
}
TIED = {"tie_word_embeddings": True}


def _model(model_type: str, *parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    config = BASE | {"model_type": model_type}
    for part in parts:
        config |= part
    return config | more


#: name -> config.json.
ZOO: dict[str, dict[str, Any]] = {
    "llama": _model("llama"),
    "llama tied": _model("llama", TIED),
    "llama wide heads": _model("llama", WIDE),
    "llama biases": _model("llama", attention_bias=True, mlp_bias=True),
    "llama linear": _model("llama", rope_scaling={"type": "linear", "factor": 4.0}),
    "llama yarn": _model("llama", rope_scaling=YARN),
    "llama yarn betas": _model("llama", rope_scaling=YARN | {"beta_fast": 32, "beta_slow": 1.0}),
    "llama3": _model("llama", WIDE, TIED, rope_scaling=LLAMA3, rope_theta=500000.0),
    "mistral": _model("mistral", sliding_window=None),
    "mixtral": _model("mixtral", num_local_experts=8, num_experts_per_tok=2, rope_theta=1e6),
    "mixtral one expert": _model("mixtral", num_local_experts=4, num_experts_per_tok=1),
    "qwen2": _model("qwen2"),
    "qwen2 tied": _model("qwen2", TIED),
    "qwen3": _model("qwen3", WIDE),
    "qwen3 yarn": _model("qwen3", WIDE, TIED, rope_scaling=YARN),
    "qwen3_moe": _model("qwen3_moe", QWEN3_MOE),
    "qwen3_moe tied": _model("qwen3_moe", QWEN3_MOE, TIED),
    "gemma": _model("gemma", WIDE, TIED),
    "gemma2": _model(
        "gemma2",
        WIDE,
        TIED,
        attn_logit_softcapping=20.0,
        final_logit_softcapping=15.0,
        query_pre_attn_scalar=32,
        sliding_window=64,
    ),
    # Seven layers are one more than a period of sliding and full attention; the window is shorter than the prompt.
    "gemma3_text": _model(
        "gemma3_text",
        WIDE,
        TIED,
        num_hidden_layers=7,
        query_pre_attn_scalar=32,
        sliding_window=8,
        sliding_window_pattern=6,
        rope_theta=1e6,
        rope_local_base_freq=5000.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    ),
    "gemma3_text other pattern": _model(
        "gemma3_text", WIDE, TIED, query_pre_attn_scalar=32, sliding_window=8, sliding_window_pattern=2
    ),
    "gemma3_text untied": _model("gemma3_text", WIDE, query_pre_attn_scalar=32, sliding_window=8, num_hidden_layers=6),
    "phi3": _model("phi3", original_max_position_embeddings=256),
    "phi3 partial": _model("phi3", partial_rotary_factor=0.5, original_max_position_embeddings=256, sliding_window=200),
    # llama.cpp takes the long factors where the context is longer than the original one, as mlx-lm always does.
    "phi3 longrope": _model("phi3", rope_scaling=LONGROPE, original_max_position_embeddings=64),
    "phi3 tied": _model("phi3", TIED, original_max_position_embeddings=256),
    "smollm3": _model("smollm3", TIED, num_hidden_layers=5, no_rope_layers=[1, 1, 1, 0, 1], rope_theta=5e6),
    "smollm3 untied wide heads": _model("smollm3", WIDE, num_hidden_layers=4),
    "olmo2": _model("olmo2"),
    "granite": _model("granite", GRANITE),
    "granite tied biases": _model("granite", GRANITE, TIED, attention_bias=True, mlp_bias=True),
    "starcoder2": _model("starcoder2", norm_epsilon=1e-4),
    "starcoder2 tied": _model("starcoder2", TIED),
    "olmoe": _model("olmoe", num_key_value_heads=4, num_experts=8, num_experts_per_tok=3, norm_topk_prob=False),
    "cohere": _model("cohere", layer_norm_eps=1e-5, logit_scale=0.5, use_qk_norm=False),
    # Five layers are one more than a period of sliding and full attention, which is not rotated.
    "cohere2": _model("cohere2", num_hidden_layers=5, head_dim=16, logit_scale=0.5, sliding_window=8),
    "glm4": _model("glm4", head_dim=16, attention_bias=False, partial_rotary_factor=0.5),
    "glm4 biases": _model("glm4", head_dim=16, attention_bias=True, partial_rotary_factor=1.0),
    "exaone": _model("exaone", num_layers=3, layer_norm_epsilon=1e-5),
    "exaone tied llama3": _model("exaone", TIED, num_layers=3, layer_norm_epsilon=1e-5, rope_scaling=LLAMA3),
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 3,
        "n_positions": 256,
        "n_ctx": 256,
        "vocab_size": VOCAB,
        "layer_norm_epsilon": 1e-5,
    },
}


def save(directory: Path, config: dict[str, Any], seed: int = 7) -> Path:
    """The model as a directory of safetensors, its parameters under mlx-lm's names.

    Norms are near one, biases wide, and matrices wide enough for attention and routing to be far from uniform.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlxq.architectures.registry import build_model

    rng = np.random.default_rng(seed)
    model = build_model(config)
    if config.get("tie_word_embeddings") and "lm_head" in model:
        model.pop("lm_head")
    arrays = {}
    for name, a in tree_flatten(model.parameters()):
        module, kind = name.split(".")[-2:]
        centre, spread = 0.0, 0.5 if "embed" in module or module == "wte" else 0.15
        if kind == "bias":
            spread = 0.5
        elif len(a.shape) == 1:
            centre, spread = 0.0 if config["model_type"].startswith("gemma") else 1.0, 0.3
        arrays[name] = mx.array(rng.normal(centre, spread, a.shape).astype(np.float32))
    directory.mkdir(parents=True)
    mx.save_safetensors(str(directory / "model.safetensors"), arrays, metadata={"format": "mlx"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def add_words(writer: Any, n: int = VOCAB) -> int:
    """Tokens that are whole ASCII words: llama.cpp's server holds back parts of characters."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["w", "0", "w0", *(f"word{i}" for i in range(n - 3))])
    writer.add_token_types([1] * n)
    writer.add_token_merges(["w 0"])
    writer.add_bos_token_id(3)
    writer.add_eos_token_id(4)
    return n


def write_gguf(
    directory: Path,
    path: Path,
    change: Callable[[dict[str, Any], dict[str, Any]], None] | None = None,
    type_name: str = "F32",
) -> Path:
    """`directory` as a GGUF file, by the tables under test and the `gguf` package's writer and quantizers.

    `change` may spoil the keys and the rotary tensors before they are written. Matrices are stored as `type_name`.
    """
    import gguf

    from mlxq.architectures.parameters import ParameterMap
    from mlxq.checkpoint.gguf.heads import permuted_rows
    from mlxq.checkpoint.gguf.names import architecture_for, to_gguf
    from mlxq.checkpoint.source import open_checkpoint
    from mlxq.plan.gguf_mixes import stays_float
    from mlxq.writers.gguf.hyperparameters import hyperparameters, rope_tensors

    with open_checkpoint(directory) as checkpoint:
        config, source = checkpoint.config, ParameterMap(checkpoint)
        arch_name, arch = architecture_for(config)
        writer = gguf.GGUFWriter(str(path), arch_name)
        keys, ropes = hyperparameters(config, arch_name, arch), rope_tensors(config)
        if change is not None:
            change(keys, ropes)
        for key, (kind, value) in keys.items():
            writer.add_key_value(key, value, gguf.GGUFValueType[kind.upper()])
        add_words(writer)
        for name, values in ropes.items():
            writer.add_tensor(name, values)
        for name in source.tensors:
            values, mapped = source.read(name), to_gguf(arch, name)
            assert mapped is not None, name
            if mapped.permuted:
                head_dim = len(values) // config[mapped.heads]
                values = values[permuted_rows(0, len(values), head_dim)]
            kind = gguf.GGMLQuantizationType["F32" if stays_float(mapped.name, values.shape) else type_name]
            data = gguf.quants.quantize(values + np.float32(mapped.norm_offset), kind)
            writer.add_tensor(mapped.name, data, raw_shape=data.shape, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path
