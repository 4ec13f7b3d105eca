"""Directories that GPTQModel wrote (goldens): its settings as it spells them, its weights, and what they predict."""

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny

import mlxq

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(params=sorted(p.name for p in GOLDENS.glob("gptqmodel_*")))
def source(request, tmp_path):
    copied = shutil.copytree(GOLDENS / request.param, tmp_path / request.param)
    tiny.write_tokenizer(copied)
    return copied


def difference(path, golden):
    with np.load(golden / "logits.npz") as stored, mlxq.load(path) as model:
        found = np.array(model.module(mx.array(stored["tokens"])).astype(mx.float32))
        return np.abs(found - stored["logits"]).max() / np.abs(stored["logits"]).max()


def test_predicts_what_the_producer_s_weights_predict(source):
    # float32 against float32: sums in another order.
    assert difference(source, source) < 1e-4


def test_predicts_the_same_when_it_is_converted(source, tmp_path):
    # Columns out of order are decoded, and rounded where the model is bfloat16.
    dtype = "float32" if source.name.endswith("act") else None
    plan = mlxq.convert(source, tmp_path / "out", dtype=dtype, verify=False).plan
    assert any(p.info.dtype in ("GPTQ", "AWQ") for p in plan.tensors)
    assert difference(tmp_path / "out", source) < 1e-3
