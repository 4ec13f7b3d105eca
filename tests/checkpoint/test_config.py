"""config.json: clear errors, one spelling for old and new, and the facts asked of it."""

from __future__ import annotations

import json
import math

import pytest

from mlxq.checkpoint import config as C
from mlxq.errors import CheckpointError

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def write(directory, text):
    (directory / "config.json").write_text(text if isinstance(text, str) else json.dumps(text))
    return directory


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "JSON list, but an object"),
        ("{}", "model_type is missing"),
        ({"model_type": None}, "model_type is None"),
        ({"model_type": ["llama"]}, "model_type is"),
        ({"model_type": "llama", "model_file": "mine.py"}, "code of its own .*'mine.py'"),
        ({"model_type": "llama", "text_config": 3}, "text_config is 3"),
        ({"model_type": "llama", "quantization": "4bit"}, "quantization is '4bit'"),
    ],
)
def test_malformed_config_is_refused_in_one_line(tmp_path, text, reason):
    with pytest.raises(CheckpointError, match=reason) as caught:
        C.read_config(write(tmp_path, text))
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_config_names_the_path(tmp_path):
    with pytest.raises(CheckpointError, match="no such file") as caught:
        C.read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_config_that_is_not_utf8(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(CheckpointError, match="not valid JSON"):
        C.read_config(tmp_path)


def test_code_that_transformers_would_load_is_ignored(tmp_path):
    config = C.read_config(write(tmp_path, {"model_type": "llama", "auto_map": {"AutoModel": "modeling.Mine"}}))
    assert config["auto_map"] == {"AutoModel": "modeling.Mine"}


def test_generation_config_is_optional_but_not_malformed(tmp_path):
    assert C.read_generation_config(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text("{,}")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: not valid JSON"):
        C.read_generation_config(tmp_path)


def test_tagged_floats_survive_a_round_trip(tmp_path):
    tags = [{"__float__": name} for name in ("Infinity", "-Infinity", "NaN")]
    text = json.dumps({"model_type": "llama", "a": tags[0], "b": tags[1:]})
    config = C.read_config(write(tmp_path, text))
    assert config["a"] == math.inf
    assert config["b"][0] == -math.inf
    assert math.isnan(config["b"][1])
    assert json.loads(C.to_json(config)) == json.loads(text)


def test_rope_theta_is_lifted():
    new = {"model_type": "llama", "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"}}
    result = C.normalize(new)
    assert result["rope_theta"] == 100000.0
    assert "rope_scaling" not in result
    assert result["rope_parameters"] == new["rope_parameters"]
    assert "rope_theta" not in new, "the argument must stay as it was"


def test_rope_scaling_is_lifted_under_both_names_of_its_type():
    result = C.normalize({"model_type": "llama", "rope_parameters": LLAMA3})
    expected = {k: v for k, v in LLAMA3.items() if k != "rope_theta"} | {"type": "llama3"}
    assert result["rope_scaling"] == expected
    assert result["rope_theta"] == 500000.0


def test_what_the_top_level_says_stays():
    old = {
        "model_type": "llama",
        "rope_theta": 1.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "torch_dtype": "float16",
        "dtype": "bfloat16",
        "rope_parameters": LLAMA3,
    }
    assert C.normalize(old) == old


def test_null_at_the_top_level_counts_as_missing():
    result = C.normalize({"model_type": "llama", "rope_scaling": None, "rope_theta": None, "rope_parameters": LLAMA3})
    assert result["rope_theta"] == 500000.0
    assert result["rope_scaling"]["rope_type"] == "llama3"


def test_partial_rotary_factor_and_window_pattern_and_dtype():
    result = C.normalize(
        {
            "model_type": "glm4",
            "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5},
            "dtype": "bfloat16",
            "_sliding_window_pattern": 4,
        }
    )
    assert result["partial_rotary_factor"] == 0.5
    assert result["torch_dtype"] == "bfloat16"
    assert result["sliding_window_pattern"] == 4


GEMMA3_ROPE = {
    "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
    "sliding_attention": {"rope_theta": 2e4, "rope_type": "default"},
}


def test_gemma3_has_a_base_for_each_kind_of_attention():
    result = C.normalize({"model_type": "gemma3_text", "rope_parameters": GEMMA3_ROPE})
    assert result["rope_theta"] == 1e6
    assert result["rope_local_base_freq"] == 2e4
    assert result["rope_scaling"] == {"rope_type": "linear", "type": "linear", "factor": 8.0}


def test_other_models_read_nested_rope_parameters_themselves():
    config = {"model_type": "gemma4_text", "rope_parameters": GEMMA3_ROPE}
    assert C.normalize(config) == config


def test_text_config_is_normalized_too():
    result = C.normalize(
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "rope_parameters": GEMMA3_ROPE}}
    )
    assert result["text_config"]["rope_theta"] == 1e6
    assert "rope_theta" not in result


@pytest.mark.parametrize("rope", [{"rope_theta": 123456.0, "rope_type": "default"}, LLAMA3])
def test_mlx_lm_reads_the_same_rope_from_both_spellings(rope):
    """mlx-lm's llama reads only the flat names and would fall back to a base of 10000."""
    llama = pytest.importorskip("mlx_lm.models.llama")
    sizes = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64,
        "num_attention_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 32,
    }  # fmt: skip
    args = llama.ModelArgs.from_dict(C.normalize({**sizes, "rope_parameters": rope}))
    assert args.rope_theta == rope["rope_theta"]
    flat = {k: v for k, v in rope.items() if k != "rope_theta"}
    flat = None if rope["rope_type"] == "default" else flat
    old = llama.ModelArgs.from_dict({**sizes, "rope_theta": rope["rope_theta"], "rope_scaling": flat})
    assert type(llama.Attention(args).rope) is type(llama.Attention(old).rope)


def test_transformers_reads_the_normalized_config_as_it_reads_the_original():
    """The added names must not change what a reader of the new spelling sees."""
    transformers = pytest.importorskip("transformers")
    for kind, rope in [("llama", LLAMA3), ("gemma3_text", GEMMA3_ROPE)]:
        config = {"model_type": kind, "rope_parameters": rope, "dtype": "bfloat16", "max_position_embeddings": 131072}
        make = transformers.AutoConfig.for_model
        original = make(**json.loads(json.dumps(config))).to_dict()["rope_parameters"]
        ours = make(**json.loads(json.dumps(C.normalize(config)))).to_dict()["rope_parameters"]
        for part in (ours, *(v for v in ours.values() if isinstance(v, dict))):
            part.pop("type", None)
        assert ours == original, kind


def test_stop_tokens_are_the_union():
    config = {"eos_token_id": 7, "text_config": {"eos_token_id": [9, 7]}}
    assert C.eos_token_ids(config, {"eos_token_id": [2, 1]}, 5, None, [11], {}) == (1, 2, 5, 7, 9, 11)
    assert C.eos_token_ids({"eos_token_id": None}, True, {"eos_token_id": -1}) == ()


def test_context_length():
    assert C.context_length({"max_position_embeddings": 8192}) == 8192
    assert C.context_length({"text_config": {"max_position_embeddings": 4096}}) == 4096
    assert C.context_length({"n_positions": 1024, "max_position_embeddings": None}) == 1024
    assert C.context_length({}) is None


@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps", "partial_rotary_factor"])
@pytest.mark.parametrize("value", ["10000", True, 0, -1.0, math.inf, math.nan, 10**400, {"a": 1}, [1.0, "2"]])
def test_numbers_that_no_model_can_have_are_refused(tmp_path, key, value):
    for config, name in (
        ({key: value}, key),
        ({"text_config": {key: value}}, f"text_config.{key}"),
        ({"rope_parameters": {"full_attention": {key: value}}}, f"full_attention.{key}"),
        ({"rope_parameters": {"rope_type": "default", key: value}}, key),
    ):
        if key == "rms_norm_eps" and value == 0:
            continue
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
        with pytest.raises(CheckpointError, match=f"{name} is .* must be a number that is") as e:
            C.read_config(tmp_path)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("value", [10000, 1e6, None, [1e4, 5e5]])
def test_numbers_of_models_are_taken(tmp_path, value):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "rope_theta": value}))
    assert C.read_config(tmp_path)["rope_theta"] == value


@pytest.mark.parametrize("depth", [100, 400, 700, 100_000])
def test_nesting_without_end_is_one_line(tmp_path, depth):
    (tmp_path / "config.json").write_text('{"model_type": "x", "a": ' + '{"a": ' * depth + "1" + "}" * depth + "}")
    try:
        C.read_config(tmp_path)
    except CheckpointError as e:
        assert "not valid JSON" in str(e)  # noqa: PT017
