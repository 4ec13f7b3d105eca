"""The `<architecture>.*` keys of a GGUF file and its tensors of rotary factors, out of `config.json`.

Sources: `TextModel.set_gguf_parameters`, the architectures' own and their `generate_extra_tensors` in llama.cpp's
`conversion/`. What a file cannot say, or llama.cpp would not do as mlx-lm does, is refused by name.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mlxq.checkpoint.gguf.config import SLIDING_PATTERN, llama3_divisors, query_scalar
from mlxq.checkpoint.gguf.fields import BUILT_IN, FIELDS, PARTIAL, YARN, Field
from mlxq.checkpoint.gguf.names import GgufArchitecture, architecture_for
from mlxq.checkpoint.safetensors import quoted
from mlxq.errors import CheckpointError

#: key -> (kind, value), as the GGUF writer takes metadata.
Keys = dict[str, tuple[str, Any]]


def hyperparameters(config: dict[str, Any], arch_name: str, arch: GgufArchitecture) -> Keys:
    """Every `<arch_name>.*` key.

    Args:
        config: normalized `config.json` (`checkpoint.config.normalize`).
        arch_name, arch: of `architecture_for(config)`.

    Raises:
        CheckpointError: a setting is missing, impossible, or one that GGUF or llama.cpp does not have.
    """
    values = _numbers(config, arch)
    _refuse_settings(config, values, arch)
    keys: Keys = {"vocab_size": ("uint32", _integer("vocab_size", _required(config, "vocab_size", arch)))}
    for field in FIELDS[arch.model_type]:
        value = values[field.name]
        # Zero says none.
        keys[field.key] = (field.kind, 0 if value is None else value)
    if arch.model_type == "gpt2":
        keys["feed_forward_length"] = ("uint32", 4 * values["n_embd"])
    else:
        head_dim = _head_dim(config, values)
        rotated = int(head_dim * config.get("partial_rotary_factor", 1.0))
        keys["attention.key_length"] = keys["attention.value_length"] = ("uint32", head_dim)
        keys["rope.dimension_count"] = ("uint32", rotated)
        keys |= _scaling_keys(config, values)
    if arch.model_type == "gemma3_text":
        pattern = _integer("sliding_window_pattern", config.get("sliding_window_pattern", SLIDING_PATTERN))
        if pattern != SLIDING_PATTERN:
            keys["attention.sliding_window_pattern"] = ("uint32", pattern)
    return {f"{arch_name}.{key}": value for key, value in keys.items()}


def rope_tensors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of rotary factors, float32 `[rotated / 2]`, by GGUF name; empty for most models.

    Raises:
        CheckpointError: not supported for this architecture, or of the wrong length.
    """
    _, arch = architecture_for(config)
    scaling = _scaling(config)
    kind = _kind(scaling)
    if kind not in ("llama3", "longrope"):
        return {}
    values = _numbers(config, arch)
    rotated = int(_head_dim(config, values) * config.get("partial_rotary_factor", 1.0))
    if kind == "llama3":
        wavelengths = 2 * np.pi * values["rope_theta"] ** (np.arange(0, rotated, 2) / rotated)
        factors = llama3_divisors(
            wavelengths,
            _positive("rope_scaling.factor", scaling.get("factor")),
            _positive("rope_scaling", scaling.get("original_max_position_embeddings", 8192)),
            _positive("rope_scaling.low_freq_factor", scaling.get("low_freq_factor", 1.0)),
            _positive("rope_scaling.high_freq_factor", scaling.get("high_freq_factor", 4.0)),
        )
        tensors = {"rope_freqs.weight": factors.astype(np.float32)}
    else:
        tensors = {f"rope_factors_{n}.weight": _factors(f"{n}_factor", scaling) for n in ("long", "short")}
    for name, factors in tensors.items():
        if name not in arch.rope_tensors:
            raise CheckpointError(f"rope scaling {kind!r} cannot be written for the GGUF architecture {arch.name!r}")
        if factors.shape != (rotated // 2,):
            raise CheckpointError(
                f"{name} would have shape {list(factors.shape)}, but {rotated // 2} pairs are rotated"
            )
    return tensors


def _factors(name: str, scaling: dict[str, Any]) -> np.ndarray:
    values = scaling.get(name)
    if not isinstance(values, list):
        raise CheckpointError(f"config.json: rope_scaling.{name} is {quoted(values)}, expected numbers")
    return np.array([_positive(f"rope_scaling.{name}", value) for value in values], np.float32)


def _required(config: dict[str, Any], name: str, arch: GgufArchitecture) -> Any:
    if config.get(name) is None:
        raise CheckpointError(f"config.json lacks {name}, which a GGUF file of {arch.name!r} must state")
    return config[name]


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 32:
        raise CheckpointError(f"config.json: {name} is {quoted(value)}, expected a positive integer")
    return value


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= np.finfo(np.float32).max:
        raise CheckpointError(f"config.json: {name} is {quoted(value)}, expected a positive number")
    return float(value)


def _numbers(config: dict[str, Any], arch: GgufArchitecture) -> dict[str, Any]:
    """The architecture's fields by their names in `config.json`, checked, defaults filled in."""
    values: dict[str, Any] = {}
    for field in FIELDS[arch.model_type]:
        values[field.name] = _number(config, field, values, arch)
    return values


def _number(config: dict[str, Any], field: Field, values: dict[str, Any], arch: GgufArchitecture) -> Any:
    value = config.get(field.name)
    if value is None:
        if field.optional:
            return None
        default = values[field.default] if isinstance(field.default, str) else field.default
        value = _required(config, field.name, arch) if default is None else default
    return _integer(field.name, value) if field.kind == "uint32" else _positive(field.name, value)


def _head_dim(config: dict[str, Any], values: dict[str, Any]) -> int:
    fallback = max(values["hidden_size"] // values["num_attention_heads"], 1)
    return _integer("head_dim", config.get("head_dim") or fallback)


def _refuse_settings(config: dict[str, Any], values: dict[str, Any], arch: GgufArchitecture) -> None:
    """Refuse what mlx-lm would compute and llama.cpp would not."""
    wanted = dict(BUILT_IN.get(arch.model_type, {}))
    wanted |= {name: False for name in ("attention_bias", "mlp_bias") if name not in arch.biases}
    wanted |= {"rope_traditional": False}
    if arch.model_type not in PARTIAL:
        wanted["partial_rotary_factor"] = 1.0
    if arch.model_type == "smollm3" and config.get("no_rope_layers") is not None:
        interval = wanted.pop("no_rope_layer_interval")
        wanted["no_rope_layers"] = [int((i + 1) % interval != 0) for i in range(values["num_hidden_layers"])]
    if arch.model_type == "olmo2":
        wanted["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    if arch.model_type == "gpt2":
        wanted["n_inner"] = 4 * values["n_embd"]
    if arch.model_type in ("gemma2", "gemma3_text"):
        sizes = {**config, **values, "model_type": arch.model_type, "head_dim": _head_dim(config, values)}
        wanted["query_pre_attn_scalar"] = query_scalar(sizes)
    if arch.never_tied:
        wanted["tie_word_embeddings"] = False
        # mlx-lm ties where config.json says nothing.
        config = {"tie_word_embeddings": True, **config}
    for name, value in wanted.items():
        if config.get(name) is not None:
            _refuse(name, config[name], value, arch.name)
    if arch.model_type in ("llama", "smollm3") and "sliding_attention" in (config.get("layer_types") or []):
        raise CheckpointError(
            f"config.json: layer_types has sliding attention, which llama.cpp's {arch.name} does not have"
        )


def _refuse(name: str, value: Any, built_in: Any, what: str) -> None:
    if value != built_in:
        raise CheckpointError(
            f"config.json: {name} is {quoted(value)}, but llama.cpp's {what} always has {quoted(built_in)}:"
            " this model cannot be written as GGUF"
        )


def _scaling(config: dict[str, Any]) -> dict[str, Any]:
    scaling = config.get("rope_scaling")
    if scaling is not None and not isinstance(scaling, dict):
        raise CheckpointError(f"config.json: rope_scaling is {quoted(scaling)}, expected an object")
    return scaling or {}


def _kind(scaling: dict[str, Any]) -> str:
    kind = scaling.get("type") or scaling.get("rope_type") or "default"
    return "longrope" if kind == "su" else str(kind)


def _scaling_keys(config: dict[str, Any], values: dict[str, Any]) -> Keys:
    scaling = _scaling(config)
    kind = _kind(scaling)
    if kind in ("default", "llama3"):
        return {}
    if kind == "longrope" and "original_max_position_embeddings" in values:
        original = values["original_max_position_embeddings"]
        ratio = values["max_position_embeddings"] / original
        factor = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
        return {"rope.scaling.type": ("string", kind), "rope.scaling.attn_factor": ("float32", factor)}
    if kind not in ("linear", "yarn"):
        raise CheckpointError(
            f"config.json: rope scaling {quoted(kind)} cannot be written as GGUF for {config.get('model_type')};"
            " supported are linear and yarn, llama3 for llama's kin, longrope for phi3"
        )
    keys: Keys = {
        "rope.scaling.type": ("string", kind),
        "rope.scaling.factor": ("float32", _positive("rope_scaling.factor", scaling.get("factor"))),
    }
    if kind == "yarn":
        # mlx-lm takes 4096 where config.json says nothing.
        original = scaling.get("original_max_position_embeddings", 4096)
        name = "rope_scaling.original_max_position_embeddings"
        keys["rope.scaling.original_context_length"] = ("uint32", _integer(name, original))
        for name, (key, built_in) in YARN.items():
            if scaling.get(name) is not None:
                _refuse(f"rope_scaling.{name}", scaling[name], built_in, "yarn")
                if key:
                    keys[key] = ("float32", built_in)
    return keys
