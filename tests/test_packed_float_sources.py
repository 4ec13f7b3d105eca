"""Whole models of FP8, MX, NVFP4, compressed-tensors and bitsandbytes: planned, converted, run, and made GGUF files."""

import json
import shutil
import time

import mlx.core as mx
import numpy as np
import pytest
from packed_float_models import PACKERS, make_gpt_oss, make_packed_experts, make_packed_floats

import mlxq
from mlxq.architectures.parameters import ParameterMap
from mlxq.checkpoint.source import open_checkpoint
from mlxq.errors import CheckpointError
from mlxq.formats import crossings
from mlxq.formats.floats import dtype_of, to_float32

TOKENS = [[1, 5, 9, 200, 31, 7, 77, 12]]
PROJECTION = "model.layers.1.mlp.down_proj.weight"
#: What becomes of the projections in an MLX directory, and in a GGUF file.
ACTIONS = {
    "fp8-blocks": (("requantize", "8-bit group 128"), ("requantize", "Q8_0")),
    "fp8-ue8m0": (("repack", "mxfp8"), ("requantize", "Q8_0")),
    "fp8-tensor": (("requantize", "8-bit group 128"), ("requantize", "Q8_0")),
    "fp8-rows": (("requantize", "8-bit group 128"), ("requantize", "Q8_0")),
    "ct-mxfp4": (("repack", "mxfp4"), ("repack", "MXFP4")),
    "ct-nvfp4": (("requantize", "6-bit group 128"), ("requantize", "Q6_K")),
    "modelopt-nvfp4": (("requantize", "6-bit group 128"), ("requantize", "Q6_K")),
    "modelopt-fp8": (("requantize", "8-bit group 128"), ("requantize", "Q8_0")),
    "ct-int4": (("repack", "4-bit group 32"), ("repack", "Q4_0")),
    "ct-int8": (("repack", "8-bit group 128"), ("repack", "Q8_0")),
    "bnb-nf4": (("requantize", "6-bit group 128"), ("requantize", "Q6_K")),
    "bnb-int8": (("repack", "8-bit group 128"), ("requantize", "Q8_0")),
}


def decoded(path):
    """Every parameter as the number that its code stands for, in float32, by the names of mlx-lm's model."""

    def number(parameters, info):
        if parameters.checkpoint.kind == "mlx" and info.spec is not None:
            return crossings.dequantize(parameters.read_quantized(info.name))
        values = parameters.read(info.name)
        return np.array(to_float32(values, dtype_of(values)))

    with open_checkpoint(path) as checkpoint:
        parameters = ParameterMap(checkpoint)
        return {name: number(parameters, info) for name, info in parameters.tensors.items()}


def logits(path):
    with mlxq.load(path) as model:
        return np.array(model.module(mx.array(TOKENS)).astype(mx.float32))


def stock_logits(path, weights):
    """Those of mlx-lm's model with these weights in float32."""
    from mlx_lm.utils import _get_classes

    config = json.loads((path / "config.json").read_text())
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    model.load_weights([(n, mx.array(w)) for n, w in weights.items()])
    return np.array(model(mx.array(TOKENS)))


def rms(a):
    return float(np.sqrt(np.mean(np.square(a, dtype=np.float64))))


@pytest.fixture(scope="module", params=PACKERS)
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / request.param
    return request.param, make_packed_floats(path, request.param)


def test_mlx_directory(model, tmp_path):
    name, path = model
    result = mlxq.convert(path, tmp_path / "out")
    plan = next(p for p in result.plan.tensors if p.info.name == PROJECTION)
    assert (plan.action, str(plan.spec)) == ACTIONS[name][0]
    before, after = decoded(path), decoded(tmp_path / "out")
    for tensor, w in before.items():
        error = rms(after[tensor] - w) / rms(w)
        if name == "bnb-int8" and tensor.endswith("_proj.weight"):
            assert error < 2**-22
        elif plan.action == "repack" or not tensor.endswith("_proj.weight"):
            np.testing.assert_array_equal(after[tensor], w, err_msg=tensor)
        else:
            assert 0 < error < 0.05
    if plan.action == "requantize":
        assert any("requantized" in note and "relative error" in note for note in result.notes)


def test_runs_as_its_decoded_weights_do(model):
    _, path = model
    expected, found = stock_logits(path, decoded(path)), logits(path)
    # float16 where a source without a grid is decoded, 2^-12, over a few layers.
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


def test_gguf_file(model, tmp_path):
    name, path = model
    result = mlxq.convert(path, tmp_path / "out.gguf")
    plan = next(p for p in result.plan.tensors if p.info.name == PROJECTION)
    assert (plan.action, plan.dtype) == ACTIONS[name][1]
    before, after = decoded(path)[PROJECTION], decoded(tmp_path / "out.gguf")[PROJECTION]
    error = rms(after - before) / rms(before)
    exact = name in ("ct-mxfp4", "ct-int4", "ct-int8")
    assert error == 0 if exact else 0 < error < 0.03


@pytest.mark.parametrize("name", ["fp8-blocks", "fp8-ue8m0", "ct-nvfp4", "bnb-nf4"])
def test_exact_keeps_every_weight(name, tmp_path):
    path = make_packed_floats(tmp_path / "source", name)
    before = decoded(path)
    for out in ("out", "out.gguf"):
        options = {} if out.endswith("gguf") or name == "fp8-ue8m0" else {"dtype": "float32"}
        result = mlxq.convert(path, tmp_path / out, exact=True, **options)
        assert {p.action for p in result.plan.tensors} <= {"keep", "repack"}
        after = decoded(tmp_path / out)
        for tensor, w in before.items():
            np.testing.assert_array_equal(after[tensor], w, err_msg=f"{out}: {tensor}")


def test_gpt_oss_keeps_its_experts(tmp_path):
    path = make_gpt_oss(tmp_path / "gpt-oss")
    result = mlxq.convert(path, tmp_path / "out", exact=True)
    experts = [p for p in result.plan.tensors if p.info.module == "switch"]
    assert len(experts) == 6
    assert {(p.action, str(p.spec)) for p in experts} == {("repack", "mxfp4")}
    weights = decoded(path)
    for name, w in decoded(tmp_path / "out").items():
        np.testing.assert_array_equal(w, weights[name], err_msg=name)
    # mlx-lm itself reads the original, in another way.
    from mlx_lm.utils import load_model

    stock, _ = load_model(path)
    stock.set_dtype(mx.float32, lambda d: d == mx.bfloat16)
    expected = np.array(stock(mx.array(TOKENS)))
    for source in (path, tmp_path / "out"):
        assert np.abs(logits(source) - expected).max() < 1e-4 * np.abs(expected).max()
    again, _ = load_model(tmp_path / "out")
    again.set_dtype(mx.float32, lambda d: d == mx.bfloat16)
    np.testing.assert_array_equal(np.array(again(mx.array(TOKENS))), expected)


@pytest.mark.parametrize(
    ("name", "action", "grid"),
    [
        ("fp8-ue8m0", "repack", "mxfp8"),
        ("fp8-blocks", "requantize", "8-bit group 128"),
        ("ct-mxfp4", "repack", "mxfp4"),
        ("bnb-nf4", "requantize", "6-bit group 128"),
    ],
)
def test_experts_are_stacked(name, action, grid, tmp_path):
    path = make_packed_experts(tmp_path / "source", name)
    result = mlxq.convert(path, tmp_path / "out")
    stacks = {p.info.name.split(".")[-2]: p for p in result.plan.tensors if p.info.module == "switch"}
    assert {n: p.info.shape for n, p in stacks.items()} == {
        "gate_proj": (4, 64, 128),
        "up_proj": (4, 64, 128),
        "down_proj": (4, 128, 64),
    }
    assert {p.action for p in stacks.values()} == {action}
    assert str(stacks["up_proj"].spec) == grid
    weights = decoded(path)
    after = decoded(tmp_path / "out")
    for plan in stacks.values():
        error = rms(after[plan.info.name] - weights[plan.info.name]) / rms(weights[plan.info.name])
        assert error == 0 if action == "repack" else 0 < error < 0.05
    expected, found = stock_logits(path, weights), logits(path)
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


def test_what_cannot_be_read_is_refused_at_once(tmp_path):
    path = make_packed_floats(tmp_path / "source", "ct-int4")
    config = json.loads((path / "config.json").read_text())
    for settings, message in (
        (config["quantization_config"] | {"format": "marlin-24"}, "marlin-24"),
        ({"quant_method": "quip"}, "quip"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "W4A8_AWQ"),
    ):
        (path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
        began = time.perf_counter()
        with pytest.raises(CheckpointError, match=message):
            mlxq.convert(path, tmp_path / "out")
        assert time.perf_counter() - began < 1
        assert not (tmp_path / "out").exists()


def test_a_truncated_download_leaves_nothing(tmp_path):
    path = make_packed_floats(tmp_path / "source", "fp8-blocks")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        mlxq.convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nan_found_while_writing_leaves_nothing(tmp_path):
    path = make_packed_floats(tmp_path / "source", "fp8-tensor")
    shutil.copytree(path, tmp_path / "broken")
    file = tmp_path / "broken/model.safetensors"
    data = bytearray(file.read_bytes())
    # The last byte but those of the tensors behind: some code of the last E4M3 tensor.
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    entry = header["model.layers.1.mlp.down_proj.weight"]
    data[8 + n + entry["data_offsets"][0] + 5] = 0x7F
    file.write_bytes(data)
    with pytest.raises(mlxq.MlxqError, match=r"down_proj\.weight.*an E4M3 code is NaN"):
        mlxq.convert(tmp_path / "broken", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["ct-mxfp4", "fp8-blocks"])
def test_llama_cpp_computes_the_same(name, tmp_path):
    llamacpp = pytest.importorskip("llamacpp", reason="llama.cpp (PyPI xllamacpp) is not installed")
    path = make_packed_floats(tmp_path / "source", name)
    mlxq.convert(path, tmp_path / "out.gguf", exact=True)
    ids = TOKENS[0]
    found = llamacpp.LlamaCpp(tmp_path / "out.gguf").logprobs(ids, 20)
    last = stock_logits(path, decoded(path))[0, -1].astype(np.float64)
    expected = last - np.log(np.exp(last - last.max()).sum()) - last.max()
    # llama.cpp rounds activations before it multiplies: to 8 bits for blocks, to bfloat16 for the head.
    assert len(found) == 20
    assert all(abs(p - expected[token]) < 0.05 for token, p in found.items())


@pytest.mark.parametrize(("name", "kind"), [("ct-mxfp4", ("repack", "MXFP4")), ("fp8-ue8m0", ("requantize", "Q8_0"))])
def test_experts_in_a_gguf_file(name, kind, tmp_path):
    path = make_packed_experts(tmp_path / "source", name)
    result = mlxq.convert(path, tmp_path / "out.gguf")
    assert {(p.action, p.dtype) for p in result.plan.tensors if p.info.module == "switch"} == {kind}
    assert result.verification.passed
    if kind[0] == "repack":
        assert result.verification.n_identical == result.plan.n_weights
        # And on to MLX: the mode again.
        back = mlxq.convert(tmp_path / "out.gguf", tmp_path / "back", verify=False)
        assert {str(p.spec) for p in back.plan.tensors if p.info.module == "switch"} == {"mxfp4"}
        before, after = decoded(path), decoded(tmp_path / "back")
        for tensor, w in before.items():
            np.testing.assert_array_equal(after[tensor], w, err_msg=tensor)
