"""A conversion to GGUF on a GPU: its threads encode the K types with the Metal kernels."""

from __future__ import annotations

import gguf
import gguf_zoo
import mlx.core as mx
import numpy as np
import pytest
import tiny
from pretended_gpu import pretend_gpu

from mlxq.calibration.imatrix import ImportanceMatrix, Sums
from mlxq.conversion import convert
from mlxq.formats import ggml
from mlxq.ops.dispatch import METAL_ENCODERS

#: Rows of whole super-blocks.
WIDE = {"hidden_size": 256, "intermediate_size": 512}


def _stored(path):
    return {t.name: (t.tensor_type.name, np.array(t.data)) for t in gguf.GGUFReader(path).tensors if t.data.ndim > 1}


@pytest.mark.slow
@pytest.mark.parametrize(("file_type", "types"), [("Q4_K_M", {"Q4_K", "Q6_K"}), ("Q2_K", {"Q2_K", "Q3_K", "Q6_K"})])
def test_a_conversion_encodes_on_the_gpu(metal, monkeypatch, tmp_path, file_type, types):
    original = tiny.make_model(tmp_path / "source", tokenizer=False, vocab_size=gguf_zoo.VOCAB, **WIDE)
    source = gguf_zoo.write_gguf(original, tmp_path / "source.gguf", type_name="BF16")
    importance = np.random.default_rng(0).lognormal(0, 0.5, (1, 512)).astype(np.float32)
    sums = {f"blk.{i}.ffn_down.weight": Sums(importance, np.ones(1, np.float32)) for i in range(2)}
    ImportanceMatrix(sums, ("words",), 1).write(tmp_path / "m.gguf")
    how = {"type": file_type, "imatrix": tmp_path / "m.gguf", "verify": False}
    pretend_gpu(monkeypatch, metal=True)
    with metal.options(mode="fast"):
        convert(source, tmp_path / "gpu.gguf", **how)
    if not metal.real:
        used = [name.removeprefix("ggml_quantize_").upper() for name, _ in metal.launches]
        assert {name[:4] for name in used} == types
        assert any(name.endswith("WEIGHTED_1") for name in used)
    launches = len(metal.launches)
    monkeypatch.setenv("MLXQ_BACKEND", "numpy")
    convert(source, tmp_path / "cpu.gguf", **how)
    assert len(metal.launches) == launches
    ours, theirs = _stored(tmp_path / "gpu.gguf"), _stored(tmp_path / "cpu.gguf")
    assert ours.keys() == theirs.keys()
    weights = mx.load(str(original / "model.safetensors"))
    w = np.array(weights["model.embed_tokens.weight"].astype(mx.float32))
    for name, (type_name, blocks) in ours.items():
        assert (type_name, blocks.shape) == (theirs[name][0], theirs[name][1].shape)
        if name == "token_embd.weight":
            errors = [np.square(ggml.dequantize(b, type_name) - w).sum() for b in (blocks, theirs[name][1])]
            # Ties, as in test_ggml_quantize.py.
            assert errors[0] <= 1.01 * errors[1]
        if type_name not in METAL_ENCODERS:
            assert np.array_equal(blocks, theirs[name][1])
