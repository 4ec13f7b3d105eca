"""Directories that MLX quantized: one logical tensor out of three, decoded as MLX decodes it."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoint_builders import floats, write_config, write_safetensors

from mlxq.checkpoint.mlx_directory import MlxCheckpoint
from mlxq.errors import CheckpointError
from mlxq.types import QuantSpec

mx = pytest.importorskip("mlx.core")

DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


def storage(a) -> np.ndarray:
    return np.array(a.view(mx.uint16)) if a.dtype == mx.bfloat16 else np.array(a)


def quantize(w: np.ndarray, bits: int, group_size: int, dtype: str = "F16") -> dict[str, np.ndarray]:
    """The three parts as MLX's own `mx.quantize` makes them."""
    parts = mx.quantize(mx.array(w).astype(DTYPES[dtype]), group_size=group_size, bits=bits)
    return {f"l.{name}": storage(a) for name, a in zip(("weight", "scales", "biases"), parts, strict=True)}


def make(directory, tensors, quantization=None, **config):
    default = {"bits": 4, "group_size": 64, "mode": "affine"}
    write_config(directory, quantization=default if quantization is None else quantization, **config)
    write_safetensors(directory / "model.safetensors", tensors)
    return directory


def refuse(directory, *parts):
    with pytest.raises(CheckpointError) as caught:
        MlxCheckpoint(directory)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (4, 64), (5, 32), (6, 128), (8, 32)])
def test_decodes_as_mlx_does(tmp_path, dtype, bits, group_size):
    parts = quantize(floats(6, 256), bits, group_size, dtype)
    make(tmp_path, {**parts, "norm.weight": floats(256)}, {"bits": bits, "group_size": group_size})
    checkpoint = MlxCheckpoint(tmp_path)
    assert set(checkpoint.tensors) == {"l.weight", "norm.weight"}
    info = checkpoint.tensors["l.weight"]
    assert (info.shape, info.dtype, info.spec, info.scales_dtype) == (
        (6, 256), "AFFINE", QuantSpec(bits, group_size), dtype,
    )  # fmt: skip
    assert info.nbytes == sum(a.nbytes for a in parts.values())
    arrays = [mx.array(parts[f"l.{p}"]) for p in ("weight", "scales", "biases")]
    if dtype == "BF16":
        arrays[1:] = [a.view(mx.bfloat16) for a in arrays[1:]]
    expected = np.array(mx.dequantize(*arrays, group_size=group_size, bits=bits).astype(mx.float32))
    got = checkpoint.read("l.weight")
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(checkpoint.read("l.weight", slice(1, 4)), expected[1:4])


def test_read_quantized_is_what_the_file_holds(tmp_path):
    parts = quantize(floats(6, 128), 4, 64, "BF16")
    checkpoint = MlxCheckpoint(make(tmp_path, parts))
    whole = checkpoint.read_quantized("l.weight")
    assert (whole.spec, whole.shape, whole.dtype) == (QuantSpec(4, 64), (6, 128), "BF16")
    rows = checkpoint.read_quantized("l.weight", slice(2, 5))
    assert rows.shape == (3, 128)
    for got, name in [("w_q", "weight"), ("scales", "scales"), ("biases", "biases")]:
        np.testing.assert_array_equal(getattr(whole, got), parts[f"l.{name}"])
        np.testing.assert_array_equal(getattr(rows, got), parts[f"l.{name}"][2:5])
    assert whole.w_q.dtype == np.uint32
    assert whole.scales.dtype == np.uint16


def test_stacks_of_experts(tmp_path):
    parts = quantize(floats(3, 4, 64), 4, 32)
    checkpoint = MlxCheckpoint(make(tmp_path, parts, {"bits": 4, "group_size": 32}))
    assert checkpoint.tensors["l.weight"].shape == (3, 4, 64)
    whole = checkpoint.read("l.weight")
    assert whole.shape == (3, 4, 64)
    np.testing.assert_array_equal(checkpoint.read("l.weight", slice(1, 2)), whole[1:2])
    assert checkpoint.read_quantized("l.weight", slice(1, 3)).shape == (2, 4, 64)


def test_a_whole_read_in_several_chunks(tmp_path, monkeypatch):
    checkpoint = MlxCheckpoint(make(tmp_path, quantize(floats(7, 128), 4, 64)))
    expected = checkpoint.read("l.weight")
    monkeypatch.setattr("mlxq.checkpoint.mlx_directory._CHUNK", 2 * 128)
    np.testing.assert_array_equal(checkpoint.read("l.weight"), expected)


@pytest.mark.parametrize("override", [{"bits": 8, "group_size": 32}, {"bits": 8, "group_size": 32, "mode": "affine"}])
def test_override_by_module(tmp_path, override):
    # A group of 256 bits is 8 x 32 or 4 x 64: only the override tells.
    make(tmp_path, quantize(floats(4, 128), 8, 32), {"bits": 4, "group_size": 64, "l": override})
    info = MlxCheckpoint(tmp_path).tensors["l.weight"]
    assert (info.spec, info.shape) == (QuantSpec(8, 32), (4, 128))


def test_module_that_differs_from_the_default_without_a_word(tmp_path):
    make(tmp_path, quantize(floats(4, 128), 8, 64), {"bits": 4, "group_size": 64})
    info = MlxCheckpoint(tmp_path).tensors["l.weight"]
    assert (info.spec, info.shape) == (QuantSpec(8, 64), (4, 128))


def test_ambiguous_shapes_are_not_guessed(tmp_path):
    # A group of 384 bits is 3 x 128 or 6 x 64, and neither has the default's group size.
    make(tmp_path, quantize(floats(4, 256), 3, 128), {"bits": 4, "group_size": 32})
    refuse(tmp_path, "'l'", "3-bit group 128", "6-bit group 64")


def test_override_false_keeps_a_float(tmp_path):
    w = floats(4, 128, dtype="BF16")
    make(tmp_path, {"l.weight": w}, {"bits": 4, "group_size": 64, "l": False})
    checkpoint = MlxCheckpoint(tmp_path)
    assert checkpoint.tensors["l.weight"].dtype == "BF16"
    assert checkpoint.tensors["l.weight"].spec is None
    np.testing.assert_array_equal(checkpoint.read("l.weight"), w)
    with pytest.raises(CheckpointError, match=r"no quantized tensor 'l\.weight'"):
        checkpoint.read_quantized("l.weight")


def test_override_false_on_a_quantized_module(tmp_path):
    make(tmp_path, quantize(floats(4, 128), 4, 64), {"bits": 4, "group_size": 64, "l": False})
    refuse(tmp_path, "'l'", "says that it is not")


@pytest.mark.parametrize("override", [True, {"bits": 8, "group_size": 32}])
def test_override_on_a_float_module(tmp_path, override):
    make(tmp_path, {"l.weight": floats(4, 128)}, {"bits": 4, "group_size": 64, "l": override})
    refuse(tmp_path, "'l'", "has no scales")


def test_override_of_a_module_that_is_not_there(tmp_path):
    make(tmp_path, quantize(floats(4, 128), 4, 64), {"bits": 4, "group_size": 64, "vision.l": False})
    assert list(MlxCheckpoint(tmp_path).tensors) == ["l.weight"]


@pytest.mark.parametrize(
    ("quantization", "reason"),
    [
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, "fit 2-bit group 128 and 4-bit group 64"),
        ({"bits": 4, "group_size": 16, "mode": "nvfp5"}, "affine, mxfp4, mxfp8, nvfp4, got 'nvfp5'"),
        (
            {"bits": 8, "group_size": 64, "mode": "mxfp8"},
            "mode mxfp8 has 8 bits in groups of 32, got 8 in groups of 64",
        ),
        (
            {"bits": 4, "group_size": 64, "l": {"bits": 4, "group_size": 32, "mode": "mxfp4"}},
            "'l' is mxfp4, but its scales are F16",
        ),
        ({"bits": 7, "group_size": 64}, "bits must be one of"),
        ({"bits": 4, "group_size": 48}, "group_size must be one of"),
        ({"bits": 4}, "needs integers"),
        ({"bits": "4", "group_size": 64}, "needs integers"),
    ],
)
def test_settings_that_cannot_be_read(tmp_path, quantization, reason):
    refuse(make(tmp_path, quantize(floats(4, 128), 4, 64), quantization), "config.json", reason)


def test_scales_of_another_mode(tmp_path):
    parts = quantize(floats(4, 128), 4, 64)
    parts["l.scales"] = np.zeros((4, 2), np.uint8)
    refuse(make(tmp_path, parts), "'l.weight'", "scales of dtype U8 and biases")


def test_missing_biases(tmp_path):
    parts = quantize(floats(4, 128), 4, 64)
    del parts["l.biases"]
    refuse(make(tmp_path, parts), "'l.weight'", "no biases")


def test_scales_and_biases_disagree(tmp_path):
    parts = quantize(floats(4, 128), 4, 64)
    make(tmp_path, parts | {"l.biases": parts["l.biases"][:3]})
    refuse(tmp_path, "'l.weight'", "F16 [4, 2]", "F16 [3, 2]")
    make(tmp_path, parts | {"l.biases": parts["l.biases"].astype(np.float32)})
    refuse(tmp_path, "'l.weight'", "F16 [4, 2]", "F32 [4, 2]")


def test_rows_disagree(tmp_path):
    parts = quantize(floats(4, 128), 4, 64)
    make(tmp_path, parts | {"l.weight": parts["l.weight"][:2]})
    refuse(tmp_path, "'l.weight'", "[2, 16]", "[4, 2]")


@pytest.mark.parametrize(
    "settings", [{"l": {"bits": 8, "group_size": 64}}, {"l": {"bits": 4, "group_size": 32}}, {"l": True}]
)
def test_words_disagree_with_bits_and_groups(tmp_path, settings):
    parts = quantize(floats(4, 128), 4, 64)
    if settings["l"] is True:
        parts["l.weight"] = parts["l.weight"][:, :12].copy()
    make(tmp_path, parts, {"bits": 4, "group_size": 64, **settings})
    refuse(tmp_path, "'l.weight'", "2 groups", "words", "disagree")


def test_packed_weight_without_scales(tmp_path):
    parts = quantize(floats(4, 128), 4, 64)
    refuse(make(tmp_path, {"l.weight": parts["l.weight"]}), "'l.weight'", "U32")


def test_directory_without_quantization(tmp_path):
    write_config(tmp_path)
    refuse(tmp_path, "has no quantization")


def test_float_tensors_named_like_parts_stay_themselves(tmp_path):
    make(
        tmp_path,
        {**quantize(floats(4, 128), 4, 64), "x.scales": floats(3), "x.biases": floats(3), "x.weight": floats(3)},
    )
    assert set(MlxCheckpoint(tmp_path).tensors) == {"l.weight", "x.scales", "x.biases", "x.weight"}


def test_reads_what_mlx_itself_saved(tmp_path):
    """A layer quantized and saved by MLX, with its float bias."""
    nn = pytest.importorskip("mlx.nn")
    mx.random.seed(0)
    layer = nn.Linear(128, 8).to_quantized(group_size=32, bits=6)
    write_config(tmp_path, quantization={"group_size": 32, "bits": 6})
    mx.save_safetensors(
        str(tmp_path / "model.safetensors"), {f"l.{k}": v for k, v in layer.parameters().items()}, {"format": "mlx"}
    )
    checkpoint = MlxCheckpoint(tmp_path)
    assert set(checkpoint.tensors) == {"l.weight", "l.bias"}
    expected = mx.dequantize(layer.weight, layer.scales, layer.biases, group_size=32, bits=6)
    np.testing.assert_array_equal(checkpoint.read("l.weight"), np.array(expected))
