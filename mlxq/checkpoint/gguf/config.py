"""`config.json` and `generation_config.json` from a GGUF file's metadata, in the names Hugging Face and mlx-lm use.

Sources: the keys in `gguf.constants.Keys`; what each converter writes (llama.cpp `convert_hf_to_gguf.py`) and what the
graph builders of llama.cpp assume where a key is absent.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mlxq.checkpoint.gguf.fields import ACTIVATIONS, BIASED, BUILT_IN, FIELDS, YARN, Field
from mlxq.checkpoint.gguf.metadata import Metadata
from mlxq.checkpoint.gguf.names import GgufArchitecture
from mlxq.checkpoint.gguf.tokens import CONTROL, END_TEXTS
from mlxq.checkpoint.safetensors import quoted
from mlxq.errors import CheckpointError

#: Of Gemma 3: one layer in so many attends to everything.
SLIDING_PATTERN = 6
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
        shapes: parameter name -> shape.
        tied: the output shares the embedding.
        read_rope: gives the values of a rotary tensor.

    Raises:
        CheckpointError: a key is missing or has an impossible value, or the rotary scaling cannot be expressed.
    """
    embedding = shapes.get(f"{arch.top['token_embd']}.weight")
    if embedding is None or len(embedding) != 2:
        raise CheckpointError(f"{metadata.path}: the tensor token_embd.weight is missing or has no rows")
    config: dict[str, Any] = {
        "architectures": [arch.model_class],
        "model_type": arch.model_type,
        "vocab_size": embedding[0],
        "tie_word_embeddings": tied,
    }
    for field in FIELDS[arch.model_type]:
        value = _value(metadata, field, config)
        if value is not None:
            config[field.name] = value
    for name in arch.biases:
        config[name] = f"{arch.layers}.0.{arch.layer[BIASED[name]]}.bias" in shapes
    config |= BUILT_IN.get(arch.model_type, {})
    _check_layers(metadata, arch, shapes)
    _RULES.get(arch.model_type, _transformer_rules)(metadata, config)
    if arch.rope_tensors:
        scaling = _rope_scaling(metadata, config, read_rope)
        if scaling is not None:
            config["rope_scaling"] = scaling
    for name in ("bos", "eos"):
        config[f"{name}_token_id"] = metadata.token_id(name, embedding[0])
    pad = metadata.token_id("padding", embedding[0])
    if pad is not None:
        config["pad_token_id"] = pad
    return config


def _value(metadata: Metadata, field: Field, config: dict[str, Any]) -> int | float | None:
    """A field's number, or what its absence means; None for an optional one."""
    if field.optional and not metadata.has(field.key):
        return None
    absent = config[field.absent] if isinstance(field.absent, str) else field.absent
    if field.kind == "uint32":
        return metadata.integer(field.key, absent)
    return metadata.positive(field.key, absent)


def _check_layers(metadata: Metadata, arch: GgufArchitecture, shapes: dict[str, tuple[int, ...]]) -> None:
    start = arch.layers + "."
    n_layers = len({name[len(start) :].split(".")[0] for name in shapes if name.startswith(start)})
    if metadata.integer("block_count") != n_layers:
        raise CheckpointError(
            f"{metadata.path}: {metadata.arch}.block_count is {metadata.integer('block_count')}, but the file has "
            f"tensors of {n_layers} blocks"
        )


def _transformer_rules(metadata: Metadata, config: dict[str, Any]) -> None:
    head_dim = metadata.integer("attention.key_length", max(config["hidden_size"] // config["num_attention_heads"], 1))
    if metadata.integer("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(f"{metadata.path}: attention.key_length and attention.value_length differ")
    config["head_dim"] = head_dim
    config["hidden_act"] = ACTIVATIONS.get(config["model_type"], "silu")


def _gemma2_rules(metadata: Metadata, config: dict[str, Any]) -> None:
    _transformer_rules(metadata, config)
    config["query_pre_attn_scalar"] = query_scalar(config)


def _gemma3_rules(metadata: Metadata, config: dict[str, Any]) -> None:
    _gemma2_rules(metadata, config)
    config["sliding_window_pattern"] = metadata.integer("attention.sliding_window_pattern", SLIDING_PATTERN)


def query_scalar(config: dict[str, Any]) -> int:
    """What llama.cpp scales Gemma's queries by: the head size, but for the largest model of each generation.

    Those divide the hidden size by the heads, and llama.cpp knows them by their number of layers (source:
    `load_arch_hparams` of gemma2 and gemma3).
    """
    if config["num_hidden_layers"] == {"gemma2": 46, "gemma3_text": 62}[config["model_type"]]:
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


def _partial_rules(metadata: Metadata, config: dict[str, Any]) -> None:
    _transformer_rules(metadata, config)
    config["partial_rotary_factor"] = metadata.integer("rope.dimension_count", config["head_dim"]) / config["head_dim"]


def _gpt2_rules(metadata: Metadata, config: dict[str, Any]) -> None:
    config["n_ctx"] = config["n_positions"]
    inner = metadata.integer("feed_forward_length", 4 * config["n_embd"])
    if inner != 4 * config["n_embd"]:
        raise CheckpointError(
            f"{metadata.path}: gpt2.feed_forward_length is {inner}, but mlx-lm's gpt2 always has four times the"
            f" embedding length, {4 * config['n_embd']}"
        )
    config["activation_function"] = "gelu_new"


_RULES = {
    "gemma2": _gemma2_rules,
    "gemma3_text": _gemma3_rules,
    "phi3": _partial_rules,
    "glm4": _partial_rules,
    "gpt2": _gpt2_rules,
}


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
        more = {name: metadata.positive(key, None) for name, (key, _) in YARN.items() if key and metadata.has(key)}
        return _kind("yarn", factor=factor, original_max_position_embeddings=original, **more)
    if kind != "none":
        raise CheckpointError(
            f"{metadata.path}: rope scaling {quoted(kind)} is not supported for {metadata.arch}; "
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
            expected = llama3_divisors(wavelengths, factor, original)
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


def llama3_divisors(
    wavelengths: np.ndarray, factor: float, original: float, low: float = 1.0, high: float = 4.0
) -> np.ndarray:
    """What Llama 3 divides the frequencies of these `wavelengths` (in positions) by.

    Source: `transformers.modeling_rope_utils._compute_llama3_parameters`.
    """
    smooth = (original / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(wavelengths < original / high, 1.0, np.where(wavelengths > original / low, factor, between))


def _kind(name: str, **values: Any) -> dict[str, Any]:
    return {"rope_type": name, "type": name, **values}


def _floats(values: np.ndarray) -> list[float]:
    return [float(str(v)) for v in values.astype(np.float32)]
