"""MLX directories in the float modes mxfp4, mxfp8 and nvfp4: made by mlx, read, run, converted to and back."""

import json

import numpy as np
import pytest
from tiny import add_merge, make_model

import mlxq
from mlxq.architectures.parameters import ParameterMap
from mlxq.checkpoint.source import open_checkpoint
from mlxq.errors import CheckpointError, MlxqError

mx = pytest.importorskip("mlx.core")
MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


def quantized_by_mlx(directory, mode, seed=0):
    """A tiny llama that mlx-lm itself quantized in a mode."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    bits, group_size = MODES[mode]
    source = add_merge(make_model(directory.with_name(f"{directory.name}-float"), seed=seed))
    model, config = load_model(source)
    model, config = quantize_model(model, config, group_size, bits, mode=mode)
    directory.mkdir()
    save_model(directory, model)
    save_config(config, directory / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((source / name).read_bytes())
    return directory


def stock_logits(directory, tokens):
    from mlx_lm.utils import load_model

    model, _ = load_model(directory)
    model.set_dtype(mx.float32, lambda d: d in (mx.bfloat16, mx.float16))
    return np.array(model(mx.array([tokens])))


@pytest.fixture(scope="module", params=MODES)
def made(request, tmp_path_factory):
    return request.param, quantized_by_mlx(tmp_path_factory.mktemp("modes") / request.param, request.param)


def test_decoded_weights_are_mlx_s(made):
    mode, path = made
    weights = mx.load(str(path / "model.safetensors"))
    with open_checkpoint(path) as checkpoint:
        info = checkpoint.tensors["model.layers.0.mlp.down_proj.weight"]
        bits, group_size = MODES[mode]
        assert (info.dtype, info.spec.mode, info.spec.bits, info.shape) == (mode, mode, bits, (128, 256))
        assert info.nbytes == 128 * 256 * bits // 8 + 128 * 256 // group_size
        for name, info in checkpoint.tensors.items():
            if info.spec is None:
                continue
            module = name.removesuffix(".weight")
            expected = mx.dequantize(weights[name], weights[f"{module}.scales"], mode=mode, dtype=mx.float32)
            np.testing.assert_array_equal(checkpoint.read(name), np.array(expected))
            np.testing.assert_array_equal(checkpoint.read(name, slice(3, 9)), np.array(expected)[3:9])


def test_logits_are_stock_mlx_lm_s(made):
    _, path = made
    tokens = [256, 5, 70, 33, 200, 9, 41, 77]
    with mlxq.load(path) as model:
        ours = np.array(model.module(mx.array([tokens])).astype(mx.float32))
        one = np.array(model.module(mx.array([tokens[:2]])).astype(mx.float32))
    theirs = stock_logits(path, tokens)
    # float32 sums in another order; stock embeddings come out in bfloat16, whose codes all have fewer digits.
    assert np.abs(ours - theirs).max() <= 2e-5 * np.abs(theirs).max()
    assert np.abs(one - theirs[:, :2]).max() <= 2e-5 * np.abs(theirs).max()


def test_conversion_keeps_codes_and_is_opened_by_stock(made, tmp_path):
    mode, path = made
    result = mlxq.convert(path, tmp_path / "again", exact=True)
    assert {p.action for p in result.plan.tensors} == {"repack", "keep"}
    weights, again = (mx.load(str(p / "model.safetensors")) for p in (path, tmp_path / "again"))
    assert weights.keys() == again.keys()
    for name, a in weights.items():
        assert a.dtype == again[name].dtype
        assert mx.array_equal(a, again[name]), name
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert config["quantization"]["mode"] == mode
    tokens = [256, 5, 70, 33]
    np.testing.assert_array_equal(stock_logits(path, tokens), stock_logits(tmp_path / "again", tokens))
    shown = mlxq.inspect(tmp_path / "again")
    assert mode in {t.format for t in shown.tensors}
    assert shown.nbytes == result.plan.nbytes


def test_gguf_holds_four_bit_modes_exactly(made, tmp_path):
    mode, path = made
    result = mlxq.convert(path, tmp_path / "out.gguf")
    types = {p.info.name: (p.action, p.dtype) for p in result.plan.tensors}
    name = "model.layers.1.self_attn.q_proj.weight"
    expected = {"mxfp4": ("repack", "MXFP4"), "nvfp4": ("repack", "NVFP4"), "mxfp8": ("requantize", "Q8_0")}[mode]
    assert types[name] == expected
    with open_checkpoint(path) as a, open_checkpoint(tmp_path / "out.gguf") as b:
        pairs = [(p.read(name).astype(np.float64) for p in map(ParameterMap, (a, b)))]
        for x, y in pairs:
            assert np.abs(x - y).max() <= (0 if mode != "mxfp8" else np.abs(x).max() / 127)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "mxfp5"}, "mode must be one of affine, mxfp4, mxfp8, nvfp4, got 'mxfp5'"),
        ({"bits": 8}, "mode mxfp4 has 4 bits in groups of 32"),
        ({"model.layers.0.mlp.up_proj": {"bits": 8, "group_size": 32, "mode": "mxfp8"}}, "config.json says mxfp8"),
        ({"model.layers.0.mlp.up_proj": False}, "config.json says that it is not"),
    ],
)
def test_configurations_that_disagree_are_refused(tmp_path, change, message):
    path = quantized_by_mlx(tmp_path / "m", "mxfp4")
    config = json.loads((path / "config.json").read_text())
    config["quantization"] |= change
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_scales_that_are_no_numbers_are_refused(tmp_path):
    path = quantized_by_mlx(tmp_path / "m", "mxfp4")
    weights = mx.load(str(path / "model.safetensors"))
    weights["model.layers.0.mlp.up_proj.scales"][3, 1] = 255
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
    with pytest.raises(MlxqError, match=r"up_proj\.weight.*a scale is 255, which is NaN in E8M0"):
        mlxq.convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_scale_of_the_whole_tensor_is_refused(tmp_path):
    path = quantized_by_mlx(tmp_path / "m", "nvfp4")
    weights = mx.load(str(path / "model.safetensors"))
    weights["model.layers.0.mlp.up_proj.global_scale"] = mx.array(0.5)
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight' has a global_scale"):
        open_checkpoint(path)
