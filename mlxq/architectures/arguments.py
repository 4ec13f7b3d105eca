"""What mlx-lm makes of a `config.json`: the arguments of its model, in one spelling, so that two can be compared."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mlxq.architectures.registry import model_classes

#: Names of what is computed elsewhere: the model's, and `rope_parameters`, which `normalize` spells out.
_REPEATED = ("model_type", "rope_parameters", "n_ctx")
#: rotary scaling -> its settings and what mlx-lm takes for absent ones (`mlx_lm/models/rope_utils.py`).
_SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": None},
    "llama3": {
        "factor": None,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {
        "factor": None,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.0,
    },
    "longrope": {"long_factor": None, "short_factor": None, "original_max_position_embeddings": None},
}


def effective(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that a model's computation depends on, defaults filled in, floats rounded to float32.

    Two configurations with equal results describe the same computation, whatever else they say: `mistral` is `llama`
    without sliding layers, a missing `head_dim` is the hidden size over the heads. Tokens and the like are left out.

    Args:
        config: normalized (`checkpoint.config.normalize`), of which `build_model` makes a model.

    Raises:
        CheckpointError: mlx-lm has no such architecture.
    """
    model_class, args_class = model_classes(config)
    found = {k: v for k, v in dataclasses.asdict(args_class.from_dict(config)).items() if k not in _REPEATED}
    found["model"] = model_class.__module__.rpartition(".")[2]
    if "head_dim" in found and found["head_dim"] is None:
        found["head_dim"] = found["hidden_size"] // found["num_attention_heads"]
    kinds = found.pop("layer_types", None) or []
    if "sliding_attention" in kinds:
        found["layer_types"] = kinds
    elif found["model"] in ("llama", "smollm3"):
        found.pop("sliding_window", None)
    scaling = _scaling(found.pop("rope_scaling", None))
    found["rope_scaling"] = scaling
    if scaling.get("kind") != "longrope":
        # Lengths that only this kind of scaling computes with.
        found.pop("max_position_embeddings", None)
        found.pop("original_max_position_embeddings", None)
    elif scaling["original_max_position_embeddings"] is None or found["model"] == "phi3":
        scaling.pop("original_max_position_embeddings")
    return {name: _rounded(value) for name, value in sorted(found.items())}


def _scaling(scaling: dict[str, Any] | None) -> dict[str, Any]:
    scaling = scaling or {}
    kind = scaling.get("type") or scaling.get("rope_type") or "default"
    kind = "longrope" if kind == "su" else kind
    if kind == "default":
        return {}
    settings = _SCALINGS.get(kind)
    if settings is None:
        return {**scaling, "kind": kind}
    return {"kind": kind, **{name: scaling.get(name, default) for name, default in settings.items()}}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(np.float32(value))
    return value
