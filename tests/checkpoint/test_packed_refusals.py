"""Packed checkpoints that are wrong: refused by name, before weights are read where settings or headers tell."""

from __future__ import annotations

import json
import struct
import time

import numpy as np
import pytest
from checkpoint_builders import write_config, write_safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed_models import awq_parts, awq_settings, gptq_parts, gptq_settings

import mlxq
from mlxq.checkpoint.source import open_checkpoint
from mlxq.errors import CheckpointError, MlxqError

W = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32) * 0.1


def write(directory, parts, settings_):
    write_config(directory, quantization_config=settings_)
    write_safetensors(directory / "model.safetensors", {f"a.{n}": np.ascontiguousarray(v) for n, v in parts.items()})
    return directory


def read_all(directory):
    with open_checkpoint(directory) as checkpoint:
        for name, info in checkpoint.tensors.items():
            if info.spec or info.permuted_spec:
                checkpoint.read_quantized(name)
            checkpoint.read(name)


def refusal(directory):
    """What reading everything is refused with, empty where it is not."""
    try:
        read_all(directory)
    except MlxqError as e:
        return str(e)
    return ""


def refuse(directory, *words, reading=False):
    with pytest.raises(CheckpointError) as e:
        read_all(directory) if reading else open_checkpoint(directory)
    message = str(e.value)
    assert "\n" not in message
    assert str(directory) in message
    assert all(w in message for w in words), message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_method": "aqlm"}, ["aqlm", "gptq, awq"]),
        ({"quant_method": None}, ["no quant_method"]),
        ({"checkpoint_format": "marlin"}, ["'marlin'", "gptq, gptq_v2"]),
        ({"checkpoint_format": "gptq_p"}, ["'gptq_p'"]),
        ({"checkpoint_format": 4}, ["the format 4"]),
        ({"is_marlin_format": True}, ["Marlin"]),
        ({"bits": 5}, ["5 bits", "2, 3, 4 and 8"]),
        ({"bits": "4"}, ["'4' bits"]),
        ({"bits": True}, ["True bits"]),
        ({"bits": None}, ["None bits"]),
        ({"group_size": 0}, ["group_size is 0"]),
        ({"group_size": "128"}, ["group_size is '128'"]),
        ({"pack_dtype": "int16"}, ["'int16'"]),
        ({"adapter": {"rank": 8}}, ["adapter"]),
        ({"dynamic": ["a"]}, ["dynamic is ['a']"]),
        ({"dynamic": {"(": {"bits": 8}}}, ["'('", "regular expression"]),
        ({"dynamic": {"a": {"bits": 7}}}, ["'a'", "7 bits"]),
        ({"dynamic": {"a": 3}}, ["'a' is 3"]),
    ],
)
def test_settings_of_gptq_are_refused_before_the_weights_are_opened(tmp_path, changes, words):
    write_config(tmp_path, quantization_config=gptq_settings(**changes))
    (tmp_path / "model.safetensors").write_bytes(b"not even a header")
    began = time.perf_counter()
    refuse(tmp_path, *words)
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "marlin"}, ["'marlin'", "gemm, gemv, gemv_fast, llm-awq"]),
        ({"version": 2}, ["the layout 2"]),
        ({"version": "gemm", "format": "gemv"}, ["several layouts", "'gemm', 'gemv'"]),
        ({"backend": "ipex"}, ["'ipex'"]),
        ({"bits": 8}, ["8 bits", "only 4"]),
        ({"group_size": -2}, ["group_size is -2"]),
    ],
)
def test_settings_of_awq_are_refused_before_the_weights_are_opened(tmp_path, changes, words):
    write_config(tmp_path, quantization_config=awq_settings(**changes))
    (tmp_path / "model.safetensors").write_bytes(b"not even a header")
    refuse(tmp_path, *words)


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_settings_beside_the_config_are_named(tmp_path, name):
    write_config(tmp_path)
    (tmp_path / name).write_text(json.dumps({"quant_method": "nosuch"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    refuse(tmp_path, name, "nosuch")


@pytest.mark.parametrize("settings_", [[1], "gptq", {"bits": 4}, {"quant_method": 7}])
def test_settings_that_name_no_method(tmp_path, settings_):
    refuse(write_config(tmp_path, quantization_config=settings_), "quantization_config")


def test_older_gptq_and_awq_keep_their_settings_beside_the_config(tmp_path):
    for name, settings_, parts in (
        ("quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}, gptq_parts(W)),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}, awq_parts(W)),
    ):
        directory = write(tmp_path / name, parts, {})
        (directory / name).write_text(json.dumps(settings_))
        read_all(directory)


def test_dynamic_overrides_by_module(tmp_path):
    dynamic = {"-:b": {}, "+:a": {"bits": 8, "group_size": 64}}
    directory = write(tmp_path / "m", gptq_parts(W, bits=8, group_size=64), gptq_settings(dynamic=dynamic))
    with open_checkpoint(directory) as checkpoint:
        assert (checkpoint.tensors["a.weight"].spec.bits, checkpoint.tensors["a.weight"].spec.group_size) == (8, 64)
    refuse(write(tmp_path / "n", gptq_parts(W), gptq_settings(dynamic={"-:a": {}})), "'a.qweight'", "dynamic")


def changed(parts, **arrays):
    return {k: v for k, v in {**parts, **arrays}.items() if v is not None}


def with_value(a, value, at=0):
    a = a.copy()
    a.reshape(-1)[at] = value
    return a


GPTQ = gptq_parts(W)
WIDE = GPTQ["scales"].astype(np.float32)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (changed(GPTQ, scales=None), ["'a.scales' is missing"]),
        (changed(GPTQ, qzeros=None), ["'a.qzeros' is missing"]),
        (changed(GPTQ, qweight=GPTQ["qweight"].view(np.float32)), ["'a.qweight' is F32", "I32"]),
        (changed(GPTQ, scales=GPTQ["scales"].view(np.int16)), ["'a.scales' is I16"]),
        (changed(GPTQ, scales=GPTQ["scales"][:3]), ["[3, 64]", "[4, 64]"]),
        (changed(GPTQ, qzeros=GPTQ["qzeros"][:, :7]), ["[4, 7]", "[4, 8]"]),
        (changed(GPTQ, qweight=GPTQ["qweight"][:8]), ["'a.scales'", "[4, 64]", "[2, 64]"]),
        (changed(GPTQ, qweight=GPTQ["qweight"].reshape(-1)), ["qweight is [1024]"]),
        (changed(GPTQ, qweight=GPTQ["qweight"][:0]), ["qweight is [0, 64]"]),
        (changed(GPTQ, g_idx=GPTQ["g_idx"][:100]), ["'a.g_idx' is [100]", "[128]"]),
        (changed(GPTQ, g_idx=with_value(GPTQ["g_idx"], 4)), ["'a.g_idx'", "groups 0 to 4", "4"]),
        (changed(GPTQ, g_idx=with_value(GPTQ["g_idx"], -1)), ["'a.g_idx'", "groups -1 to 3"]),
        (changed(GPTQ, weight=W), ["both weight and qweight"]),
    ],
)
def test_parts_of_gptq_that_disagree(tmp_path, parts, words):
    refuse(write(tmp_path, parts, gptq_settings()), *words)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (changed(GPTQ, scales=with_value(GPTQ["scales"], np.nan, 9)), ["a scale is NaN or infinite"]),
        (changed(GPTQ, scales=with_value(GPTQ["scales"], np.inf)), ["a scale is NaN or infinite"]),
        (changed(GPTQ, scales=with_value(GPTQ["scales"], 0)), ["a scale is 0"]),
        (
            changed(GPTQ, scales=with_value(GPTQ["scales"].astype(np.float32), 1e38)),
            ["a scale is 1e+38", "exceed float32"],
        ),
        (changed(GPTQ, qzeros=with_value(GPTQ["qzeros"], -1)), ["a zero point is 16", "4-bit"]),
    ],
)
def test_numbers_of_gptq_that_mean_nothing(tmp_path, parts, words):
    refuse(write(tmp_path, parts, gptq_settings()), "'a.weight'", *words, reading=True)


@pytest.mark.parametrize("layout", ["gemm", "gemv", "gemv_fast", "llm-awq"])
def test_parts_of_awq_that_disagree(tmp_path, layout):
    parts, how = awq_parts(W, layout), awq_settings(version=layout)
    read_all(write(tmp_path / "right", parts, how))
    for i, name in enumerate(parts):
        if i:
            refuse(write(tmp_path / f"missing{i}", changed(parts, **{name: None}), how), "missing")
        short = changed(parts, **{name: parts[name][:-1]})
        refuse(write(tmp_path / f"short{i}", short, how), "must be" if i or layout != "gemm" else "rows of 127")
        odd = changed(parts, **{name: parts[name].astype(np.int64)})
        refuse(write(tmp_path / f"odd{i}", odd, how), f"'a.{name}' is I64")
    spoiled = changed(parts, scales=with_value(parts["scales"], np.nan))
    refuse(write(tmp_path / "nan", spoiled, how), "a scale is NaN or infinite", reading=True)


def test_groups_that_do_not_divide_the_rows(tmp_path):
    refuse(write(tmp_path, awq_parts(W), awq_settings(group_size=48)), "'a'", "128", "48")


def test_a_truncated_file_leaves_nothing(tmp_path):
    from packed_models import make_packed_model

    source = make_packed_model(tmp_path / "source", lambda w, n: gptq_parts(w), gptq_settings())
    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(MlxqError, match="truncated"):
        mlxq.convert(source, tmp_path / "out")
    (source / "model.safetensors").write_bytes(whole)
    spoiled = make_packed_model(
        tmp_path / "spoiled",
        lambda w, n: changed(gptq_parts(w), scales=with_value(gptq_parts(w)["scales"], 0)),
        gptq_settings(),
    )
    with pytest.raises(MlxqError, match="a scale is 0"):
        mlxq.convert(spoiled, tmp_path / "out", verify=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "spoiled"]


fuzz = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 300), st.floats(allow_nan=False), st.text(max_size=8),
    st.sampled_from(["gptq", "gptq_v2", "gemm", "gemv", "gemv_fast", "llm-awq", "marlin", "int32"]),
    st.lists(st.integers(0, 4), max_size=3), st.dictionaries(st.text(max_size=4), st.integers(0, 9), max_size=2),
)  # fmt: skip
KEYS = [
    "quant_method", "bits", "w_bit", "group_size", "q_group_size", "sym", "desc_act", "checkpoint_format", "format",
    "version", "backend", "dynamic", "meta", "pack_dtype", "zero_point", "adapter", "is_marlin_format",
]  # fmt: skip


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    directories = []
    for name, parts, how in (
        ("gptq", gptq_parts(W), gptq_settings()),
        ("gemm", awq_parts(W), awq_settings()),
        ("gemv", awq_parts(W, "gemv"), awq_settings(version="gemv")),
        ("fast", awq_parts(W, "gemv_fast"), awq_settings(version="gemv_fast")),
    ):
        directory = write(tmp_path_factory.mktemp("layers") / name, parts, how)
        directories.append((directory, how, (directory / "model.safetensors").read_bytes()))
    return directories


@fuzz
@given(which=st.integers(0, 3), changes=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3))
def test_any_settings_are_read_or_refused(layers, which, changes):
    directory, how, data = layers[which]
    (directory / "model.safetensors").write_bytes(data)
    write_config(directory, quantization_config=how | changes)
    assert "\n" not in refusal(directory)


@fuzz
@given(
    which=st.integers(0, 3),
    tensor=st.integers(0, 3),
    dtype=st.sampled_from([None, "I32", "I16", "F16", "F32", "BF16", "U8", "I64", "F8_E4M3"]),
    shape=st.lists(st.sampled_from([0, 1, 2, 4, 7, 8, 16, 31, 32, 64, 128, 256]), min_size=0, max_size=3),
    noise=st.integers(0, 2**32 - 1),
)
def test_any_header_and_bytes_are_read_or_refused(layers, which, tensor, dtype, shape, noise):
    """One tensor has another shape or dtype, the bytes behind it are random; the header itself is consistent."""
    directory, how, data = layers[which]
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    name = sorted(header)[tensor % len(header)]
    width = {"I32": 4, "I16": 2, "F16": 2, "F32": 4, "BF16": 2, "U8": 1, "I64": 8, "F8_E4M3": 1}
    blobs, offset, rng = [], 0, np.random.default_rng(noise)
    for key, entry in header.items():
        begin, end = entry["data_offsets"]
        blob = data[8 + length + begin : 8 + length + end]
        if key == name:
            entry["dtype"] = dtype or entry["dtype"]
            entry["shape"] = shape or entry["shape"]
            blob = rng.bytes(int(np.prod(entry["shape"])) * width[entry["dtype"]])
        entry["data_offsets"] = [offset, offset + len(blob)]
        offset += len(blob)
        blobs.append(blob)
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))
    write_config(directory, quantization_config=how)
    assert "\n" not in refusal(directory)
