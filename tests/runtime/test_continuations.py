"""Texts written several at once: the same as one by one, seeded, ended by stop tokens, refused when not finite."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlxq.calibration.texts import SELF, calibration_sequences
from mlxq.errors import Cancelled, GenerationError
from mlxq.runtime.continuations import continuations
from mlxq.types import CancelToken

PROMPTS = [[257, *b"abcdefg"], [257, *b"hijklmn"], [257, *b"zz"], [257, *b"opqrstu"], [257, *b"123"], [257, *b"456"]]


def greedy(model, ids, n):
    ids = list(ids)
    for _ in range(n):
        ids.append(int(mx.argmax(model.module(mx.array([ids]))[0, -1]).item()))
    return ids[-n:]


@pytest.fixture
def endless(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "stop_tokens", frozenset())
    return tiny


def test_rows_are_those_of_single_texts(endless):
    """Prompts of one length go together; the order of the answers is that of the prompts."""
    found = list(continuations(endless, temperature=0, rows=2)(PROMPTS, 6, 0))
    assert found == [greedy(endless, p, 6) for p in PROMPTS]


def test_drawn_texts_are_seeded(endless):
    write = continuations(endless)
    assert list(write(PROMPTS, 12, 5)) == list(write(PROMPTS, 12, 5))
    assert list(write(PROMPTS, 12, 5)) != list(write(PROMPTS, 12, 6))
    # Two batches of the same prompts are not the same text.
    twice = list(write([PROMPTS[0]] * 16, 12, 5))
    assert twice[:8] != twice[8:]
    assert len({tuple(t) for t in twice}) == 16


def test_a_row_ends_before_its_stop_token(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "stop_tokens", frozenset())
    free = list(continuations(tiny, rows=4)(PROMPTS[:2], 40, 1))
    monkeypatch.setattr(tiny, "stop_tokens", frozenset({free[0][10]}))
    ended = list(continuations(tiny, rows=4)(PROMPTS[:2], 40, 1))
    for whole, cut in zip(free, ended, strict=True):
        stop = whole.index(free[0][10]) if free[0][10] in whole else 40
        assert cut == whole[:stop]
    assert len(ended[0]) <= 10


def test_cancelled(endless):
    cancel = CancelToken()
    cancel.cancel()
    with pytest.raises(Cancelled):
        list(continuations(endless, cancel=cancel)(PROMPTS, 5, 0))


def test_logits_that_are_not_finite_are_refused(endless, monkeypatch):
    norm = endless.module.model.norm
    broken = mx.full(norm.weight.shape, mx.nan, norm.weight.dtype)
    mx.eval(broken)
    monkeypatch.setitem(norm, "weight", broken)
    with pytest.raises(GenerationError, match="not finite while it writes its calibration text"):
        list(continuations(endless)(PROMPTS, 5, 0))


def test_a_model_writes_its_own_calibration_text(endless):
    options = {"n_sequences": 5, "length": 32, "vocab_size": 320, "generate": continuations(endless)}
    one = calibration_sequences(endless.tokenizer, SELF, **options)
    two = calibration_sequences(endless.tokenizer, SELF, **options)
    assert one.sequences.shape == (5, 32)
    assert one.sha256 == two.sha256
    assert one.sha256 != calibration_sequences(endless.tokenizer, SELF, seed=1, **options).sha256
