"""`inspect`: numbers by hand, for a float and for a quantized directory, from headers alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from mlxq import inspect
from mlxq.checkpoint.base import Checkpoint
from mlxq.conversion import convert
from mlxq.errors import CheckpointError
from mlxq.evaluate.report import render_inspection


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("source") / "m")


@pytest.fixture(scope="module")
def quantized(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "m"
    convert(source, out, bits=4, group_size=64, keep=("lm_head",), verify=False)
    return out


def size(shapes: dict[str, tuple[int, ...]], ndim: int) -> int:
    total = 0
    for shape in shapes.values():
        if len(shape) == ndim:
            total += shape[0] * (shape[1] if ndim == 2 else 1)
    return total


def test_float_model(source: Path) -> None:
    shapes = tiny.llama_shapes(tiny.LLAMA)
    found = inspect(source)
    assert (found.architecture, found.kind) == ("llama", "huggingface")
    assert found.n_weights == size(shapes, 1) + size(shapes, 2)
    assert found.nbytes == 2 * found.n_weights
    assert (found.bpw, found.quantized_bpw) == (16, None)
    assert found.memory.weights == found.nbytes
    assert found.memory.context == found.context_length == 512, "no more than the model's own context"
    assert {t.name: t.shape for t in found.tensors} == shapes


def test_quantized_model(quantized: Path) -> None:
    shapes = tiny.llama_shapes(tiny.LLAMA)
    found = inspect(quantized, context=100)
    layers = sum(a * b for n, (a, b) in ((n, s) for n, s in shapes.items() if len(s) == 2) if ".layers." in n)
    one = shapes["lm_head.weight"][0] * shapes["lm_head.weight"][1]
    # 4 bits, and a scale and a bias of 16 bits for 64 weights; the embedding has 6 bits; head and norms are bfloat16.
    nbytes = layers * 4.5 / 8 + one * 6.5 / 8 + 2 * one + 2 * size(shapes, 1)
    assert found.nbytes == nbytes
    assert found.n_weights == layers + 2 * one + size(shapes, 1)
    assert found.bpw == pytest.approx(8 * nbytes / found.n_weights)
    assert found.quantized_bpw == pytest.approx((layers * 4.5 + one * 6.5) / (layers + one))
    by_name = {t.name: t for t in found.tensors}
    assert by_name["model.layers.0.mlp.up_proj.weight"].format == "4-bit group 64, BF16 scales"
    assert by_name["model.layers.0.mlp.up_proj.weight"].bpw == 4.5
    assert by_name["lm_head.weight"].format == "BF16"
    assert sum(f.nbytes for f in found.formats) == found.nbytes
    assert sum(f.n_tensors for f in found.formats) == len(found.tensors) == len(shapes)


def test_json_and_text(quantized: Path) -> None:
    found = inspect(quantized)
    told = found.to_dict()
    assert told == json.loads(json.dumps(told))
    assert told["bytes"] == found.nbytes
    assert told["memory"]["total_bytes"] == found.memory.total
    text = render_inspection(found)
    assert "model.layers.1.mlp.down_proj.weight" in text
    assert f"{found.bpw:.3f} bits per weight" in text
    assert "down_proj" not in render_inspection(found, tensors=False)


def test_no_weight_is_read(source: Path, quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a weight was read")

    for kind in Checkpoint.__subclasses__():
        for cls in (kind, *kind.__subclasses__()):
            monkeypatch.setattr(cls, "read", refuse)
            monkeypatch.setattr(cls, "read_quantized", refuse)
    assert inspect(source).n_weights == inspect(quantized).n_weights


def test_layers_are_in_numeric_order(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 11, "hidden_size": 32, "intermediate_size": 32}
    source = tiny.make_model(
        tmp_path / "m", tensors=tiny.random_tensors(tiny.llama_shapes(tiny.LLAMA | config)), **config
    )
    layers = [int(t.name.split(".")[2]) for t in inspect(source).tensors if ".layers." in t.name]
    assert layers == sorted(layers)


def test_needs_no_mlx(source: Path) -> None:
    code = f"import sys, mlxq; mlxq.inspect({str(source)!r}); sys.exit('mlx.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_gguf(smollm2_gguf: Path) -> None:
    found = inspect(smollm2_gguf)
    assert (found.architecture, found.kind) == ("llama", "gguf")
    assert found.n_weights == 134_515_008
    assert {f.format: f.n_tensors for f in found.formats} == {"Q4_1": 210, "Q8_0": 1, "F32": 61}
    # 32 weights in 20 bytes, in 34, in 128
    assert {t.bpw for t in found.tensors} == {5.0, 8.5, 32.0}


def test_errors(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="at least 1"):
        inspect(source, context=0)
    with pytest.raises(CheckpointError):
        inspect(tmp_path / "missing")
    with pytest.raises(TypeError, match="valid: source, revision, context"):
        inspect(source, contxt=5)
