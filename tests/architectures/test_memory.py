"""Memory from config.json: by hand for known shapes, and against the caches that mlx-lm itself makes."""

from __future__ import annotations

import pytest

from mlxq.architectures.memory import PROMPT_CHUNK, human_bytes, kv_cache_bytes, memory_to_run
from mlxq.architectures.registry import build_model

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 100,
}
GEMMA3 = {
    "model_type": "gemma3_text",
    "hidden_size": 64,
    "num_hidden_layers": 7,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "sliding_window": 128,
    "vocab_size": 100,
}
MLA = {
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 24,
}


def test_grouped_query_attention() -> None:
    # keys and values x layers x kv heads x head_dim x tokens x 2 bytes
    assert kv_cache_bytes(LLAMA, 512) == 2 * 4 * 2 * 16 * 512 * 2
    assert kv_cache_bytes(LLAMA, 512, 4) == 2 * kv_cache_bytes(LLAMA, 512)
    assert kv_cache_bytes(LLAMA, 513) == kv_cache_bytes(LLAMA, 768), "caches grow by 256 tokens"


def test_sliding_layers_keep_their_window() -> None:
    per_token = 2 * 1 * 32 * 2
    # Layer 6 of 7 is full, the six others keep 128 tokens.
    assert kv_cache_bytes(GEMMA3, 1024) == per_token * (1024 + 6 * 128)


def test_declared_windows_count_only_where_the_cache_rotates() -> None:
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 128}
    per_token = 2 * 2 * 16 * 2
    assert kv_cache_bytes({**LLAMA, **kinds}, 1024) == per_token * (2 * 1024 + 2 * 128)
    assert kv_cache_bytes({**LLAMA, **kinds, "model_type": "gemma2"}, 1024) == per_token * 4 * 1024


@pytest.mark.parametrize("config", [LLAMA, GEMMA3, {**GEMMA3, "sliding_window": 300}], ids=["llama", "gemma3", "odd"])
def test_equals_the_caches_of_the_model_itself(config: dict) -> None:
    import mlx.core as mx

    tokens = 600
    model = build_model(config)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    kv = mx.zeros((1, config["num_key_value_heads"], 1, head_dim), mx.float16)
    caches = model.make_cache() if hasattr(model, "make_cache") else None
    if caches is None:
        pytest.fail("the model makes no cache")
    for cache in caches:
        for _ in range(tokens):
            cache.update_and_fetch(kv, kv)
    assert kv_cache_bytes(config, tokens) == sum(c.keys.nbytes + c.values.nbytes for c in caches)


def test_latent_attention_is_compressed_or_said_to_be_expanded() -> None:
    latent = memory_to_run(0, {**MLA, "model_type": "deepseek_v3"}, 256)
    assert latent.kv_cache == 3 * 256 * (64 + 16) * 2
    expanded = memory_to_run(0, {**MLA, "model_type": "deepseek_v2"}, 256)
    assert expanded.kv_cache == 3 * 256 * 8 * (16 + 32 + 24) * 2
    assert not latent.notes
    assert "latent" in expanded.notes[0]


def test_recurrent_layers_are_said_to_be_left_out() -> None:
    config = {**LLAMA, "model_type": "qwen3_next", "full_attention_interval": 4}
    estimate = memory_to_run(0, config, 256)
    assert estimate.kv_cache == 2 * 2 * 16 * 256 * 2
    assert "3 recurrent layers" in estimate.notes[0]


def test_total_and_nested_text_config() -> None:
    estimate = memory_to_run(1000, {"model_type": "x", "text_config": LLAMA}, 100)
    assert estimate.total == estimate.weights + estimate.kv_cache + estimate.scratch
    assert estimate.kv_cache == kv_cache_bytes(LLAMA, 100)
    assert estimate.scratch == 4 * (100 * (6 * 64 + 3 * 128) + 100)
    assert memory_to_run(1000, LLAMA, 10**6).scratch == 4 * (PROMPT_CHUNK * (6 * 64 + 3 * 128) + 100)
    assert "GB" in str(memory_to_run(2 * 10**9, LLAMA, 100))


def test_unknown_numbers_are_said() -> None:
    estimate = memory_to_run(5, {"model_type": "mystery"}, 100)
    assert estimate.kv_cache == 0
    assert "not counted" in estimate.notes[0]


@pytest.mark.parametrize(
    ("n", "expected"), [(0, "0 B"), (999, "999 B"), (1234, "1.2 kB"), (1_234_567, "1.2 MB"), (5.25e12, "5250.0 GB")]
)
def test_human_bytes(n, expected):
    assert human_bytes(n) == expected
