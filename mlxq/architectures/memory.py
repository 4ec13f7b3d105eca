"""Memory that a model takes to run, from config.json's numbers alone. Pure: nothing is read or built.

The cache follows mlx-lm's models (`mlx_lm/models/cache.py`): keys and values of every layer, grown in steps of 256
tokens; a layer with a sliding window keeps the window only, where the model's file uses a rotating cache; a
recurrent layer keeps a state of fixed size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: Tokens by which mlx-lm's caches grow (`KVCache.step`).
_CACHE_STEP = 256
#: Tokens of a prompt that are computed at once, for the estimate of activations: the runtime's chunk on a GPU.
PROMPT_CHUNK = 2048

#: Architectures of mlx-lm that cache the compressed latent of multi-head latent attention; others with such
#: attention expand it to full heads before they cache it.
_LATENT = frozenset(
    [
        "deepseek_v3",
        "deepseek_v32",
        "kimi_k2",
        "kimi_linear",
        "glm4_moe_lite",
        "glm_moe_dsa",
        "longcat_flash",
        "bailing_hybrid",
    ]
)
#: Architectures of mlx-lm whose sliding layers keep their window alone; others cache every token all the same.
_ROTATING = frozenset(
    [
        "llama",
        "mistral",
        "ministral3",
        "gemma3",
        "gemma3_text",
        "gemma3n",
        "gemma3n_text",
        "gemma4",
        "gemma4_text",
        "cohere2",
        "exaone4",
        "exaone_moe",
        "gpt_oss",
        "olmo3",
        "afmoe",
        "mimo_v2_flash",
        "step3p5",
        "recurrent_gemma",
    ]
)
#: Every n-th layer has full attention and the others a window, where config.json leaves the pattern out.
_DEFAULT_PATTERNS = {"gemma3": 6, "gemma3_text": 6, "cohere2": 4}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes to run a model at a context length, by part; `notes` say what the estimate leaves out.

    `scratch` covers the activations of one chunk of the prompt (`PROMPT_CHUNK` tokens) and one row of logits.
    """

    context: int
    weights: int
    kv_cache: int
    scratch: int
    notes: tuple[str, ...] = field(default=())

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.scratch

    def to_dict(self) -> dict[str, Any]:
        return {
            "context": self.context,
            "weights_bytes": self.weights,
            "kv_cache_bytes": self.kv_cache,
            "scratch_bytes": self.scratch,
            "total_bytes": self.total,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        parts = {"weights": self.weights, "KV cache": self.kv_cache, "scratch about": self.scratch}
        listed = ", ".join(f"{name} {human_bytes(n)}" for name, n in parts.items())
        return f"{human_bytes(self.total)} ({listed})" + "".join(f"; {n}" for n in self.notes)


def memory_to_run(weight_bytes: int, config: dict[str, Any], context: int) -> MemoryEstimate:
    """Memory to run a model whose weights take `weight_bytes`, at `context` tokens; see `MemoryEstimate`."""
    cache, notes = _cache(config, context, 2)
    return MemoryEstimate(context, weight_bytes, cache, _scratch(config, context), notes)


def kv_cache_bytes(config: dict[str, Any], context: int, bytes_per_element: int = 2) -> int:
    """Bytes of the key and value cache after `context` tokens.

    Args:
        config: the model's `config.json`; of a multimodal one, its `text_config` counts.
        context: tokens in the cache; rounded up to the steps in which mlx-lm's caches grow.
        bytes_per_element: 2 for float16 and bfloat16.

    Returns:
        Bytes; 0 when the configuration does not tell the number of layers and heads.
    """
    return _cache(config, context, bytes_per_element)[0]


def _cache(config: dict[str, Any], context: int, bytes_per_element: int) -> tuple[int, tuple[str, ...]]:
    config = _text(config)
    n_layers = _first(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    per_token, notes = _elements_per_token(config)
    if not n_layers or not per_token:
        return 0, ("config.json does not tell layers and heads, so the KV cache is not counted",)
    kinds = _layer_kinds(config, n_layers)
    window = _first(config, "sliding_window", "sliding_window_size", "attention_window_size") or context
    tokens = 0
    for kind in kinds:
        if kind == "full":
            tokens += _stepped(context)
        elif kind == "sliding":
            tokens += min(_stepped(context), window)
    if "recurrent" in kinds:
        notes = (*notes, f"the fixed-size states of {kinds.count('recurrent')} recurrent layers are not counted")
    return tokens * per_token * bytes_per_element, notes


def _elements_per_token(config: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Elements that one layer caches for one token: keys and values."""
    heads = _first(config, "num_attention_heads", "n_head", "n_heads", "num_heads")
    rank, rope_dim = _first(config, "kv_lora_rank"), _first(config, "qk_rope_head_dim")
    if rank and rope_dim:
        if config.get("model_type") in _LATENT:
            return rank + rope_dim, ()
        key_dim = rope_dim + (_first(config, "qk_nope_head_dim") or 0)
        value_dim = _first(config, "v_head_dim") or key_dim
        return (heads or 0) * (key_dim + value_dim), ("latent attention is counted as full heads, as mlx-lm caches it",)
    width = _first(config, "hidden_size", "n_embd", "d_model", "dim")
    head_dim = _first(config, "head_dim") or (width // heads if width and heads else 0)
    if config.get("multi_query") is True and not config.get("new_decoder_architecture"):
        kv_heads = 1
    else:
        kv_heads = _first(config, "num_key_value_heads", "n_head_kv", "num_kv_heads", "n_kv_heads") or heads or 0
    return 2 * kv_heads * head_dim, ()


def _layer_kinds(config: dict[str, Any], n_layers: int) -> list[str]:
    """`full`, `sliding` or `recurrent` for each layer."""
    kinds = _declared_kinds(config, n_layers)
    if config.get("model_type") in _ROTATING:
        return kinds
    return ["full" if kind == "sliding" else kind for kind in kinds]


def _declared_kinds(config: dict[str, Any], n_layers: int) -> list[str]:
    types = config.get("layer_types")
    if isinstance(types, list) and len(types) == n_layers:
        return [_kind(t) for t in types]
    pattern = config.get("sliding_window_pattern") or _DEFAULT_PATTERNS.get(str(config.get("model_type")))
    if isinstance(pattern, str) and pattern:
        return ["sliding" if pattern[i % len(pattern)] == "L" else "full" for i in range(n_layers)]
    if isinstance(pattern, int) and pattern > 1:
        return ["full" if (i + 1) % pattern == 0 else "sliding" for i in range(n_layers)]
    interval = config.get("full_attention_interval")
    if isinstance(interval, int) and interval > 1:
        return ["full" if (i + 1) % interval == 0 else "recurrent" for i in range(n_layers)]
    return ["full"] * n_layers


def _kind(layer_type: Any) -> str:
    text = str(layer_type)
    if "sliding" in text or "chunked" in text:
        return "sliding"
    return "full" if "full" in text or text in ("attention", "global") else "recurrent"


def _scratch(config: dict[str, Any], context: int) -> int:
    """Activations of one prompt chunk, 4 bytes an element: residual and normed stream, q, k, v and their result,
    gate, up and product of the feed-forward layer (of every active expert); one row of logits."""
    config = _text(config)
    width = _first(config, "hidden_size", "n_embd", "d_model", "dim") or 0
    inner = _first(config, "intermediate_size", "n_inner", "ffn_dim") or 4 * width
    experts = _first(config, "num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk") or 0
    expert_inner = _first(config, "moe_intermediate_size") or inner
    inner = max(inner, experts * expert_inner)
    rows = min(context, PROMPT_CHUNK)
    return 4 * (rows * (6 * width + 3 * inner) + (_first(config, "vocab_size") or 0))


def _text(config: dict[str, Any]) -> dict[str, Any]:
    text = config.get("text_config")
    if not isinstance(text, dict):
        return config
    return {**text, "model_type": text.get("model_type", config.get("model_type"))}


def _first(config: dict[str, Any], *keys: str) -> int | None:
    """The first of `keys` that holds a positive integer; of a list of them (one a layer), the largest."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, list) and value and all(type(v) is int for v in value):
            value = max(value)
        if type(value) is int and value > 0:
            return value
    return None


def _stepped(tokens: int) -> int:
    return -(-tokens // _CACHE_STEP) * _CACHE_STEP


def human_bytes(n: float) -> str:
    """`1234567` -> `1.2 MB`, in powers of ten as disks and the Hub count."""
    for unit in ("B", "kB", "MB"):
        if abs(n) < 1000:
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} GB"
