"""GPTQ and AWQ layers by their producers (goldens): decoded bit for bit, and as affine codes that decode alike."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from checkpoint_builders import write_config, write_safetensors

from mlxq.checkpoint.source import open_checkpoint
from mlxq.formats.crossings import dequantize

GOLDENS = Path(__file__).parents[1] / "goldens" / "packed_layers.npz"


def load_cases():
    cases = {}
    with np.load(GOLDENS) as stored:
        for key in stored.files:
            name, _, tensor = key.partition("/")
            cases.setdefault(name, {})[tensor] = stored[key]
    return cases


CASES = load_cases()


@pytest.fixture
def opened(request, tmp_path):
    parts = dict(CASES[request.param])
    write_config(tmp_path, quantization_config=json.loads(str(parts.pop("settings"))))
    golden = str(parts.pop("decoded"))
    write_safetensors(tmp_path / "model.safetensors", {f"a.{n}": v for n, v in parts.items()})
    with open_checkpoint(tmp_path) as checkpoint:
        yield checkpoint, golden


@pytest.mark.parametrize("opened", CASES, indirect=True)
def test_decoded_as_the_producer_decodes(opened):
    checkpoint, golden = opened
    w = checkpoint.read("a.weight")
    assert w.dtype == np.float32
    assert w.shape == checkpoint.tensors["a.weight"].shape
    assert hashlib.sha256(w.tobytes()).hexdigest() == golden
    for rows in (slice(0, 1), slice(3, 14), slice(9, 32), slice(7, 7)):
        np.testing.assert_array_equal(checkpoint.read("a.weight", rows), w[rows])


@pytest.mark.parametrize("opened", CASES, indirect=True)
def test_codes_are_the_same_weights(opened):
    checkpoint, _ = opened
    w, info = checkpoint.read("a.weight"), checkpoint.tensors["a.weight"]
    order = np.arange(w.shape[1])
    if info.permuted_spec is not None:
        order = checkpoint.read_order("a.weight")
        assert (np.diff(order) < 0).any()
    for rows in (None, slice(3, 14)):
        q = checkpoint.read_quantized("a.weight", rows)
        assert q.spec == (info.spec or info.permuted_spec)
        np.testing.assert_array_equal(dequantize(q), w[rows or slice(None)][:, order])


@pytest.mark.parametrize("opened", [n for n in CASES if "-sym" in n or "gemv_fast" in n], indirect=True)
def test_symmetric_grids_keep_their_scales(opened):
    checkpoint, _ = opened
    assert checkpoint.tensors["a.weight"].scales_dtype == "F16"
    assert checkpoint.read_quantized("a.weight").dtype == "F16"
