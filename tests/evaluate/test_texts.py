"""The built-in text: present, in many languages, the same sequences every time."""

from __future__ import annotations

import pytest

from mlxq.errors import CheckpointError
from mlxq.evaluate.texts import MAX_TOKENS, sections, token_sequences


class Bytes:
    """A tokenizer of bytes that adds an end marker."""

    eos_token_id = 256

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [*text.encode(), *([256] if add_special_tokens else [])]


def test_sections() -> None:
    found = sections()
    assert len(found) == 16
    assert {"story", "python", "dialogue", "mathematics", "german", "french", "spanish", "chinese", "arabic"} <= set(
        found
    )
    assert all(len(body) > 100 and not body.startswith("===") for body in found.values())
    ranges = {"russian": ("а", "я"), "chinese": ("\u4e00", "\u9fff"), "arabic": ("\u0621", "\u064a")}
    for name, (low, high) in ranges.items():
        assert sum(low <= c <= high for c in found[name].lower()) > 0.6 * len(found[name])


def test_sequences_are_cut_and_without_end_marker() -> None:
    sequences = token_sequences(Bytes(), 257)
    assert len(sequences) == 16
    assert all(len(ids) == MAX_TOKENS for ids in sequences)
    short = token_sequences(Bytes(), max_tokens=10**6)
    assert all(256 not in ids for ids in short)
    assert bytes(short[0]).decode() == sections()["story"]


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    with pytest.raises(CheckpointError, match="vocabulary has 200"):
        token_sequences(Bytes(), 200)


def test_a_tokenizer_that_yields_nothing_is_refused() -> None:
    class Empty:
        eos_token_id = None

        def encode(self, text: str) -> list[int]:
            return []

    with pytest.raises(CheckpointError, match="nothing can be verified"):
        token_sequences(Empty())
