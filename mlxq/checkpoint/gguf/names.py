"""What each GGUF architecture calls its tensors, and what a converter does to their values: data, not code.

One table serves both directions. Sources: `gguf.MODEL_TENSORS` and `gguf.TensorNameMap` (gguf 0.19) for the names; the
architectures' `modify_tensors` in llama.cpp's `conversion/` for the changes; the parameters of `mlx_lm.models`, after
their `sanitize`, for the targets. The numbers of each architecture are in `fields.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from mlxq.checkpoint.safetensors import quoted
from mlxq.errors import CheckpointError

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_PRE_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_POST_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_LLAMA = {**_ATTENTION, **_PRE_NORMS, **_MLP}
#: Gemma 2 and 3 normalize before and after both halves of a layer.
_GEMMA2 = {
    **_ATTENTION,
    **_MLP,
    **_POST_NORMS,
    "attn_norm": "input_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
}
_PHI3 = {
    **_PRE_NORMS,
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_GPT2 = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}


_GLM4 = {
    **_ATTENTION,
    **_PRE_NORMS,
    "post_attention_norm": "post_self_attn_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_mlp_layernorm",
}
_EXAONE = {
    "attn_norm": "ln_1",
    "attn_q": "attn.attention.q_proj",
    "attn_k": "attn.attention.k_proj",
    "attn_v": "attn.attention.v_proj",
    "attn_output": "attn.attention.out_proj",
    "ffn_norm": "ln_2",
    "ffn_gate": "mlp.c_fc_0",
    "ffn_up": "mlp.c_fc_1",
    "ffn_down": "mlp.c_proj",
}
#: Attention and MLP side by side, behind one norm.
_COHERE = {**_ATTENTION, **_MLP, "attn_norm": "input_layernorm"}


def _experts(block: str) -> dict[str, str]:
    """A router and three stacks `[experts, out_features, in_features]`."""
    stacks = {f"ffn_{p}_exps": f"{block}.switch_mlp.{p}_proj" for p in ("gate", "up", "down")}
    return {"ffn_gate_inp": f"{block}.gate", **stacks}


@dataclass(frozen=True)
class GgufArchitecture:
    """How one model type of Hugging Face maps to a GGUF architecture.

    Attributes:
        name: `general.architecture`.
        model_type, model_class: of `config.json`.
        layer: name inside `blk.N.` -> name inside `<layers>.N.`.
        top: name outside of layers -> the parameter's name.
        layers: what the names of a layer's parameters begin with.
        experts: this is the mixture of experts among the model types of this `name`.
        permuted: a converter reorders the rows of q and k inside each head, from halves to pairs.
        norm_offset: what a converter adds to every norm weight.
        always_tied, never_tied: the output always, or for llama.cpp never, shares the embedding.
        dtype: the float type to compute in when a file's own says nothing.
        rope_tensors: tensors of rotary factors, which are settings and no weights.
        biases: settings of `config.json` that give linear layers a bias; llama.cpp reads no other.
    """

    name: str
    model_type: str
    model_class: str
    layer: dict[str, str]
    top: dict[str, str] = field(default_factory=lambda: _TOP)
    layers: str = "model.layers"
    experts: bool = False
    permuted: bool = False
    norm_offset: float = 0.0
    always_tied: bool = False
    never_tied: bool = False
    dtype: str = "float16"
    rope_tensors: tuple[str, ...] = ("rope_freqs.weight",)
    biases: tuple[str, ...] = ()


#: Gemma's activations leave float16's range.
_GEMMA: dict[str, Any] = {"norm_offset": 1.0, "dtype": "bfloat16"}
_LLAMA_RULES: dict[str, Any] = {"permuted": True, "biases": ("attention_bias", "mlp_bias")}

_TABLE = (
    GgufArchitecture("llama", "llama", "LlamaForCausalLM", _LLAMA, **_LLAMA_RULES),
    GgufArchitecture(
        "llama",
        "mixtral",
        "MixtralForCausalLM",
        {**_ATTENTION, **_PRE_NORMS, **_experts("block_sparse_moe")},
        experts=True,
        permuted=True,
    ),
    GgufArchitecture("qwen2", "qwen2", "Qwen2ForCausalLM", _LLAMA),
    GgufArchitecture("qwen3", "qwen3", "Qwen3ForCausalLM", {**_LLAMA, **_QK_NORM}),
    GgufArchitecture(
        "qwen3moe",
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {**_ATTENTION, **_PRE_NORMS, **_QK_NORM, **_experts("mlp")},
        experts=True,
    ),
    GgufArchitecture("gemma", "gemma", "GemmaForCausalLM", _LLAMA, always_tied=True, **_GEMMA),
    GgufArchitecture("gemma2", "gemma2", "Gemma2ForCausalLM", _GEMMA2, always_tied=True, **_GEMMA),
    GgufArchitecture("gemma3", "gemma3_text", "Gemma3ForCausalLM", {**_GEMMA2, **_QK_NORM}, **_GEMMA),
    GgufArchitecture(
        "phi3",
        "phi3",
        "Phi3ForCausalLM",
        _PHI3,
        rope_tensors=("rope_factors_long.weight", "rope_factors_short.weight"),
    ),
    GgufArchitecture("smollm3", "smollm3", "SmolLM3ForCausalLM", _LLAMA, permuted=True),
    GgufArchitecture(
        "olmo2",
        "olmo2",
        "Olmo2ForCausalLM",
        {**_ATTENTION, **_MLP, **_QK_NORM, **_POST_NORMS},
        never_tied=True,
    ),
    GgufArchitecture("granite", "granite", "GraniteForCausalLM", _LLAMA, **_LLAMA_RULES),
    GgufArchitecture(
        "starcoder2",
        "starcoder2",
        "Starcoder2ForCausalLM",
        {**_ATTENTION, **_PRE_NORMS, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
    ),
    GgufArchitecture(
        "olmoe",
        "olmoe",
        "OlmoeForCausalLM",
        {**_ATTENTION, **_PRE_NORMS, **_QK_NORM, **_experts("mlp")},
        experts=True,
        never_tied=True,
    ),
    GgufArchitecture("command-r", "cohere", "CohereForCausalLM", _COHERE, always_tied=True),
    GgufArchitecture("cohere2", "cohere2", "Cohere2ForCausalLM", _COHERE, always_tied=True),
    GgufArchitecture("glm4", "glm4", "Glm4ForCausalLM", _GLM4, biases=("attention_bias",)),
    GgufArchitecture(
        "exaone",
        "exaone",
        "ExaoneForCausalLM",
        _EXAONE,
        top={**_TOP, "token_embd": "transformer.wte", "output_norm": "transformer.ln_f"},
        layers="transformer.h",
    ),
    GgufArchitecture(
        "gpt2",
        "gpt2",
        "GPT2LMHeadModel",
        _GPT2,
        top={**_TOP, "token_embd": "model.wte", "position_embd": "model.wpe", "output_norm": "model.ln_f"},
        layers="model.h",
        always_tied=True,
        rope_tensors=(),
    ),
)
#: `model_type` -> its mapping.
ARCHITECTURES = {arch.model_type: arch for arch in _TABLE}
#: Model types that mlx-lm and llama.cpp both run as another one.
ALIASES = {"mistral": "llama"}

_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.([a-z0-9_]+)\.(weight|bias)")
_OUTSIDE = re.compile(r"([a-z0-9_]+)\.(weight|bias)")


def architecture(name: object, where: object, experts: bool = False) -> GgufArchitecture:
    """The mapping of a `general.architecture`, of its mixture of experts if `experts`.

    Raises:
        CheckpointError: missing or not in the table; the message lists what is.
    """
    if not isinstance(name, str):
        raise CheckpointError(f"{where}: general.architecture is missing from the metadata")
    found = [arch for arch in _TABLE if arch.name == name]
    if not found:
        names = dict.fromkeys(arch.name for arch in _TABLE)
        raise CheckpointError(
            f"{where}: GGUF architecture {quoted(name)} is not supported; supported are {', '.join(names)}"
        )
    for arch in found:
        if arch.experts == experts:
            return arch
    kind = "with a mixture of experts" if experts else "without experts"
    raise CheckpointError(f"{where}: GGUF architecture {name!r} {kind} is not supported")


def architecture_for(config: dict[str, Any]) -> tuple[str, GgufArchitecture]:
    """`general.architecture` and mapping of a model, by the `model_type` of its `config.json`.

    Raises:
        CheckpointError: not in the table; the message names the `model_type` and lists what is supported.
    """
    model_type = config.get("model_type")
    known = ALIASES.get(model_type, model_type) if isinstance(model_type, str) else None
    if known not in ARCHITECTURES:
        raise CheckpointError(
            f"models of type {model_type!r} cannot be written as GGUF;"
            f" supported are {', '.join(sorted({*ARCHITECTURES, *ALIASES}))}"
        )
    return ARCHITECTURES[known].name, ARCHITECTURES[known]


@dataclass(frozen=True)
class MappedTensor:
    """A tensor's name in the other world, and how its values differ there.

    Attributes:
        name: the parameter's name (from `map_name`) or the GGUF tensor's (from `to_gguf`).
        norm_offset: GGUF holds the value with this added.
        heads: key of `config.json` with the number of heads whose rows GGUF has in pairs (`heads`), or None.
    """

    name: str
    norm_offset: float = 0.0
    heads: str | None = None

    @property
    def permuted(self) -> bool:
        """Whether rows come in another order."""
        return self.heads is not None


def map_name(arch: GgufArchitecture, gguf_name: str) -> MappedTensor | None:
    """Parameter name of a GGUF tensor, or None when the architecture has no such tensor."""
    block = _BLOCK.fullmatch(gguf_name)
    if block:
        index, stem, kind = block.groups()
        target = arch.layer.get(stem)
        return None if target is None else _mapped(arch, f"{arch.layers}.{index}.{target}.{kind}", stem, kind)
    outside = _OUTSIDE.fullmatch(gguf_name)
    if outside and outside[1] in arch.top:
        return _mapped(arch, f"{arch.top[outside[1]]}.{outside[2]}", outside[1], outside[2])
    return None


def to_gguf(arch: GgufArchitecture, parameter_name: str) -> MappedTensor | None:
    """GGUF name of a parameter of mlx-lm's model, or None when the architecture has no such parameter."""
    module, _, kind = parameter_name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    for stem, target in arch.top.items():
        if module == target:
            return _mapped(arch, f"{stem}.{kind}", stem, kind)
    if not module.startswith(arch.layers + "."):
        return None
    index, _, inside = module[len(arch.layers) + 1 :].partition(".")
    for stem, target in arch.layer.items():
        if inside == target and index.isdecimal():
            return _mapped(arch, f"blk.{index}.{stem}.{kind}", stem, kind)
    return None


def _mapped(arch: GgufArchitecture, name: str, stem: str, kind: str) -> MappedTensor:
    norm = stem.endswith("_norm")
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(stem) if arch.permuted else None
    return MappedTensor(
        name,
        norm_offset=arch.norm_offset if norm and kind == "weight" else 0.0,
        heads=heads,
    )
