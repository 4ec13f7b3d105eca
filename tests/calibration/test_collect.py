"""An importance matrix of our own: the mean squares of what goes into each matrix, read by llama.cpp's tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architecture_zoo
import cyllama_quantize
import gguf
import gguf_zoo
import mlx.core as mx
import numpy as np
import pytest
import tiny

from mlxq.architectures.parameters import ParameterMap
from mlxq.calibration.collect import importance_matrix
from mlxq.calibration.imatrix import ImportanceMatrix, Sums
from mlxq.calibration.stream import BlockStream
from mlxq.checkpoint.source import open_checkpoint
from mlxq.conversion import convert
from mlxq.conversion.importance import gguf_names, write_importance
from mlxq.errors import CalibrationError

SEQUENCES = np.random.default_rng(5).integers(0, 101, (5, 13)).astype(np.int32)
EPSILON = 1e-5


def collected(path: Path, sequences: np.ndarray, **options: Any) -> tuple[ImportanceMatrix, dict[str, np.ndarray]]:
    with open_checkpoint(path) as checkpoint:
        parameters = ParameterMap(checkpoint)
        names = {n: m.name for n, m in gguf_names(parameters).items() if len(parameters.tensors[n].shape) > 1}
        with BlockStream(parameters, sequences) as stream:
            matrix = importance_matrix(stream, names, **options)
        return matrix, {n: np.array(parameters.read(n)) for n in parameters.tensors}


def normed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * weight


def test_means_are_those_of_the_inputs(tmp_path: Path) -> None:
    path = architecture_zoo.save(tmp_path / "m", architecture_zoo.config_of("llama"))
    calls = []
    matrix, w = collected(path, SEQUENCES, dataset="words", length=13, on_block=lambda *done: calls.append(done))
    x = normed(w["model.embed_tokens.weight"][SEQUENCES], w["model.layers.0.input_layernorm.weight"])
    expected = (x * x).reshape(-1, 64).mean(axis=0)
    for name in ("q", "k", "v"):
        np.testing.assert_allclose(matrix.get(f"blk.0.attn_{name}.weight"), expected, rtol=1e-4)
    assert matrix.entries["blk.0.ffn_down.weight"].sums.shape == (1, 128)
    assert set(matrix.entries) == {
        "output.weight",
        *(f"blk.{i}.{n}.weight" for i in range(4) for n in ("attn_q", "attn_k", "attn_v", "attn_output")),
        *(f"blk.{i}.ffn_{n}.weight" for i in range(4) for n in ("gate", "up", "down")),
    }
    assert {int(e.counts[0]) for e in matrix.entries.values()} == {65}
    assert (matrix.datasets, matrix.chunk_count, matrix.chunk_size) == (("words",), 5, 13)
    assert calls == [(i, 5) for i in range(1, 6)]


def test_every_expert_counts_its_own_rows(tmp_path: Path) -> None:
    path = architecture_zoo.save(tmp_path / "m", architecture_zoo.config_of("mixtral"))
    matrix, _ = collected(path, SEQUENCES)
    up, down = (matrix.entries[f"blk.1.ffn_{n}_exps.weight"] for n in ("up", "down"))
    # Each of 65 tokens goes to two of four experts.
    assert up.counts.sum() == down.counts.sum() == 130
    np.testing.assert_array_equal(up.counts, down.counts)
    assert up.sums.shape == (4, 64)
    assert down.sums.shape == (4, 128)


def test_a_tied_embedding_counts_as_a_head(tmp_path: Path) -> None:
    path = architecture_zoo.save(tmp_path / "m", architecture_zoo.config_of("llama_tied"))
    matrix, _ = collected(path, SEQUENCES)
    assert matrix.entries["token_embd.weight"].counts.tolist() == [65]


def test_inputs_that_are_not_finite_are_named(tmp_path: Path) -> None:
    path = architecture_zoo.save(tmp_path / "m", architecture_zoo.config_of("llama"))
    arrays = mx.load(str(path / "model.safetensors"))
    arrays["model.layers.1.mlp.up_proj.weight"] *= 1e38
    mx.save_safetensors(str(path / "model.safetensors"), arrays, metadata={"format": "pt"})
    with pytest.raises(CalibrationError, match=r"model.layers.1.mlp.down_proj.weight: its inputs are not finite"):
        collected(path, SEQUENCES)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["gguf", "dat"])
def test_llama_cpps_quantizer_takes_it(tmp_path: Path, suffix: str) -> None:
    libgguf = pytest.importorskip("libgguf", reason="libgguf, which reads importance matrices, is not installed")
    source = tiny.make_model(tmp_path / "source", hidden_size=256, intermediate_size=512)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    options = {"calib": tmp_path / "text.txt", "calib_sequences": 8, "calib_length": 64}
    written = write_importance(source, tmp_path / f"m.{suffix}", **options)
    read = libgguf.load_imatrix(tmp_path / f"m.{suffix}")
    assert set(read) == set(written.entries) == set(ImportanceMatrix.read(tmp_path / f"m.{suffix}").entries)
    assert len(read) == 2 * 7 + 1
    original = gguf_zoo.write_gguf(source, tmp_path / "original.gguf", type_name="BF16")
    weighted = cyllama_quantize.quantize(original, tmp_path / "weighted.gguf", "Q4_K_S", read)
    plain = cyllama_quantize.quantize(original, tmp_path / "plain.gguf", "Q4_K_S")
    exact = {t.name: t for t in gguf.GGUFReader(original).tensors}
    errors = [_errors(made, exact, read) for made in (weighted, plain)]
    assert sum(errors[0].values()) < sum(errors[1].values())


def _errors(made: gguf.GGUFReader, exact: dict[str, Any], weights: dict[str, np.ndarray]) -> dict[str, float]:
    """Weighted squared error of each matrix, relative."""
    out = {}
    for t in made.tensors:
        if t.name in weights:
            w = gguf.quants.dequantize(exact[t.name].data, exact[t.name].tensor_type)
            e = gguf.quants.dequantize(t.data, t.tensor_type) - w
            out[t.name] = float((e * e * weights[t.name]).sum() / (w * w * weights[t.name]).sum())
    return out


def test_our_reader_takes_it(tmp_path: Path) -> None:
    source = tiny.add_merge(tiny.make_model(tmp_path / "source", eos_token_id=257, bos_token_id=258))
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    write_importance(source, tmp_path / "m.gguf", calib=tmp_path / "text.txt", calib_sequences=8, calib_length=64)
    result = convert(source, tmp_path / "out.gguf", type="Q4_0", imatrix=tmp_path / "m.gguf", verify=False)
    # The embedding alone is looked up, and has no importance.
    assert [n for n in result.notes if "importance" in n] == [
        "one tensor has no importance in the matrix, so all their channels count alike: token_embd.weight"
    ]


def test_experts_that_no_token_reached_are_counted() -> None:
    seen = Sums(np.ones((2, 4), np.float32), np.ones(2, np.float32))
    some = Sums(np.ones((3, 4), np.float32), np.array([0, 5, 0], np.float32))
    assert ImportanceMatrix({"a": seen, "b": some}).unseen() == {"b": 2}
