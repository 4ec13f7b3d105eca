"""What a tensor does in the model, from its parameter name: the one place that knows naming habits."""

from __future__ import annotations

import re
from typing import Literal

from mlxq.types import TensorInfo

Role = Literal["embedding", "head", "router", "value", "down", "linear", "other"]

_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_head)$")
_ROUTER = re.compile(r"(^|\.)(gate|router|router\.(layer|proj|classifier)|gate\.wg|shared_expert_gate)$")
_VALUE = re.compile(r"(^|\.)(v_proj|v_a_proj|v_b_proj|kv_b_proj|qkv_proj|in_qkv|Wqkv|c_attn|query_key_value)$")
_DOWN = re.compile(r"(^|\.)(down_proj|w2|fc2|fc_out|dense_4h_to_h|mlp\.c_proj|ff_out|output_linear)$")
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
    for pattern, name in ((_HEAD, "head"), (_ROUTER, "router"), (_VALUE, "value"), (_DOWN, "down")):
        if pattern.search(path):
            return name
    return "linear"


def layer_index(name: str) -> int | None:
    """Index of the transformer block that a parameter belongs to, or None outside of the blocks."""
    match = _LAYER.search(name)
    return int(match.group(1)) if match else None
