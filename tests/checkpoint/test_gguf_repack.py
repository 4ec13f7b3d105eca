"""What a conversion takes over from a GGUF file, what it changes, and that it says both."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import gguf_models
import mlx.core as mx
import numpy as np
import pytest
from gguf_models import add_byte_tokenizer, llama_weights, write_llama

from mlxq.architectures.parameters import ParameterMap
from mlxq.checkpoint.gguf.checkpoint import GgufCheckpoint
from mlxq.checkpoint.source import open_checkpoint
from mlxq.conversion import ConversionResult, convert
from mlxq.errors import FormatError, PlanError
from mlxq.evaluate.tensors import TensorError, tensor_errors
from mlxq.formats import crossings, ggml
from mlxq.formats.geometry import block_format
from mlxq.plan.recoding import RECODINGS
from mlxq.types import QuantizedTensor

DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.norm.weight"


def errors(source: Path, result: Path) -> list[TensorError]:
    with open_checkpoint(source) as a, open_checkpoint(result) as b:
        return tensor_errors(ParameterMap(a), ParameterMap(b))


@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_codes_are_compared_as_codes(tmp_path: Path, type_name: str) -> None:
    """Decoded values differ a little: MLX decodes in float16 and rounds twice, the reader of GGUF in float32."""
    # Offsets of weights far from 0 are large against their steps, which makes the most of the two roundings.
    weights = {n: w + 1 if n == DOWN else w for n, w in llama_weights(vocab=400).items()}
    source = write_llama(tmp_path / "m.gguf", weights, type_name=type_name, configure=add_byte_tokenizer)
    out = tmp_path / "out"
    assert convert(source, out).verification.passed
    found = [e for e in errors(source, out) if e.exact and e.spec]
    assert DOWN in [e.name for e in found]
    assert all(e.rmse == 0 and not e.broken for e in found)
    stored = dict(mx.load(str(out / "model.safetensors")))
    mx.eval(stored)
    words = np.array(stored[DOWN])
    words[3, 1] ^= 1  # one code of the whole model
    stored[DOWN] = mx.array(words)
    mx.save_safetensors(str(out / "model.safetensors"), stored, metadata={"format": "mlx"})
    assert [e.name for e in errors(source, out) if e.broken] == [DOWN]


def random_tensor(rng: np.random.Generator, shape: tuple[int, ...], type_name: str) -> np.ndarray:
    """Random blocks, bytes as they come, of ordinary weights: those with large or tiny scales are passed over."""
    format_ = block_format(type_name)
    n = shape[0] * shape[1] // format_.block_size
    blocks = rng.integers(0, 256, (4 * n, format_.type_size), dtype=np.uint8)
    largest = np.abs(np.nan_to_num(ggml.dequantize(blocks, type_name), nan=np.inf)).max(axis=1)
    return rng.choice(blocks[(largest < 2) & (largest > 1e-3)], n).reshape(shape[0], -1)


@pytest.fixture
def llama_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a llama whose matrices are random blocks of a type, 256 wide; `norms` is the type of the norms."""
    for name, value in {"HIDDEN": 256, "HEAD_DIM": 64, "FFN": 256, "LAYERS": 2}.items():
        monkeypatch.setattr(gguf_models, name, value)

    def write(type_name: str, norms: str = "F32") -> Path:
        rng = np.random.default_rng(0)

        def add(writer: gguf.GGUFWriter, name: str, w: np.ndarray, type_name: str) -> None:
            kind = gguf.GGMLQuantizationType[type_name if w.ndim > 1 else norms]
            data = random_tensor(rng, w.shape, type_name) if w.ndim > 1 else gguf.quants.quantize(w, kind)
            writer.add_tensor(name, data, raw_shape=data.shape, raw_dtype=kind)

        monkeypatch.setattr(gguf_models, "add_tensor", add)
        path = tmp_path / f"{type_name}-{norms}.gguf"
        return write_llama(path, llama_weights(vocab=272), type_name=type_name, configure=add_byte_tokenizer)

    return write


def stored_tensor(out: Path, name: str, result: ConversionResult) -> np.ndarray:
    """Weights of a tensor as float32 numbers, from the result's own codes and grid, or floats."""
    arrays = dict(mx.load(str(out / "model.safetensors")))
    plan = next(p for p in result.plan.tensors if p.info.name == name)
    if plan.spec is None:
        return np.array(arrays[name].astype(mx.float32))
    path = name.removesuffix("weight")
    if plan.spec.mode != "affine":
        parts = mx.array(arrays[name]), arrays[f"{path}scales"]
        return np.array(mx.dequantize(*parts, mode=plan.spec.mode, dtype=mx.float32))
    scales, biases = (np.array(arrays[path + part].astype(mx.float32)) for part in ("scales", "biases"))
    q = QuantizedTensor(np.array(arrays[name]), scales, biases, plan.spec, plan.info.shape, "F32")
    return crossings.dequantize(q)


def source_tensor(source: Path, name: str) -> np.ndarray:
    with GgufCheckpoint(source) as checkpoint:
        return checkpoint.read(name)


def manifest(out: Path) -> dict[str, dict]:
    return {t["name"]: t for t in json.loads((out / "mlxq.json").read_text())["tensors"]}


GRIDS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "TQ1_0", "TQ2_0"]


@pytest.mark.parametrize("type_name", GRIDS)
def test_exact_gives_every_weight_as_it_was(tmp_path: Path, llama_of, type_name: str) -> None:
    source, out = llama_of(type_name), tmp_path / "out"
    result = convert(source, out, exact=True, dtype="float32", verify=False)
    assert {p.action for p in result.plan.tensors} == {"repack", "keep"}
    for p in result.plan.tensors:
        np.testing.assert_array_equal(stored_tensor(out, p.info.name, result), source_tensor(source, p.info.name))
        assert manifest(out)[p.info.name]["relative_error"] == 0
    assert result.notes == ()


@pytest.mark.parametrize("type_name", ["Q4_K", "Q5_K"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounded_scales_are_stated(tmp_path: Path, llama_of, type_name: str, dtype: str) -> None:
    source, out = llama_of(type_name), tmp_path / "out"
    result = convert(source, out, dtype=dtype, verify=False)
    w, w_hat = source_tensor(source, DOWN), stored_tensor(out, DOWN, result)
    entry = manifest(out)[DOWN]
    assert entry["action"] == "repack"
    # Sums of squares in float32, in parts.
    assert entry["relative_error"] == pytest.approx(np.linalg.norm(w_hat - w) / np.linalg.norm(w), rel=1e-3)
    assert 0 < entry["relative_error"] < {"float16": 2**-9, "bfloat16": 2**-6}[dtype]
    repacked = [n for n in result.notes if f"repacked, the same codes with scales rounded to {dtype}" in n]
    worst = max((t for t in manifest(out).values() if t["action"] == "repack"), key=lambda t: t["relative_error"])
    assert len(repacked) == 1
    assert repacked[0].endswith(f"up to {worst['relative_error']:.2g}, in {worst['name']}")
    norms = {"float16": "F16", "bfloat16": "BF16"}[dtype]
    with pytest.raises(
        FormatError, match=rf"\.weight: --exact: rounding to {dtype} changes its weights: use --dtype float"
    ):
        convert(llama_of(type_name, norms), tmp_path / "other", dtype=dtype, exact=True, verify=False)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("type_name", ["Q6_K", "Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS", "IQ3_S"])
def test_new_codes_are_measured(tmp_path: Path, llama_of, type_name: str) -> None:
    source, out = llama_of(type_name), tmp_path / "out"
    result = convert(source, out, verify=False)
    entry = manifest(out)[DOWN]
    assert (entry["action"], entry["from"]) == ("requantize", type_name)
    assert (entry["bits"], entry["group_size"]) == (
        RECODINGS[type_name].spec.bits,
        RECODINGS[type_name].spec.group_size,
    )
    w, w_hat = source_tensor(source, DOWN), stored_tensor(out, DOWN, result)
    measured = np.linalg.norm(w_hat - w) / np.linalg.norm(w)
    assert entry["relative_error"] == pytest.approx(measured, rel=1e-3)
    assert any("requantized; relative error up to" in n for n in result.notes)
    errors = {t["name"]: t["relative_error"] for t in manifest(out).values() if t["action"] == "requantize"}
    beyond = [n for n, e in errors.items() if e > RECODINGS[type_name].bound]
    said = [n for n in result.notes if "lost more by it than half the usual error" in n]
    assert len(said) == bool(beyond)
    if beyond:
        assert said[0].startswith(f"{len(beyond)} tensor")
    if ggml.affine_spec(type_name) is None:
        with pytest.raises(PlanError, match=f"--exact: model.embed_tokens.weight would change from {type_name} to"):
            convert(source, tmp_path / "other", exact=True, verify=False)


def test_decoded_blocks_may_be_kept_exactly(tmp_path: Path, llama_of) -> None:
    source, out = llama_of("Q6_K"), tmp_path / "out"
    result = convert(source, out, exact=True, dtype="float32", keep=("weight",), verify=False)
    np.testing.assert_array_equal(stored_tensor(out, DOWN, result), source_tensor(source, DOWN))
    assert result.plan.tensors[0].reason.endswith("decoded from Q6_K")


def test_rounded_norms_are_stated(tmp_path: Path, llama_of) -> None:
    source, out = llama_of("Q4_1"), tmp_path / "out"
    result = convert(source, out, verify=False)
    w = source_tensor(source, NORM)
    measured = np.linalg.norm(w.astype(np.float16).astype(np.float32) - w) / np.linalg.norm(w)
    assert manifest(out)[NORM]["relative_error"] == pytest.approx(measured, rel=1e-3)
    assert [n for n in result.notes if "kept and rounded to float16" in n]
    with pytest.raises(FormatError, match=r"norm.weight: --exact: rounding to float16 changes its weights"):
        convert(source, tmp_path / "other", exact=True, verify=False)
    # What a smaller type held before loses nothing in it.
    exact = convert(llama_of("Q4_1", norms="F16"), tmp_path / "exact", exact=True, verify=False)
    assert (exact.plan.dtype, exact.notes) == ("F16", ())


def test_manifests_of_equal_runs_are_equal(tmp_path: Path, llama_of) -> None:
    """Threads finish in any order; what they measured is added up without one."""
    source = llama_of("Q6_K")
    texts = []
    for i in range(2):
        convert(source, tmp_path / str(i), verify=False)
        texts.append((tmp_path / str(i) / "mlxq.json").read_text())
    assert texts[0] == texts[1]
