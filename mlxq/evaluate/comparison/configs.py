"""Two configurations of one model: which settings change what is computed, and differ.

What mlx-lm computes with is compared (`architectures.arguments.effective`), whoever spelled it and how. Of the settings
that mlx-lm does not read (another runtime may), those are compared that both sides name: a GGUF knows but some of them.
Numbers are the same when they are so in float32, as GGUF stores them.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any

import numpy as np

from mlxq.architectures.arguments import effective
from mlxq.architectures.registry import model_classes
from mlxq.checkpoint.base import Checkpoint
from mlxq.checkpoint.config import to_json

#: Settings that say how a model is stored, who wrote it, how it was trained, or which tokens mark what (compared
#: with the tokenizers).
_IGNORED = frozenset(
    {
        "architectures", "auto_map", "dtype", "id2label", "initializer_range", "label2id", "model_type",
        "model_file", "pretraining_tp", "problem_type", "quantization", "quantization_config",
        "torch_dtype", "transformers_version", "use_cache", "vision_config", "audio_config",
    }
)  # fmt: skip
_TOKENS = "_token_id"
#: Two names of one setting, of which readers know either.
_ALIASES = {"type": "rope_type"}


@dataclasses.dataclass(frozen=True)
class ConfigDifference:
    """A setting that is not the same on both sides; `absent` is what a side shows that lacks it."""

    key: str
    a: Any
    b: Any

    def __str__(self) -> str:
        return f"{self.key} is {_short(self.a)} / {_short(self.b)}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON; values that it lacks are written as transformers does, or as text."""
        return {"key": self.key, "a": _plain(self.a), "b": _plain(self.b)}


def different_architecture(a: Checkpoint, b: Checkpoint) -> str:
    """Why two models have not one architecture; empty when they have.

    Raises:
        CheckpointError: an architecture that mlx-lm does not know.
    """
    if model_classes(a.config)[0] is model_classes(b.config)[0]:
        return ""
    return f"not one architecture: A is a {a.config['model_type']} model, B a {b.config['model_type']} model"


def compare_configs(a: dict[str, Any], b: dict[str, Any]) -> tuple[ConfigDifference, ...]:
    """Settings of two models of one architecture that differ, those that mlx-lm reads first, each group sorted.

    Raises:
        CheckpointError: an architecture that mlx-lm does not know.
        TypeError, ValueError: a configuration that does not describe a model (`ParameterMap` refuses it).
    """
    read_a, read_b = (effective(copy.deepcopy(c)) for c in (a, b))
    found = [
        ConfigDifference(key, read_a.get(key, "absent"), read_b.get(key, "absent"))
        for key in sorted(read_a.keys() | read_b.keys())
        if _counts(key) and not _same(read_a.get(key), read_b.get(key))
    ]
    read = {f.name for c in (a, b) for f in dataclasses.fields(model_classes(c)[1])}
    if any(isinstance(p, dict) for p in (a.get("rope_parameters") or {}).values()):
        read.discard("rope_parameters")  # by kind of layer; otherwise `normalize` has spelled it out
    else:
        read.add("rope_parameters")
    # Where mlx-lm does not ask, the architecture is always tied or the tensors tell.
    shared = sorted((a.keys() & b.keys()) - read - {"tie_word_embeddings"})
    found += [ConfigDifference(key, a[key], b[key]) for key in shared if _counts(key) and not _same(a[key], b[key])]
    return tuple(found)


def _counts(key: str) -> bool:
    return key not in _IGNORED and not key.startswith("_") and not key.endswith((_TOKENS, _TOKENS + "s"))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        with np.errstate(over="ignore"):
            return a == b or np.float32(a) == np.float32(b) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, dict) and isinstance(b, dict):
        a, b = ({_ALIASES.get(k, k): v for k, v in part.items() if v is not None} for part in (a, b))
        keys = {k for k in a.keys() | b.keys() if _counts(str(k))}
        return all(_same(a.get(k), b.get(k)) for k in keys)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _plain(value: Any) -> Any:
    try:
        return json.loads(to_json({"": value}))[""]
    except (TypeError, ValueError):
        return repr(value)


def _short(value: Any) -> str:
    # Sizes come back as floats from where all numbers are rounded to float32.
    text = repr(int(value) if isinstance(value, float) and value.is_integer() else value)
    return text if len(text) <= 60 else f"{text[:57]}..."
