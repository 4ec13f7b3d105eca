"""What each GGUF architecture calls its tensors, and what its converter did to them: data, not code.

Sources: `gguf.MODEL_TENSORS` and `gguf.TensorNameMap` (gguf 0.19) for the names; the architecture's `modify_tensors`
in llama.cpp's `convert_hf_to_gguf.py` for the changes; the parameters of `mlx_lm.models` for the targets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from mlxq.errors import CheckpointError

_GLOBAL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_GATED_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_LLAMA = {**_ATTENTION, **_GATED_MLP, "ffn_norm": "post_attention_layernorm"}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
#: Gemma 2 and 3 normalize before and after both halves of a layer.
_GEMMA2 = {
    **_ATTENTION,
    **_GATED_MLP,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI3 = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class GgufArchitecture:
    """How one `general.architecture` maps to Hugging Face.

    Attributes:
        model_type, model_class: of the resulting `config.json`.
        layer: name inside `blk.N.` -> name inside `model.layers.N.`.
        permuted: layer tensors whose rows the converter reordered inside each head, from halves to pairs.
        norm_offset: what the converter added to every norm weight.
        always_tied: the output always shares the embedding.
        dtype: the float type to compute in when the file's own says nothing.
    """

    model_type: str
    model_class: str
    layer: dict[str, str]
    permuted: tuple[str, ...] = ()
    norm_offset: float = 0.0
    always_tied: bool = False
    dtype: str = "float16"
    rope_tensors: tuple[str, ...] = field(default=("rope_freqs.weight",))


#: `general.architecture` -> its mapping. Mistral 7B, SmolLM, TinyLlama and others are `llama` in GGUF.
ARCHITECTURES = {
    "llama": GgufArchitecture("llama", "LlamaForCausalLM", _LLAMA, permuted=("attn_q", "attn_k")),
    "qwen2": GgufArchitecture("qwen2", "Qwen2ForCausalLM", _LLAMA),
    "qwen3": GgufArchitecture("qwen3", "Qwen3ForCausalLM", {**_LLAMA, **_QK_NORM}),
    # Gemma's activations leave float16's range.
    "gemma": GgufArchitecture("gemma", "GemmaForCausalLM", _LLAMA, norm_offset=1.0, always_tied=True, dtype="bfloat16"),
    "gemma2": GgufArchitecture(
        "gemma2", "Gemma2ForCausalLM", _GEMMA2, norm_offset=1.0, always_tied=True, dtype="bfloat16"
    ),
    "gemma3": GgufArchitecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        {**_GEMMA2, **_QK_NORM},
        norm_offset=1.0,
        dtype="bfloat16",
    ),
    "phi3": GgufArchitecture(
        "phi3",
        "Phi3ForCausalLM",
        _PHI3,
        rope_tensors=("rope_factors_long.weight", "rope_factors_short.weight"),
    ),
}

_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.([a-z0-9_]+)\.(weight|bias)")
_TOP = re.compile(r"([a-z0-9_]+)\.(weight|bias)")


def architecture(name: object, where: object) -> GgufArchitecture:
    """The mapping of a `general.architecture`.

    Raises:
        CheckpointError: missing or not in the table; the message lists what is.
    """
    if not isinstance(name, str):
        raise CheckpointError(f"{where}: general.architecture is missing from the metadata")
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{where}: GGUF architecture {name!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


@dataclass(frozen=True)
class MappedTensor:
    """A GGUF tensor's Hugging Face name and what undoes the converter's change to it."""

    name: str
    permuted: bool = False
    norm_offset: float = 0.0


def map_name(arch: GgufArchitecture, gguf_name: str) -> MappedTensor | None:
    """Hugging Face name of a GGUF tensor, or None when the architecture has no such tensor."""
    block = _BLOCK.fullmatch(gguf_name)
    if block:
        index, stem, kind = block.groups()
        target = arch.layer.get(stem)
        if target is None:
            return None
        offset = arch.norm_offset if stem.endswith("_norm") and kind == "weight" else 0.0
        return MappedTensor(f"model.layers.{index}.{target}.{kind}", stem in arch.permuted, offset)
    top = _TOP.fullmatch(gguf_name)
    if top and top[1] in _GLOBAL:
        offset = arch.norm_offset if top[1] == "output_norm" and top[2] == "weight" else 0.0
        return MappedTensor(f"{_GLOBAL[top[1]]}.{top[2]}", norm_offset=offset)
    return None
