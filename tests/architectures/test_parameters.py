"""Parameters traced to checkpoint tensors: renamed ones stream, stacked ones are made a layer at a time."""

import numpy as np
import pytest
import tiny

from mlxq.architectures import registry
from mlxq.architectures.parameters import ParameterMap
from mlxq.checkpoint.source import open_checkpoint
from mlxq.errors import CheckpointError

MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "rope_theta": 1e6,
}


def mixtral_shapes(config):
    shapes = {n: s for n, s in tiny.llama_shapes(config).items() if ".mlp." not in n}
    d, f = config["hidden_size"], config["intermediate_size"]
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}.block_sparse_moe."
        shapes[p + "gate.weight"] = (config["num_local_experts"], d)
        for e in range(config["num_local_experts"]):
            for name, shape in (("w1", (f, d)), ("w2", (d, f)), ("w3", (f, d))):
                shapes[f"{p}experts.{e}.{name}.weight"] = shape
    return shapes


def open_map(path):
    return ParameterMap(open_checkpoint(path))


def bf16(a):
    return (a.astype(np.uint32) << 16).view(np.float32)


def test_plain_architecture_is_renamed_only(tmp_path):
    parameters = open_map(tiny.make_model(tmp_path / "m"))
    assert set(parameters.tensors) == set(tiny.llama_shapes(tiny.LLAMA))
    kinds = {n: t.module for n, t in parameters.tensors.items()}
    assert kinds["model.embed_tokens.weight"] == "embedding"
    assert kinds["lm_head.weight"] == "linear"
    assert kinds["model.norm.weight"] == "other"
    whole = parameters.read("lm_head.weight")
    assert np.array_equal(parameters.read("lm_head.weight", slice(5, 9)), whole[5:9])


def test_experts_are_stacked_exactly(tmp_path):
    config = tiny.LLAMA | MIXTRAL
    tensors = tiny.random_tensors(mixtral_shapes(config))
    parameters = open_map(tiny.make_model(tmp_path / "m", tensors=tensors, **MIXTRAL))
    name = "model.layers.1.block_sparse_moe.switch_mlp.down_proj.weight"
    assert parameters.tensors[name].module == "switch"
    assert parameters.tensors[name].shape == (4, 128, 256)
    from mlxq.formats.floats import from_float32

    stacked = np.stack(
        [from_float32(tensors[f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight"], "BF16") for e in range(4)]
    )
    assert np.array_equal(parameters.read(name), stacked)
    assert np.array_equal(parameters.read(name, slice(2, 3)), stacked[2:3])
    assert np.array_equal(parameters.read(name, slice(0, 1)), stacked[0:1])
    assert parameters.dropped == ()


def test_unused_tensors_are_listed_as_dropped(tmp_path):
    tensors = tiny.random_tensors(tiny.llama_shapes(tiny.LLAMA))
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(16, np.float32)
    parameters = open_map(tiny.make_model(tmp_path / "m", tensors=tensors))
    assert parameters.dropped == ("model.layers.0.self_attn.rotary_emb.inv_freq",)


def change(shapes, **changes):
    return tiny.random_tensors({n: s for n, s in (shapes | changes).items() if s is not None})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.norm.weight": None}, ["model.norm.weight", "not found"]),
        ({"model.norm.weight": (64,)}, ["model.norm.weight", "[64]", "[128]"]),
        ({"extra.weight": (4, 4)}, ["extra.weight", "llama"]),
        ({"model.layers.2.mlp.up_proj.weight": (256, 128)}, ["model.layers.2.mlp.up_proj.weight"]),
    ],
)
def test_tensors_that_disagree_with_the_config_are_refused(tmp_path, changes, words):
    tensors = change(tiny.llama_shapes(tiny.LLAMA), **changes)
    with pytest.raises(CheckpointError) as e:
        open_map(tiny.make_model(tmp_path / "m", tensors=tensors))
    assert all(w in str(e.value) for w in words)
    assert "\n" not in str(e.value)


def test_unknown_architecture_is_named_with_near_ones(tmp_path):
    with pytest.raises(CheckpointError, match=r"lama9.*llama"):
        open_map(tiny.make_model(tmp_path / "m", model_type="lama9"))


@pytest.mark.parametrize("model_type", ["../evil", "os", "", None, "base"])
def test_model_type_cannot_name_anything_else(model_type):
    with pytest.raises(CheckpointError):
        registry.build_model({"model_type": model_type})


def test_incomplete_config_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="hidden_size") as e:
        registry.build_model({"model_type": "llama"})
    assert "\n" not in str(e.value)


def test_private_import_leaves_mlx_lm_and_the_process_alone():
    import subprocess
    import sys

    code = (
        "import os, resource, sys; before = dict(os.environ), resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "from mlxq.architectures.registry import model_classes\n"
        "model_classes({'model_type': 'llama'})\n"
        "assert (dict(os.environ), resource.getrlimit(resource.RLIMIT_NOFILE)) == before\n"
        "assert 'mlx_lm' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_skeleton_allocates_nothing():
    import mlx.core as mx

    before = mx.get_active_memory()
    huge = tiny.LLAMA | {"hidden_size": 8192, "intermediate_size": 32768, "vocab_size": 200_000, "num_hidden_layers": 8}
    registry.build_model(huge | {"num_attention_heads": 64})
    assert mx.get_active_memory() - before < 1 << 20
