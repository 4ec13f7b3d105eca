"""AutoRound's own method: GPTQ's or AWQ's tensors, told by `packing_format`; bits by module in `extra_config`."""

from __future__ import annotations

import time

import numpy as np
import pytest
from checkpoint_builders import write_config, write_safetensors
from packed_models import awq_parts, awq_settings, gptq_parts, gptq_settings

from mlxq.checkpoint.source import open_checkpoint
from mlxq.errors import CheckpointError

W = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32) * 0.1


def autoround(**changes):
    base = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 32}
    return base | {"sym": True, "data_type": "int", "autoround_version": "0.9.0"} | changes


def write(directory, modules, settings):
    write_config(directory, quantization_config=settings)
    tensors = {f"{m}.{n}": np.ascontiguousarray(v) for m, parts in modules.items() for n, v in parts.items()}
    write_safetensors(directory / "model.safetensors", tensors)
    return directory


def values(directory):
    with open_checkpoint(directory) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


@pytest.mark.parametrize("method", ["auto-round", "intel/auto-round"])
@pytest.mark.parametrize(
    ("packing", "parts", "same_as"),
    [
        ("auto_round:auto_gptq", gptq_parts(W, sym=False), gptq_settings(sym=False)),
        ("auto_round:gptq", gptq_parts(W, sym=False), gptq_settings(sym=False)),
        ("auto_round", gptq_parts(W, sym=False, version=2), gptq_settings(sym=False, checkpoint_format="gptq_v2")),
        (
            "auto_round:gptqmodel",
            gptq_parts(W, sym=False, version=2),
            gptq_settings(sym=False, checkpoint_format="gptq_v2"),
        ),
        ("auto_round:auto_awq", awq_parts(W), awq_settings()),
        ("auto_round:awq", awq_parts(W), awq_settings()),
    ],
)
def test_packings_are_read_as_the_formats_that_they_are(tmp_path, method, packing, parts, same_as):
    settings = autoround(quant_method=method, packing_format=packing, sym=False)
    ours = values(write(tmp_path / "ours", {"a": parts}, settings))["a.weight"]
    np.testing.assert_array_equal(ours, values(write(tmp_path / "same", {"a": parts}, same_as))["a.weight"])
    # Half a step of the widest group, and the rounding of its scale.
    assert np.abs(ours - W).max() < 0.6 * (W.max() - W.min()) / 15


def test_modules_have_settings_of_their_own(tmp_path):
    extra = {
        "layers.0.down": {"bits": 8, "group_size": 64},
        r"layers\.1\..*": {"bits": 2},
        "lm_head": {"bits": 16, "data_type": "float"},
        # A name is no pattern: this one would be found in layers.0.down, too.
        "layers.0.d": {"bits": 3},
    }
    modules = {
        "layers.0.down": gptq_parts(W, bits=8, group_size=64),
        "layers.0.d": gptq_parts(W, bits=3),
        "layers.1.up": gptq_parts(W, bits=2),
        "layers.2.up": gptq_parts(W),
        "lm_head": {"weight": W},
    }
    with open_checkpoint(write(tmp_path, modules, autoround(extra_config=extra))) as checkpoint:
        specs = {n: (i.spec.bits, i.spec.group_size) for n, i in checkpoint.tensors.items() if i.spec}
        assert specs == {
            "layers.0.down.weight": (8, 64),
            "layers.0.d.weight": (3, 32),
            "layers.1.up.weight": (2, 32),
            "layers.2.up.weight": (4, 32),
        }
        assert checkpoint.tensors["lm_head.weight"].dtype == "F32"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"packing_format": "auto_round:llm_compressor"}, ["'auto_round:llm_compressor'", "auto_round:auto_gptq"]),
        ({"packing_format": None, "backend": "auto_round:exllamav2"}, ["None", "'auto_round:exllamav2'"]),
        ({"packing_format": ["auto_round"]}, ["packing_format ['auto_round']"]),
        ({"data_type": "mx_fp"}, ["'mx_fp'", "only int"]),
        ({"act_bits": 8}, ["activations of 8 bits"]),
        ({"rotation_config": {"a": 1}}, ["rotation_config"]),
        ({"bits": 5}, ["5 bits"]),
        ({"packing_format": "auto_round:auto_awq", "bits": 8}, ["8 bits", "only 4"]),
        ({"extra_config": ["a"]}, ["extra_config is ['a']"]),
        ({"extra_config": {"a": 8}}, ["'a' is 8"]),
        ({"extra_config": {"a(": {"bits": 8}}}, ["'a('", "regular expression"]),
        ({"extra_config": {"a": {"bits": 7}}}, ["'a'", "7 bits"]),
        ({"extra_config": {"a": {"data_type": "fp8"}}}, ["'a'", "'fp8'"]),
    ],
)
def test_settings_are_refused_before_the_weights_are_opened(tmp_path, changes, words):
    write_config(tmp_path, quantization_config=autoround(**changes))
    (tmp_path / "model.safetensors").write_bytes(b"not even a header")
    began = time.perf_counter()
    with pytest.raises(CheckpointError) as e:
        open_checkpoint(tmp_path)
    assert time.perf_counter() - began < 1
    assert all(w in str(e.value) for w in words), e.value


def test_a_packed_module_that_should_be_float_is_refused(tmp_path):
    write(tmp_path, {"a": gptq_parts(W)}, autoround(extra_config={"a": {"bits": 16}}))
    with pytest.raises(CheckpointError, match=r"'a\.qweight' is packed, but extra_config"):
        open_checkpoint(tmp_path)
