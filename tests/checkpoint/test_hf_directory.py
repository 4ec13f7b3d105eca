"""Hugging Face directories: single and sharded, companions, and everything that is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from checkpoint_builders import floats, write_config, write_index, write_safetensors

from mlxq.checkpoint.huggingface import HuggingFaceCheckpoint, is_tokenizer
from mlxq.checkpoint.source import open_checkpoint
from mlxq.errors import CheckpointError


def refuse(directory, *parts):
    with pytest.raises(CheckpointError) as caught:
        HuggingFaceCheckpoint(directory)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.fixture
def model(tmp_path):
    return write_config(tmp_path / "m")


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_reads_a_single_file(model, dtype):
    w = floats(6, 64, dtype=dtype)
    write_safetensors(model / "model.safetensors", {"a.weight": w, "n.weight": floats(64)})
    with HuggingFaceCheckpoint(model) as checkpoint:
        assert checkpoint.kind == "huggingface"
        info = checkpoint.tensors["a.weight"]
        assert (info.name, info.shape, info.dtype, info.nbytes) == ("a.weight", (6, 64), dtype, w.nbytes)
        assert info.spec is None
        got = checkpoint.read("a.weight")
        assert got.dtype == w.dtype
        np.testing.assert_array_equal(got, w)
        np.testing.assert_array_equal(checkpoint.read("a.weight", slice(2, 5)), w[2:5])
        assert checkpoint.files() == [model / "model.safetensors"]
        with pytest.raises(CheckpointError, match="no tensor 'b'"):
            checkpoint.read("b")
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.read("a.weight")


def shard(model, n_shards=2, index=True):
    arrays = {f"layer{i}.weight": floats(4, 64, seed=i) for i in range(n_shards)}
    files = [f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors" for i in range(n_shards)]
    for file, (name, w) in zip(files, arrays.items(), strict=True):
        write_safetensors(model / file, {name: w})
    if index:
        write_index(model, dict(zip(arrays, files, strict=True)))
    return arrays, files


@pytest.mark.parametrize("index", [True, False])
def test_reads_shards(model, index):
    arrays, files = shard(model, 3, index)
    checkpoint = HuggingFaceCheckpoint(model)
    assert list(checkpoint.tensors) == list(arrays)
    for name, w in arrays.items():
        np.testing.assert_array_equal(checkpoint.read(name), w)
    assert [p.name for p in checkpoint.files()] == files


@pytest.mark.parametrize("index", [True, False])
def test_missing_shard_is_named(model, index):
    _, files = shard(model, 3, index)
    (model / files[1]).unlink()
    refuse(model, files[1], "missing")


def test_shards_of_two_sets(model):
    shard(model, 2, index=False)
    shard(model, 3, index=False)
    refuse(model, "several sets")


def test_shard_that_the_index_does_not_name(model):
    shard(model)
    write_safetensors(model / "model.safetensors", {"other.weight": floats(2, 2)})
    refuse(model, "model.safetensors", "does not name it")


def test_index_that_puts_a_tensor_in_the_wrong_shard(model):
    arrays, files = shard(model)
    write_index(model, dict.fromkeys(arrays, files[0]) | {"x": files[1]})
    refuse(model, "'layer1.weight'", files[0], f"is in {files[1]}")


def test_index_with_a_tensor_that_is_nowhere(model):
    arrays, files = shard(model)
    write_index(model, dict(zip(arrays, files, strict=True)) | {"ghost.weight": files[0]})
    refuse(model, "'ghost.weight'", "in no shard")


def test_tensor_in_two_shards(model):
    _, files = shard(model)
    write_safetensors(model / files[1], {"layer0.weight": floats(4, 64), "layer1.weight": floats(4, 64)})
    refuse(model, "'layer0.weight'", "also in", files[0])


@pytest.mark.parametrize("weight_map", [{}, [], None, "x"])
def test_index_without_a_map(model, weight_map):
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refuse(model, "weight_map")


@pytest.mark.parametrize("target", ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", 5])
def test_index_cannot_point_outside(model, target):
    write_index(model, {"a": target})
    refuse(model, "not a safetensors file in the directory")


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        (["pytorch_model.bin"], ["pickled", "pytorch_model.bin", "convert them to safetensors"]),
        (["consolidated.00.pth"], ["pickled", "consolidated.00.pth"]),
        (["adapter_model.safetensors", "adapter_config.json"], ["adapter", "merge"]),
        (["x-Q4_K_M.gguf"], ["x-Q4_K_M.gguf", "name the file"]),
        (["consolidated.safetensors"], ["consolidated.safetensors", "not supported"]),
        (["training_args.bin"], ["no weights", "model.safetensors"]),
        ([], ["no weights", "model.safetensors"]),
    ],
)
def test_directories_without_readable_weights(model, files, parts):
    for name in files:
        (model / name).write_bytes(b"")
    refuse(model, str(model), *parts)


def test_pickled_files_beside_safetensors_do_no_harm(model):
    write_safetensors(model / "model.safetensors", {"a.weight": floats(2, 2)})
    (model / "pytorch_model.bin").write_bytes(b"")
    (model / "consolidated.safetensors").write_bytes(b"")
    assert list(HuggingFaceCheckpoint(model).tensors) == ["a.weight"]


def test_no_such_directory(tmp_path):
    refuse(tmp_path / "none", "no such directory")
    (tmp_path / "file").write_bytes(b"")
    refuse(tmp_path / "file", "not a directory")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0"])
def test_fp8_is_refused_by_name(model, dtype):
    write_safetensors(model / "model.safetensors", {"a.weight": floats(2, 4).astype(np.uint8)}, {"a.weight": dtype})
    refuse(model, "tensor 'a.weight'", f"is {dtype}; FP8 checkpoints are not supported yet")


def test_packed_integers_are_refused_by_name(model):
    write_safetensors(model / "model.safetensors", {"a.qweight": np.zeros((2, 2), np.uint32)})
    refuse(model, "tensor 'a.qweight'", "U32", "packed")


def test_mlx_weights_without_quantization_in_the_config(model):
    write_safetensors(model / "model.safetensors", {"a.weight": np.zeros((2, 8), np.uint32), "a.scales": floats(2, 1)})
    refuse(model, "tensor 'a.weight'", "config.json has no quantization")


def test_integer_buffers_are_listed_but_not_read(model):
    write_safetensors(
        model / "model.safetensors", {"a.weight": floats(2, 2), "e.position_ids": np.arange(4, dtype=np.int64)}
    )
    checkpoint = HuggingFaceCheckpoint(model)
    assert checkpoint.tensors["e.position_ids"].dtype == "I64"
    with pytest.raises(CheckpointError, match=r"'e\.position_ids' is I64"):
        checkpoint.read("e.position_ids")


def test_quantized_by_others_is_refused_before_the_weights_are_opened(tmp_path):
    model = write_config(tmp_path, quantization_config={"quant_method": "exl3"})
    (model / "model.safetensors").write_bytes(b"not even a header")
    with pytest.raises(CheckpointError, match=r"config\.json says that .* already quantized with exl3, .* gptq, awq"):
        open_checkpoint(model)


def test_model_optimizer_settings_beside_the_config(model):
    write_safetensors(model / "model.safetensors", {"a.weight": floats(2, 2)})
    (model / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "W2A2"}}))
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json.*ModelOpt's 'W2A2'"):
        open_checkpoint(model)


def test_companion_files(model):
    write_safetensors(model / "model.safetensors", {"a.weight": floats(2, 2)})
    kept = [
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "qwen.tiktoken",
        "generation_config.json", "LICENSE", "LICENSE.txt", "NOTICE", "additional_chat_templates/tool_use.jinja",
        "tokenization_mine.py",
    ]  # fmt: skip
    left = ["README.md", "code/mine.py", "pytorch_model.bin", "optimizer.pt", ".gitattributes"]
    (model / "additional_chat_templates").mkdir()
    (model / "code").mkdir()
    for name in kept + left:
        (model / name).write_text("{}")
    checkpoint = HuggingFaceCheckpoint(model)
    assert checkpoint.companion_files() == {name: model / name for name in sorted(kept)}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["tokenizer.json"], True),
        (["tokenizer.model"], True),
        (["vocab.json", "merges.txt"], True),
        (["vocab.json"], False),
        (["tokenizer_config.json"], False),
        ([], False),
    ],
)
def test_is_tokenizer(model, files, expected):
    write_safetensors(model / "model.safetensors", {"a.weight": floats(2, 2)})
    for name in files:
        (model / name).write_text("{}")
    assert is_tokenizer(HuggingFaceCheckpoint(model).companion_files()) is expected


def test_many_shards_keep_no_files_open(model):
    import os

    shard(model, 40)
    fds = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"
    before = len(os.listdir(fds))
    checkpoint = HuggingFaceCheckpoint(model)
    for name in checkpoint.tensors:
        checkpoint.read(name)
    assert len(os.listdir(fds)) == before
