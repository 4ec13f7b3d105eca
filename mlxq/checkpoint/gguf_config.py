"""`config.json` and `generation_config.json` from a GGUF file's metadata, in the names Hugging Face and mlx-lm use.

Sources: the keys in `gguf.constants.Keys`; what each converter writes (llama.cpp `convert_hf_to_gguf.py`) and what the
graph builders of llama.cpp assume where a key is absent.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mlxq.checkpoint.gguf_metadata import Metadata
from mlxq.checkpoint.gguf_names import GgufArchitecture
from mlxq.errors import CheckpointError

#: Texts that end a turn or a text, beyond the ids the metadata names (llama.cpp `src/llama-vocab.cpp`, load).
END_TEXTS = frozenset(
    {
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<｜end▁of▁sentence｜>",
    }
)
CONTROL = 3
#: Context lengths that models were trained at before their rotary frequencies were rescaled.
_TRAINED_CONTEXTS = (8192, 4096, 2048, 16384, 32768, 65536, 131072)

#: Reads one of the architecture's rotary tensors as float32 by its GGUF name, or None when the file has none.
ReadRope = Callable[[str], "np.ndarray | None"]


def build_config(
    metadata: Metadata, arch: GgufArchitecture, shapes: dict[str, tuple[int, ...]], tied: bool, read_rope: ReadRope
) -> dict[str, Any]:
    """The model's `config.json`.

    Args:
        metadata: of the file.
        arch: its mapping.
        shapes: Hugging Face tensor name -> shape.
        tied: the output shares the embedding.
        read_rope: gives the values of a rotary tensor.

    Raises:
        CheckpointError: a key is missing or has an impossible value, or the rotary scaling cannot be expressed.
    """
    if metadata.has("expert_count"):
        raise CheckpointError(f"{metadata.path}: mixtures of experts in GGUF are not supported yet")
    embedding = shapes.get("model.embed_tokens.weight")
    if embedding is None or len(embedding) != 2:
        raise CheckpointError(f"{metadata.path}: the tensor token_embd.weight is missing or has no rows")
    hidden, heads = metadata.integer("embedding_length"), metadata.integer("attention.head_count")
    head_dim = metadata.integer("attention.key_length", max(hidden // heads, 1))
    if metadata.integer("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(f"{metadata.path}: attention.key_length and attention.value_length differ")
    n_layers = len({name.split(".")[2] for name in shapes if name.startswith("model.layers.")})
    if metadata.integer("block_count") != n_layers:
        raise CheckpointError(
            f"{metadata.path}: {metadata.arch}.block_count is {metadata.integer('block_count')}, but the file has "
            f"tensors of {n_layers} blocks"
        )
    config: dict[str, Any] = {
        "architectures": [arch.model_class],
        "model_type": arch.model_type,
        "vocab_size": embedding[0],
        "hidden_size": hidden,
        "intermediate_size": metadata.integer("feed_forward_length"),
        "num_hidden_layers": n_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.integer("context_length"),
        "rms_norm_eps": metadata.positive("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": metadata.positive("rope.freq_base", 10000.0),
        "tie_word_embeddings": tied,
        "hidden_act": "gelu_pytorch_tanh" if arch.model_type.startswith("gemma") else "silu",
    }
    _RULES.get(metadata.arch, _no_rules)(metadata, config, shapes)
    scaling = _rope_scaling(metadata, config, read_rope)
    if scaling is not None:
        config["rope_scaling"] = scaling
    for name in ("bos", "eos"):
        config[f"{name}_token_id"] = metadata.token_id(name, embedding[0])
    pad = metadata.token_id("padding", embedding[0])
    if pad is not None:
        config["pad_token_id"] = pad
    return config


def build_generation_config(metadata: Metadata, vocab_size: int) -> dict[str, Any]:
    """`generation_config.json`: begin, end and padding ids.

    The ends are the metadata's end-of-text, end-of-turn and end-of-message ids and every control token whose text is
    one of `END_TEXTS`; one id, or a list when there are several, the metadata's own first.
    """
    ends = [metadata.token_id(name, vocab_size) for name in ("eos", "eot", "eom")]
    tokens = metadata.values.get("tokenizer.ggml.tokens")
    types = metadata.values.get("tokenizer.ggml.token_type")
    if isinstance(tokens, list) and isinstance(types, np.ndarray) and len(types) == len(tokens):
        ends += [int(i) for i in np.flatnonzero(types == CONTROL) if tokens[i] in END_TEXTS]
    unique = list(dict.fromkeys(i for i in ends if i is not None))
    config: dict[str, Any] = {}
    bos, pad = metadata.token_id("bos", vocab_size), metadata.token_id("padding", vocab_size)
    if bos is not None:
        config["bos_token_id"] = bos
    if unique:
        config["eos_token_id"] = unique[0] if len(unique) == 1 else unique
    if pad is not None:
        config["pad_token_id"] = pad
    return config


def _no_rules(metadata: Metadata, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    pass


def _llama_rules(metadata: Metadata, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in shapes
    config["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in shapes


def _gemma2_rules(metadata: Metadata, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    config["attn_logit_softcapping"] = metadata.number("attn_logit_softcapping", 50.0)
    config["final_logit_softcapping"] = metadata.number("final_logit_softcapping", 30.0)
    config["sliding_window"] = metadata.integer("attention.sliding_window", 4096)
    # The largest model alone divides by hidden size over heads; llama.cpp knows it by its number of layers.
    config["query_pre_attn_scalar"] = _query_scalar(config, largest=46)


def _gemma3_rules(metadata: Metadata, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    config["sliding_window"] = metadata.integer("attention.sliding_window")
    config["sliding_window_pattern"] = 6
    config["rope_theta"] = metadata.positive("rope.freq_base", 1000000.0)
    config["rope_local_base_freq"] = metadata.positive("rope.freq_base_swa", 10000.0)
    config["query_pre_attn_scalar"] = _query_scalar(config, largest=62)


def _query_scalar(config: dict[str, Any], largest: int) -> int:
    if config["num_hidden_layers"] == largest:
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


def _phi3_rules(metadata: Metadata, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    rotated = metadata.integer("rope.dimension_count", config["head_dim"])
    config["partial_rotary_factor"] = rotated / config["head_dim"]
    config["original_max_position_embeddings"] = metadata.integer(
        "rope.scaling.original_context_length", config["max_position_embeddings"]
    )
    if metadata.has("attention.sliding_window"):
        config["sliding_window"] = metadata.integer("attention.sliding_window")


_RULES = {
    "llama": _llama_rules,
    "gemma2": _gemma2_rules,
    "gemma3": _gemma3_rules,
    "phi3": _phi3_rules,
}


def _rope_scaling(metadata: Metadata, config: dict[str, Any], read_rope: ReadRope) -> dict[str, Any] | None:
    """`rope_scaling` from the scaling keys and the rotary tensors. Both `type` and `rope_type` spell its kind."""
    rotated = metadata.integer("rope.dimension_count", config["head_dim"])
    if rotated != config["head_dim"] and "partial_rotary_factor" not in config:
        raise CheckpointError(
            f"{metadata.path}: rope.dimension_count is {rotated} of a head of {config['head_dim']}: "
            f"partial rotation is not supported for {metadata.arch}"
        )
    long, short = read_rope("rope_factors_long.weight"), read_rope("rope_factors_short.weight")
    if long is not None and short is not None:
        return _kind("longrope", long_factor=_floats(long), short_factor=_floats(short)) | {
            "original_max_position_embeddings": config["original_max_position_embeddings"]
        }
    factors = read_rope("rope_freqs.weight")
    if factors is not None and not np.allclose(factors, 1.0):
        return _llama3_scaling(metadata.path, factors, config)
    # Files that name a factor and no type mean linear, as llama.cpp reads them.
    kind = metadata.text(f"{metadata.arch}.rope.scaling.type", "linear")
    factor = metadata.number("rope.scaling.factor", metadata.number("rope.scale_linear", 1.0))
    if kind == "linear":
        return _kind("linear", factor=factor) if factor != 1.0 else None
    if kind == "yarn":
        original = metadata.integer("rope.scaling.original_context_length", config["max_position_embeddings"])
        return _kind("yarn", factor=factor, original_max_position_embeddings=original)
    if kind != "none":
        raise CheckpointError(
            f"{metadata.path}: rope scaling {kind!r} is not supported for {metadata.arch}; "
            "supported are none, linear, yarn, and llama3's rope_freqs tensor"
        )
    return None


def _llama3_scaling(path: Path, factors: np.ndarray, config: dict[str, Any]) -> dict[str, Any]:
    """The Llama 3 rule whose frequency divisors are these, checked against every one of them.

    Source of the rule: `transformers.modeling_rope_utils._compute_llama3_parameters`; converters store the divisor of
    each frequency.
    """
    half = config["head_dim"] // 2
    if factors.shape == (half,):
        wavelengths = 2 * np.pi * config["rope_theta"] ** (np.arange(half) / half)
        factor = float(str(np.float32(factors.max())))
        for original in _TRAINED_CONTEXTS:
            expected = _llama3_divisors(wavelengths, factor, original)
            # float32 arithmetic of the converter: a few roundings of 6e-8 each.
            if np.allclose(factors, expected, rtol=1e-5, atol=0):
                return _kind(
                    "llama3",
                    factor=factor,
                    low_freq_factor=1.0,
                    high_freq_factor=4.0,
                    original_max_position_embeddings=original,
                )
    raise CheckpointError(
        f"{path}: rope_freqs.weight holds {factors.size} frequency divisors that follow no known rule "
        "(Llama 3's with low and high factors 1 and 4 was tried): this rotary scaling is not supported"
    )


def _llama3_divisors(wavelengths: np.ndarray, factor: float, original: int) -> np.ndarray:
    low, high = 1.0, 4.0
    smooth = (original / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(wavelengths < original / high, 1.0, np.where(wavelengths > original / low, factor, between))


def _kind(name: str, **values: Any) -> dict[str, Any]:
    return {"rope_type": name, "type": name, **values}


def _floats(values: np.ndarray) -> list[float]:
    return [float(str(v)) for v in values.astype(np.float32)]
