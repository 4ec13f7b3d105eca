"""Parameters traced to checkpoint tensors: renamed ones stream, stacked ones are made a layer at a time."""

import json
import struct
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny

from mlxq.architectures import parameters as parameters_module
from mlxq.architectures import registry
from mlxq.architectures.graph import dependencies
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


def test_a_computed_parameter_outlives_the_thread_that_made_it_and_the_process_ends_well(tmp_path):
    """The array is mlx's own memory: it must stay valid when its thread is gone, and be freed in silence."""
    config = tiny.LLAMA | MIXTRAL
    tiny.make_model(tmp_path / "m", tensors=tiny.random_tensors(mixtral_shapes(config)), **MIXTRAL)
    code = (
        "import sys, threading, numpy as np, mlx.core as mx\n"
        "from mlxq.architectures.parameters import ParameterMap\n"
        "from mlxq.checkpoint.source import open_checkpoint\n"
        "p = ParameterMap(open_checkpoint(sys.argv[1]))\n"
        "names = [n for n, t in p.tensors.items() if t.module == 'switch']\n"
        "arrays = [p.read(n) for n in names]\n"
        "before = [a.copy() for a in arrays]\n"
        "filler = [mx.ones((64, 1024)) * i for i in range(64)]; mx.eval(filler)\n"
        "assert all(np.array_equal(a, b) for a, b in zip(arrays, before))\n"
        "assert mx.array_equal(mx.array(arrays[0]), mx.array(before[0]))\n"
        "t = threading.Thread(target=arrays.clear); t.start(); t.join()\n"
        "kept = p.read(names[0])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_computed_parameter_cannot_be_written_to(tmp_path):
    config = tiny.LLAMA | MIXTRAL
    tensors = tiny.random_tensors(mixtral_shapes(config))
    parameters = open_map(tiny.make_model(tmp_path / "m", tensors=tensors, **MIXTRAL))
    name = "model.layers.0.block_sparse_moe.switch_mlp.up_proj.weight"
    with pytest.raises(ValueError, match="read-only"):
        parameters.read(name)[0] = 0  # it is shared by all that read it
    parameters.read(name, slice(0, 1))[0] = 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="VmHWM is Linux's")
def test_a_computed_parameter_takes_twice_its_size(tmp_path):
    """Its parts and the whole, each once, and one part in NumPy: 2 + 1/16 of 16 MiB. A third copy would make 3."""
    changes = MIXTRAL | {"hidden_size": 256, "intermediate_size": 2048, "num_local_experts": 16, "num_hidden_layers": 1}
    config = tiny.LLAMA | changes
    tiny.make_model(tmp_path / "m", tensors=tiny.random_tensors(mixtral_shapes(config)), **changes)
    code = (
        "import sys, mlx.core as mx\n"
        "from mlxq.architectures.parameters import ParameterMap\n"
        "from mlxq.checkpoint.source import open_checkpoint\n"
        "def peak():\n"
        "    return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) << 10\n"
        "p = ParameterMap(open_checkpoint(sys.argv[1]))\n"
        "p.read('model.layers.0.block_sparse_moe.gate.weight')\n"
        "name = 'model.layers.0.block_sparse_moe.switch_mlp.down_proj.weight'\n"
        "before = peak()\n"
        "p.read(name, slice(0, 1))\n"
        "print((peak() - before) / p.tensors[name].nbytes)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], capture_output=True, text=True, check=True)
    assert 1 < float(done.stdout) < 2.5


class Renumbered(nn.Module):
    """Its `sanitize` counts layers from 1 and computes layer `i + 1` from the checkpoint's layer `i`."""

    def __init__(self):
        super().__init__()
        self.layers = [{"weight": mx.zeros((4, 8))} for _ in range(3)]

    def sanitize(self, weights):
        moved = {f"layers.{i + 1}.weight": weights[f"layers.{i}.weight"] * 2 for i in range(2)}
        return {"layers.0.weight": weights["first.weight"], **moved}


class Opaque(Renumbered):
    """Its `sanitize` leaves mlx's graph, so nothing tells what its result was computed from."""

    def sanitize(self, weights):
        return {n: mx.array(np.array(w) + 1) for n, w in super().sanitize(weights).items()}


class Shrinking(Renumbered):
    """Its `sanitize` can run once only: it takes away what it finds, as some do with the head of a tied model."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 4)

    def sanitize(self, weights):
        self.pop("head")
        return super().sanitize(weights)


def open_fake(monkeypatch, path, model):
    monkeypatch.setattr(parameters_module, "build_model", lambda config: model())
    tensors = tiny.random_tensors(dict.fromkeys(("first.weight", "layers.0.weight", "layers.1.weight"), (4, 8)))
    return open_map(tiny.make_model(path, tensors=tensors, dtype="F32")), tensors


@pytest.mark.parametrize("model", [Renumbered, Shrinking])
def test_sources_of_another_layer_are_found(tmp_path, monkeypatch, model):
    parameters, tensors = open_fake(monkeypatch, tmp_path / "m", model)
    assert set(parameters.tensors) == {f"layers.{i}.weight" for i in range(3)}
    for i in range(2):
        assert np.array_equal(parameters.read(f"layers.{i + 1}.weight"), 2 * tensors[f"layers.{i}.weight"])
    assert parameters.dropped == ()


def test_a_parameter_that_cannot_be_traced_is_refused(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"layers\.0\.weight.*cannot be traced"):
        open_fake(monkeypatch, tmp_path / "m", Opaque)


def test_another_model_has_the_same_parameters(tmp_path, monkeypatch):
    parameters, _ = open_fake(monkeypatch, tmp_path / "m", Shrinking)
    assert "head" not in parameters.new_model()


def test_dependencies_of_more_arrays_than_mlx_takes_names():
    leaves = {f"leaf {i}": mx.broadcast_to(mx.zeros(()), (2, 2)) for i in range(3000)}
    mx.eval(list(leaves.values()))
    arrays = list(leaves.values())
    outputs = {f"sum {i}": arrays[i] + arrays[i + 1] for i in range(2500)}
    outputs["stack"] = mx.stack(arrays[:2000])
    outputs["of nothing"] = mx.ones((2,)) * 2
    outputs["of another"] = outputs["sum 7"] * 2
    a, b = mx.split(mx.concatenate(arrays[5:7]), 2)
    outputs |= {"half": a, "other half": b}
    found = dependencies(outputs, leaves)
    assert all(found[f"sum {i}"] == {f"leaf {i}", f"leaf {i + 1}"} for i in range(2500))
    assert found["stack"] == {f"leaf {i}" for i in range(2000)}
    assert found["of nothing"] == set()
    assert found["of another"] == {"leaf 7", "leaf 8"}
    assert found["half"] == found["other half"] == {"leaf 5", "leaf 6"}


def test_an_axis_that_mlx_cannot_count_is_refused(tmp_path):
    """A tensor of 2**31 x 0 elements, which is a legal file of no bytes."""
    directory = tiny.make_model(tmp_path / "m")
    header = json.dumps({"big.weight": {"dtype": "BF16", "shape": [2**31, 0], "data_offsets": [0, 0]}}).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match=r"big\.weight.*2147483648.*2147483647") as e:
        open_map(directory)
    assert "\n" not in str(e.value)


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


@pytest.mark.parametrize(
    "model_type", ["../evil", "os", "", None, "base", "a/b", "a.b", ".llama", "-llama", "llama\n", "__init__", "llamà"]
)
def test_model_type_cannot_name_anything_else(model_type):
    with pytest.raises(CheckpointError):
        registry.build_model({"model_type": model_type})


@pytest.mark.parametrize("model_type", ["nemotron-nas", "lille-130m", "lfm2-vl", "phi-msft"])
def test_model_types_with_hyphens_are_names_of_models(model_type):
    assert registry.model_classes({"model_type": model_type})[0].__name__ == "Model"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 2**31}, ["2147483648"]),
        ({"hidden_size": 2**70}, ["llama"]),
        ({"architectures": 5}, ["architectures", "5", "list"]),
        ({"architectures": [["LlamaForCausalLM"]]}, ["architectures", "list"]),
        ({"num_attention_heads": 0}, ["zero"]),
    ],
)
def test_wrong_values_in_the_config_are_one_line(changes, words):
    with pytest.raises(CheckpointError) as e:
        registry.build_model(tiny.LLAMA | changes)
    assert all(w in str(e.value) for w in words)
    assert "\n" not in str(e.value)


def test_incomplete_config_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="hidden_size") as e:
        registry.build_model({"model_type": "llama"})
    assert "\n" not in str(e.value)


def test_private_import_leaves_mlx_lm_and_the_process_alone():
    code = (
        "import os, resource, sys; before = dict(os.environ), resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "from mlxq.architectures.registry import model_classes\n"
        "model_classes({'model_type': 'llama'})\n"
        "assert (dict(os.environ), resource.getrlimit(resource.RLIMIT_NOFILE)) == before\n"
        "assert 'mlx_lm' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_skeleton_allocates_nothing():
    before = mx.get_active_memory()
    huge = tiny.LLAMA | {"hidden_size": 8192, "intermediate_size": 32768, "vocab_size": 200_000, "num_hidden_layers": 8}
    registry.build_model(huge | {"num_attention_heads": 64})
    assert mx.get_active_memory() - before < 1 << 20
