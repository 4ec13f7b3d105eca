"""`config.json` and `generation_config.json`: read with clear errors, brought to one spelling, asked for facts.

Newer transformers (5 and later) spell some settings in a way that readers of the older spelling miss without a word:
`rope_parameters` for `rope_theta` and `rope_scaling`, `dtype` for `torch_dtype`. `normalize` adds the older names and
keeps the newer ones, so that every reader finds its own.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mlxq.checkpoint.safetensors import quoted
from mlxq.errors import CheckpointError

#: transformers writes floats that JSON lacks as {"__float__": "Infinity"} (transformers/configuration_utils.py).
_FLOAT_TAG = "__float__"
_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}

#: Models of mlx-lm with one rotary base for full and another for sliding attention, under flat names.
_TWO_ROPE_BASES = frozenset({"gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gear"})

#: Numbers that every forward pass needs, some models one for each layer. An epsilon may be 0.
_BASES = ("rope_theta", "rope_local_base_freq", "partial_rotary_factor")
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
#: Of float32.
_LARGEST = 3.4028234663852886e38

_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, tagged non-finite floats decoded.

    Raises:
        CheckpointError: the file cannot be read, is not JSON, or holds something else than an object.
    """
    try:
        value = _decode_floats(json.loads(path.read_bytes().decode("utf-8-sig")))
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        why = " ".join(str(e).split())[:200]
        raise CheckpointError(f"{path}: not valid JSON: {why}") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}, but an object is expected")
    return value


def read_config(directory: Path) -> dict[str, Any]:
    """`config.json` of a model directory, normalized.

    Raises:
        CheckpointError: it is missing, malformed, names no `model_type`, asks for code of its own (`model_file`), or
            has a rotary base or the like that is no positive number.
    """
    path = directory / "config.json"
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file; a model directory holds config.json beside its weights (is this the one?)"
        )
    config = read_json(path)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        found = f"is {quoted(model_type)}" if "model_type" in config else "is missing"
        raise CheckpointError(f"{path}: model_type {found}; it must name the architecture, such as 'llama'")
    if config.get("model_file") is not None:
        raise CheckpointError(
            f"{path}: asks to run code of its own (model_file {quoted(config['model_file'])}), which is never done;"
            " only the architectures of mlx-lm are supported"
        )
    for key in ("text_config", "quantization"):
        if config.get(key) is not None and not isinstance(config[key], dict):
            raise CheckpointError(f"{path}: {key} is {quoted(config[key])}, but must be an object")
    config = normalize(config)
    _check_numbers(config, f"{path}: ")
    return config


def _check_numbers(part: dict[str, Any], where: str) -> None:
    """Refuse numbers of which no model can be built, but which mlx would only stumble over, if at all."""
    for key in (*_BASES, *_EPSILONS):
        values, rule = part.get(key), "positive" if key in _BASES else "not negative"
        for value in values if isinstance(values, list) else [values]:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            fits = number and 0 <= value <= _LARGEST and (value > 0 or key in _EPSILONS)
            if value is not None and not fits:
                raise CheckpointError(
                    f"{where}{key} is {quoted(values)}, but must be a number that is {rule} and finite"
                )
    rope = part.get("rope_parameters")
    by_layer = rope if isinstance(rope, dict) else {}
    for name, nested in (("text_config", part.get("text_config")), ("rope_parameters", rope), *by_layer.items()):
        if isinstance(nested, dict) and name not in (*_BASES, *_EPSILONS):
            _check_numbers(nested, f"{where}{name}.")


def read_generation_config(directory: Path) -> dict[str, Any]:
    """`generation_config.json` of a model directory, or an empty dict when there is none."""
    path = directory / "generation_config.json"
    return read_json(path) if path.exists() else {}


def to_json(config: dict[str, Any]) -> str:
    """The text of a configuration file: sorted keys, non-finite floats tagged as transformers does."""
    return json.dumps(_encode_floats(config), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def normalize(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of `config` in which every setting that mlx-lm reads has the name it reads; nothing is removed.

    Adds, where the top level (or `text_config`, in the same way) lacks them: `rope_theta`, `rope_scaling` (when the
    rope type is not `default`) and `partial_rotary_factor` out of `rope_parameters`; `rope_local_base_freq` out of
    its `sliding_attention`; `torch_dtype` out of `dtype`; `sliding_window_pattern` out of `_sliding_window_pattern`.
    """
    result = dict(config)
    if isinstance(result.get("text_config"), dict):
        result["text_config"] = normalize(result["text_config"])
    parameters = result.get("rope_parameters")
    if isinstance(parameters, dict):
        by_layer = {kind: p for kind, p in parameters.items() if isinstance(p, dict)}
        if not by_layer:
            _add_rope(result, parameters)
        elif result.get("model_type") in _TWO_ROPE_BASES:
            _add_rope(result, by_layer.get("full_attention", {}))
            _add(result, "rope_local_base_freq", by_layer.get("sliding_attention", {}).get("rope_theta"))
        # Others with rope parameters by kind of layer are read in that form by their mlx-lm model, and a flat
        # rope_scaling beside them would make transformers forget the rest.
    if isinstance(result.get("dtype"), str):
        _add(result, "torch_dtype", result["dtype"])
    if type(result.get("_sliding_window_pattern")) is int:
        _add(result, "sliding_window_pattern", result["_sliding_window_pattern"])
    return result


def _add_rope(config: dict[str, Any], parameters: dict[str, Any]) -> None:
    _add(config, "rope_theta", parameters.get("rope_theta"))
    _add(config, "partial_rotary_factor", parameters.get("partial_rotary_factor"))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in (None, "default"):
        # Some readers look for `type`, others for `rope_type`.
        scaling = {k: v for k, v in parameters.items() if k != "rope_theta"}
        _add(config, "rope_scaling", {**scaling, "rope_type": kind, "type": kind})


def _add(config: dict[str, Any], key: str, value: Any) -> None:
    if value is not None and config.get(key) is None:
        config[key] = value


def eos_token_ids(*sources: Any) -> tuple[int, ...]:
    """Stop tokens: the sorted union over all sources.

    A source is a config or generation config (its `eos_token_id`, and `text_config`'s, is taken), a token id, a list
    of ids, or None. The runtime passes the tokenizer's own id beside the two files.
    """
    found: set[int] = set()
    for source in sources:
        if isinstance(source, dict):
            found.update(eos_token_ids(source.get("eos_token_id"), source.get("text_config")))
        elif isinstance(source, (list, tuple, set, frozenset)):
            found.update(eos_token_ids(*source))
        elif isinstance(source, int) and not isinstance(source, bool) and source >= 0:
            found.add(source)
    return tuple(sorted(found))


def context_length(config: dict[str, Any]) -> int | None:
    """Longest sequence, in tokens, that the configuration declares; None when it declares none."""
    for part in (config, config.get("text_config") or {}):
        for key in _CONTEXT_KEYS:
            value = part.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def vocabulary_size(config: dict[str, Any]) -> int | None:
    """Tokens that the model can predict, as the configuration declares; None when it declares none."""
    for part in (config, config.get("text_config") or {}):
        size = part.get("vocab_size") or part.get("padded_vocab_size")
        if isinstance(size, int):
            return size
    return None


def _decode_floats(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {_FLOAT_TAG} and value[_FLOAT_TAG] in ("Infinity", "-Infinity", "NaN"):
            return _FLOATS[value[_FLOAT_TAG]]
        return {k: _decode_floats(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_decode_floats(v) for v in value]
    return value


def _encode_floats(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT_TAG: "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, dict):
        return {k: _encode_floats(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode_floats(v) for v in value]
    return value
