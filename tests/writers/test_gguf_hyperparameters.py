"""Keys and rotary tensors out of config.json: as llama.cpp's converter writes them, back again, or refused by name."""

import dataclasses

import gguf
import numpy as np
import pytest
from gguf_zoo import BASE, GRANITE, LLAMA3, LONGROPE, TIED, VOCAB, WIDE, YARN, ZOO

from mlxq.architectures.arguments import effective
from mlxq.architectures.registry import model_classes
from mlxq.checkpoint.gguf.config import build_config
from mlxq.checkpoint.gguf.fields import BUILT_IN, FIELDS, config_name
from mlxq.checkpoint.gguf.metadata import Metadata
from mlxq.checkpoint.gguf.names import ARCHITECTURES, architecture_for
from mlxq.errors import CheckpointError
from mlxq.writers.gguf.hyperparameters import hyperparameters, rope_tensors


def keys_of(config):
    return hyperparameters(config, *architecture_for(config))


def test_llama_as_the_converter_writes_it():
    assert keys_of(ZOO["llama wide heads"]) == {
        "llama.vocab_size": ("uint32", VOCAB),
        "llama.block_count": ("uint32", 3),
        "llama.context_length": ("uint32", 256),
        "llama.embedding_length": ("uint32", 64),
        "llama.feed_forward_length": ("uint32", 96),
        "llama.attention.head_count": ("uint32", 4),
        "llama.attention.head_count_kv": ("uint32", 2),
        "llama.attention.layer_norm_rms_epsilon": ("float32", 1e-5),
        "llama.rope.freq_base": ("float32", 10000.0),
        "llama.attention.key_length": ("uint32", 32),
        "llama.attention.value_length": ("uint32", 32),
        "llama.rope.dimension_count": ("uint32", 32),
    }


def test_gpt2_as_the_converter_writes_it():
    keys = keys_of(ZOO["gpt2"])
    assert keys["gpt2.feed_forward_length"] == ("uint32", 256)
    assert not any("rope" in key for key in keys)


def test_phi3_says_that_it_has_no_sliding_window():
    assert keys_of(ZOO["phi3"])["phi3.attention.sliding_window"] == ("uint32", 0)
    assert keys_of(ZOO["phi3 partial"])["phi3.attention.sliding_window"] == ("uint32", 200)


def test_every_key_is_one_of_gguf():
    known = set()
    for group in (gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope):
        known |= {value for value in vars(group).values() if isinstance(value, str)}
    for config in ZOO.values():
        arch_name, _ = architecture_for(config)
        assert {key.replace(arch_name, "{arch}", 1) for key in keys_of(config)} <= known


@pytest.mark.parametrize("model_type", FIELDS)
def test_defaults_are_those_of_mlx_lm(model_type):
    """What a silent config.json means is what mlx-lm takes it to mean."""
    _, args_class = model_classes({"model_type": model_type})
    theirs = {f.name: f.default for f in dataclasses.fields(args_class)}
    for field in FIELDS[model_type]:
        default = theirs.get(field.name, dataclasses.MISSING)
        # mlx-lm asks for many numbers that Hugging Face's classes have defaults for, and ignores some.
        if default not in (dataclasses.MISSING, None) and isinstance(field.default, (int, float)):
            assert field.default == default, field.name


@pytest.mark.parametrize("name", ZOO)
def test_config_survives_the_round_trip(name, tmp_path):
    """config.json -> keys -> config.json, float32 in between."""
    config = ZOO[name]
    arch_name, arch = architecture_for(config)
    values = {key: value for key, (_, value) in keys_of(config).items()}
    factors = rope_tensors(config)
    layers = config[config_name(arch.model_type, "block_count")]
    hidden = config.get("hidden_size", config.get("n_embd"))
    shapes = {f"{arch.layers}.{i}.any.weight": (1,) for i in range(layers)}
    shapes[f"{arch.top['token_embd']}.weight"] = (VOCAB, hidden)
    if config.get("attention_bias"):
        shapes["model.layers.0.self_attn.q_proj.bias"] = (1,)
        shapes["model.layers.0.mlp.gate_proj.bias"] = (1,)
    metadata = Metadata(tmp_path, {"general.architecture": arch_name, **values})
    tied = config.get("tie_word_embeddings", True)
    assert effective(build_config(metadata, arch, shapes, tied, factors.get)) == effective(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ZOO["llama"] | {"max_position_embeddings": 0}, "max_position_embeddings is 0, expected a positive integer"),
        (ZOO["llama"] | {"num_attention_heads": 4.0}, "num_attention_heads is 4.0, expected a positive integer"),
        (ZOO["llama"] | {"hidden_size": None}, "lacks hidden_size, which a GGUF file of 'llama' must state"),
        (ZOO["llama"] | {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', expected a positive number"),
        (ZOO["llama"] | {"rope_traditional": True}, "rope_traditional is True, but llama.cpp's llama always has False"),
        (ZOO["llama"] | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, but .* always has 1.0"),
        (ZOO["llama"] | {"layer_types": ["sliding_attention"] * 3}, "layer_types has sliding attention"),
        (ZOO["smollm3"] | {"layer_types": ["sliding_attention"] * 5}, "layer_types has sliding attention"),
        (
            ZOO["llama"] | {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope scaling 'dynamic' cannot be written",
        ),
        (ZOO["llama"] | {"rope_scaling": LONGROPE}, "rope scaling 'longrope' cannot be written as GGUF for llama"),
        (ZOO["llama"] | {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is None, expected a positive"),
        (ZOO["llama"] | {"rope_scaling": YARN | {"beta_fast": 8}}, "rope_scaling.beta_fast is 8, but .* has 32.0"),
        (ZOO["llama"] | {"rope_scaling": YARN | {"mscale": 0.7}}, "rope_scaling.mscale is 0.7, but llama.cpp's yarn"),
        (ZOO["llama"] | {"rope_scaling": 3}, "rope_scaling is 3, expected an object"),
        (ZOO["qwen3_moe"] | {"norm_topk_prob": False}, "norm_topk_prob is False, but llama.cpp's qwen3moe always"),
        (ZOO["qwen3_moe"] | {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\], but .* always has \[\]"),
        (ZOO["qwen3_moe"] | {"decoder_sparse_step": 2}, "decoder_sparse_step is 2, but"),
        (ZOO["qwen2"] | {"attention_bias": True}, "attention_bias is True, but llama.cpp's qwen2 always has False"),
        (ZOO["gemma2"] | {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar is 144, but .*gemma2 always has 32"),
        (ZOO["smollm3"] | {"no_rope_layers": [1] * 5}, r"no_rope_layers is \[1, 1, 1, 1, 1\], but"),
        (ZOO["smollm3 untied wide heads"] | {"no_rope_layer_interval": 2}, "no_rope_layer_interval is 2, but"),
        (ZOO["olmo2"] | TIED, "tie_word_embeddings is True, but llama.cpp's olmo2 always has False"),
        ({k: v for k, v in ZOO["olmo2"].items() if k != "tie_word_embeddings"}, "tie_word_embeddings is True"),
        (ZOO["olmo2"] | WIDE, "head_dim is 32, but llama.cpp's olmo2 always has 16"),
        (ZOO["gpt2"] | {"n_inner": 100}, "n_inner is 100, but llama.cpp's gpt2 always has 256"),
        (BASE | GRANITE | {"model_type": "granite", "logits_scaling": None}, "lacks logits_scaling"),
    ],
)
def test_what_llama_cpp_would_not_do_is_refused(config, message):
    with pytest.raises(CheckpointError, match=message):
        keys_of(config)


def test_rotary_factors():
    assert rope_tensors(ZOO["llama"]) == {}
    freqs = rope_tensors(ZOO["llama3"])["rope_freqs.weight"]
    assert (freqs.dtype, freqs.shape, freqs.min(), freqs.max()) == (np.float32, (16,), 1.0, 8.0)
    assert ((freqs > 1) & (freqs < 8)).any()
    factors = rope_tensors(ZOO["phi3 longrope"])
    np.testing.assert_array_equal(factors["rope_factors_long.weight"], np.float32(LONGROPE["long_factor"]))
    np.testing.assert_array_equal(factors["rope_factors_short.weight"], np.float32(LONGROPE["short_factor"]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            ZOO["phi3 longrope"] | {"partial_rotary_factor": 0.5},
            r"rope_factors_long.weight would have shape \[8\], but 4",
        ),
        (ZOO["phi3"] | {"rope_scaling": LLAMA3}, "rope scaling 'llama3' cannot be written .* 'phi3'"),
        (ZOO["llama"] | {"rope_scaling": LLAMA3 | {"factor": -1}}, "rope_scaling.factor is -1, expected a positive"),
        (ZOO["phi3"] | {"rope_scaling": LONGROPE | {"long_factor": "x"}}, "long_factor is 'x', expected numbers"),
    ],
)
def test_rotary_factors_that_are_refused(config, message):
    with pytest.raises(CheckpointError, match=message):
        rope_tensors(config)


def test_built_in_settings_are_arguments_of_mlx_lm():
    for model_type, settings in BUILT_IN.items():
        _, args_class = model_classes({"model_type": model_type})
        assert settings.keys() <= {f.name for f in dataclasses.fields(args_class)}
    assert FIELDS.keys() == ARCHITECTURES.keys()
