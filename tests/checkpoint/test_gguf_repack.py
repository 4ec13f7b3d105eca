"""Codes of a GGUF file that a conversion takes over are the same codes, and the proof tells when one is not."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from gguf_models import add_byte_tokenizer, llama_weights, write_llama

from mlxq.architectures.parameters import ParameterMap
from mlxq.checkpoint.source import open_checkpoint
from mlxq.conversion import convert
from mlxq.evaluate.tensors import TensorError, tensor_errors

DOWN = "model.layers.1.mlp.down_proj.weight"


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
