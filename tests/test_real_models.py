"""Real models end to end: what mlxq makes, unmodified mlx-lm loads, with the same logits there as here."""

import json

import mlx.core as mx
import numpy as np
import pytest

import mlxq

pytestmark = pytest.mark.slow

PROMPT = "The capital of France is Paris, and the capital of Germany is"


def stock_logits(path, ids):
    """Unmodified mlx-lm in float32: its half-precision CPU kernels round every step of a sum."""
    from mlx_lm import load

    model, _ = load(str(path))
    model.set_dtype(mx.float32)
    return np.array(model(mx.array([ids])))[0]


def our_logits(path, ids):
    with mlxq.load(path) as model:
        return np.array(model.module(mx.array([ids])).astype(mx.float32))[0]


def tokens(path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path), local_files_only=True).encode(PROMPT)


def assert_same_logits(path):
    ids = tokens(path)
    stock, ours = stock_logits(path, ids), our_logits(path, ids)
    # float32 sums of up to 1536 products in other orders: 1536 * 2^-24 = 1e-4 of the largest, at the very worst.
    assert np.abs(stock - ours).max() <= 1e-4 * np.abs(stock).max()
    assert (stock.argmax(-1) == ours.argmax(-1)).all()


def test_the_reference_checkpoint(reference_checkpoint, tmp_path):
    out = tmp_path / "4bit"
    result = mlxq.convert(reference_checkpoint, out, bits=4)
    # Rounding to nearest costs this model about 0.87 nats; a factor of 1.5 leaves room for another BLAS, not for a bug.
    assert 0.6 < result.verification.kl < 1.3
    assert result.verification.perplexity_source < 25
    assert_same_logits(out)
    stored = json.loads((out / "mlxq.json").read_text())["verification"]
    assert stored["kl_nats_per_token"] == pytest.approx(result.verification.kl, rel=1e-5)


def test_smollm2_keeps_its_codes_and_predictions(smollm2_gguf, tmp_path):
    out = tmp_path / "smollm2"
    result = mlxq.convert(smollm2_gguf, out)
    assert {p.action for p in result.plan.tensors} == {"repack", "keep"}
    # Only float32 norms were rounded to float16, and they are exact in it: nothing is left to differ.
    assert result.verification.kl < 1e-6
    assert result.verification.agreement == 1
    assert_same_logits(out)


def test_smollm2_answers_from_the_gguf_and_from_the_result(smollm2_gguf, tmp_path):
    mlxq.convert(smollm2_gguf, tmp_path / "out", bits=4, group_size=32, verify=False)
    for source in (smollm2_gguf, tmp_path / "out"):
        result = mlxq.generate(source, "What is the capital of France?", max_tokens=12)
        assert "Paris" in result.text
