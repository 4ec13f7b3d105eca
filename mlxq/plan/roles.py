"""What a tensor does in the model, from its parameter name: the one place that knows naming habits."""

from __future__ import annotations

import re
from typing import Literal

from mlxq.architectures.parameters import OUTPUT_PROJECTION
from mlxq.types import TensorInfo

Role = Literal["embedding", "head", "router", "value", "down", "linear", "other"]


def _ends_in(*paths: str) -> re.Pattern[str]:
    """Matches module paths that end in one of `paths` (regular expressions), whole parts only."""
    return re.compile(rf"(^|\.)({'|'.join(paths)})$")


# The names that mlx-lm's models use.
_ROUTER = _ends_in("gate", "router", r"router\.(layer|proj|classifier)", r"gate\.wg", "shared_expert_gate")
_VALUE = _ends_in(
    *("v_proj", "c_v", "attn_value"),
    # One matrix for queries, keys and values.
    *("qkv_proj", "q_k_v_proj", "qkvg_proj", "in_proj_qkv", "in_proj_qkvz", "in_qkv", "Wqkv", "wqkv", "W_pack"),
    *("c_attn", "att_proj", "query_key_value", "kv_proj"),
    # Low rank, and latent attention.
    *("v_a_proj", "v_b_proj", "kv_b_proj", "unembed_out"),
)
_DOWN = _ends_in(
    *("down_proj", "w2", "fc2", "fc_out", "dense_4h_to_h", r"mlp\.c_proj", "ff_out", "output_linear"),
    *("proj_2", "mlp_resid", r"ffn\.value", "routed_expert_down_proj"),
)
_LAYER = re.compile(r"\.(\d+)\.")


def module_path(name: str) -> str:
    """The path of the module that owns a parameter: its name without the last part."""
    return name.rpartition(".")[0]


def role(info: TensorInfo) -> Role:
    """The role of a weight; `other` for what is no weight of a linear, embedding or expert layer."""
    if info.module == "embedding":
        return "embedding"
    if info.module == "other":
        return "other"
    path = module_path(info.name)
    for pattern, name in ((OUTPUT_PROJECTION, "head"), (_ROUTER, "router"), (_VALUE, "value"), (_DOWN, "down")):
        if pattern.search(path):
            return name
    return "linear"


def is_sensitive(layer: int, n_layers: int) -> bool:
    """Whether rounding costs most in a layer: the first and last eighth, every third between (llama.cpp's mixes)."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def layer_index(name: str) -> int | None:
    """Index of the transformer block that a parameter belongs to, or None outside of the blocks."""
    match = _LAYER.search(name)
    return int(match.group(1)) if match else None
