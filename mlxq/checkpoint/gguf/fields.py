"""The numbers of each GGUF architecture and their names in `config.json`: one table, read in both directions.

Sources: `gguf.constants.Keys` and the architectures' `set_gguf_parameters` in llama.cpp's `conversion/` for the keys;
what llama.cpp's `load_arch_hparams` assumes where a key is absent; the `ModelArgs` of `mlx_lm.models` for what mlx-lm
assumes where `config.json` is silent. Head sizes and rotary scaling, one thing under several keys, are in
`config.py` and `writers/gguf/hyperparameters.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Field:
    """One number under its two names.

    Attributes:
        key: in the metadata, after `<architecture>.`.
        name: in `config.json`.
        kind: of the GGUF value. An integer must be positive, and a float as well where `positive`.
        default: what a silent `config.json` means: a number, or the name of another entry, whose value is taken.
        absent: the same for a file without the key. Where both are None, the number must be given.
        optional: absent on one side means absent on the other.
    """

    key: str
    name: str
    kind: Literal["uint32", "float32"] = "uint32"
    default: Any = None
    absent: Any = None
    positive: bool = True
    optional: bool = False


def _rms(default: float | None = None) -> Field:
    return Field("attention.layer_norm_rms_epsilon", "rms_norm_eps", "float32", default, 1e-6)


def _base(default: float, absent: float = 10000.0) -> Field:
    return Field("rope.freq_base", "rope_theta", "float32", default, absent)


def _sizes(context: int | None = None, layers: str = "num_hidden_layers") -> tuple[Field, ...]:
    return (
        Field("block_count", layers),
        Field("context_length", "max_position_embeddings", default=context),
        Field("embedding_length", "hidden_size"),
        Field("feed_forward_length", "intermediate_size"),
        Field("attention.head_count", "num_attention_heads"),
        Field(
            "attention.head_count_kv",
            "num_key_value_heads",
            default="num_attention_heads",
            absent="num_attention_heads",
        ),
    )


def _experts(count: str) -> tuple[Field, ...]:
    return Field("expert_count", count), Field("expert_used_count", "num_experts_per_tok")


def _scale(key: str, name: str, **more: Any) -> Field:
    return Field(key, name, "float32", **more)


def _layer_norm(name: str) -> Field:
    return _scale("attention.layer_norm_epsilon", name, default=1e-5)


_LOGIT_SCALE = _scale("logit_scale", "logit_scale", default=0.0625)

#: `model_type` -> its numbers.
FIELDS: dict[str, tuple[Field, ...]] = {
    "llama": (*_sizes(2048), _rms(), _base(10000.0)),
    "mixtral": (*_sizes(131072), _rms(1e-5), _base(1e6), *_experts("num_local_experts")),
    "qwen2": (*_sizes(32768), _rms(), _base(1e6)),
    "qwen3": (*_sizes(), _rms(), _base(1e6)),
    "qwen3_moe": (
        *_sizes(),
        _rms(),
        _base(1e6),
        *_experts("num_experts"),
        Field("expert_feed_forward_length", "moe_intermediate_size"),
    ),
    "gemma": (*_sizes(8192), _rms(), _base(10000.0)),
    "gemma2": (
        *_sizes(8192),
        _rms(),
        _base(10000.0),
        _scale("attn_logit_softcapping", "attn_logit_softcapping", default=50.0, absent=50.0),
        _scale("final_logit_softcapping", "final_logit_softcapping", default=30.0, absent=30.0),
        Field("attention.sliding_window", "sliding_window", default=4096, absent=4096),
    ),
    "gemma3_text": (
        *_sizes(32768),
        _rms(1e-6),
        _base(1e6, absent=1e6),
        _scale("rope.freq_base_swa", "rope_local_base_freq", default=10000.0, absent=10000.0),
        Field("attention.sliding_window", "sliding_window", default=512),
    ),
    "phi3": (
        *_sizes(131072),
        _rms(),
        _base(10000.0),
        Field(
            "rope.scaling.original_context_length",
            "original_max_position_embeddings",
            default=4096,
            absent="max_position_embeddings",
        ),
        Field("attention.sliding_window", "sliding_window", optional=True),
    ),
    "smollm3": (*_sizes(), _rms(), _base(10000.0)),
    "olmo2": (*_sizes(), _rms(), _base(10000.0)),
    "granite": (
        *_sizes(),
        _rms(),
        _base(10000.0),
        _scale("attention.scale", "attention_multiplier"),
        _scale("embedding_scale", "embedding_multiplier"),
        _scale("residual_scale", "residual_multiplier"),
        _scale("logit_scale", "logits_scaling"),
    ),
    "starcoder2": (
        *_sizes(4096),
        _layer_norm("norm_epsilon"),
        _base(100000.0),
    ),
    "olmoe": (*_sizes(4096), _rms(), _base(10000.0), *_experts("num_experts")),
    "cohere": (*_sizes(8192), _layer_norm("layer_norm_eps"), _base(8e6), _LOGIT_SCALE),
    "cohere2": (
        *_sizes(8192),
        _layer_norm("layer_norm_eps"),
        _base(50000.0),
        _LOGIT_SCALE,
        Field("attention.sliding_window", "sliding_window", default=4096),
    ),
    "glm4": (*_sizes(32768), _rms(), _base(10000.0)),
    "exaone": (
        *_sizes(2048, layers="num_layers"),
        _scale("attention.layer_norm_rms_epsilon", "layer_norm_epsilon"),
        _base(10000.0),
    ),
    "gpt2": (
        Field("block_count", "n_layer"),
        Field("context_length", "n_positions"),
        Field("embedding_length", "n_embd"),
        Field("attention.head_count", "n_head"),
        _scale("attention.layer_norm_epsilon", "layer_norm_epsilon"),
    ),
}

#: `model_type` -> settings that llama.cpp has built in: other values cannot be written, and files mean these. What a
#: silent `config.json` means is the same.
BUILT_IN: dict[str, dict[str, Any]] = {
    # mlx-lm takes the softmax over the chosen experts alone, which normalizes.
    "qwen3_moe": {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
    "smollm3": {"no_rope_layer_interval": 4},
    "olmoe": {"norm_topk_prob": False},
    "cohere": {"layer_norm_bias": False, "use_qk_norm": False},
    "cohere2": {"layer_norm_bias": False, "sliding_window_pattern": 4},
}
#: Model types that may rotate a part of each head.
PARTIAL = ("phi3", "glm4")
#: The activation that Hugging Face's classes are told to use; mlx-lm and llama.cpp know it from the architecture.
ACTIVATIONS = dict.fromkeys(("gemma", "gemma2", "gemma3_text", "starcoder2"), "gelu_pytorch_tanh")
#: Setting that gives linear layers a bias -> the GGUF name of one that then has it.
BIASED = {"attention_bias": "attn_q", "mlp_bias": "ffn_gate"}
#: Settings of yarn in `config.json` -> their keys and the values that llama.cpp has built in for these architectures.
YARN: dict[str, tuple[str | None, float]] = {
    "mscale": (None, 1.0),
    "mscale_all_dim": (None, 0.0),
    "beta_fast": ("rope.scaling.yarn_beta_fast", 32.0),
    "beta_slow": ("rope.scaling.yarn_beta_slow", 1.0),
}


def config_name(model_type: str, key: str) -> str | None:
    """The name in `config.json` of the number under `<architecture>.<key>`, or None where the model has none."""
    return next((field.name for field in FIELDS[model_type] if field.key == key), None)
