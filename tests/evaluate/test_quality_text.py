"""Texts as sequences: where they are cut, what is scored, and files that are no text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlxq.errors import EvaluationError
from mlxq.evaluate.quality import text as quality_text
from mlxq.evaluate.quality.text import TextOptions, read_windows


class Letters:
    """A tokenizer of characters, with start tokens of its own."""

    def __init__(self, *start: int):
        self.start = list(start)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return (self.start if add_special_tokens else []) + [ord(c) for c in text]


def written(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


LINES = "".join(f"line {i:04d}\n" for i in range(300))


@pytest.mark.parametrize("start", [(), (1,), (1, 2)])
@pytest.mark.parametrize("from_end", [False, True])
def test_sequences_follow_one_another(tmp_path: Path, start: tuple[int, ...], from_end: bool) -> None:
    options = TextOptions(written(tmp_path, LINES), sequences=4, length=50, from_end=from_end)
    windows = read_windows(Letters(*start), options)
    assert [len(ids) for ids in windows.sequences] == [50] * 4
    assert all(tuple(ids[: len(start)]) == start for ids in windows.sequences)
    body = "".join(chr(i) for ids in windows.sequences for i in ids[len(start) :])
    n = 4 * (50 - len(start))
    assert body == (LINES[-n:] if from_end else LINES[:n])


@pytest.mark.parametrize("from_end", [False, True])
def test_no_more_of_a_file_is_read_than_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, from_end: bool
) -> None:
    read: list[int] = []
    original = quality_text._read
    monkeypatch.setattr(quality_text, "_read", lambda p, n, e: read.append(n) or original(p, n, e))
    monkeypatch.setattr(quality_text, "_BYTES_PER_TOKEN", 2)
    path = written(tmp_path, LINES * 10)
    read_windows(Letters(), TextOptions(path, sequences=2, length=50, from_end=from_end))
    assert read == [200]
    # Characters of four bytes, but two bytes expected of each: the first piece is too short.
    path = written(tmp_path, "\U0001d11e\n" * 3000)
    windows = read_windows(Letters(), TextOptions(path, sequences=2, length=500, from_end=from_end))
    assert read[1:] == [2000, 8000]
    assert {chr(i) for i in windows.tokens} == {"\U0001d11e", "\n"}


def test_a_piece_without_line_ends_is_cut_between_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_text, "_BYTES_PER_TOKEN", 7)
    path = written(tmp_path, "€" * 5000)
    for from_end in (False, True):
        windows = read_windows(Letters(), TextOptions(path, sequences=1, length=100, from_end=from_end))
        assert set(windows.tokens) == {ord("€")}


def test_all_sequences_of_a_text(tmp_path: Path) -> None:
    assert len(read_windows(Letters(), TextOptions(written(tmp_path, LINES), length=64)).sequences) == 12
    windows = read_windows(Letters(), TextOptions(written(tmp_path, LINES), sequences=0, length=64))
    assert len(windows.sequences) == len(LINES) // 64


@pytest.mark.parametrize(("score", "first"), [("second-half", 4), ("all", 1)])
def test_rows_predict_the_tokens_that_are_scored(tmp_path: Path, score: str, first: int) -> None:
    options = TextOptions(written(tmp_path, LINES), sequences=3, length=8, score=score)
    windows = read_windows(Letters(), options)
    expected = [ids[first:] for ids in windows.sequences]
    assert np.array_equal(windows.targets, np.concatenate(expected))
    assert np.array_equal(windows.of, np.repeat([0, 1, 2], 8 - first))
    assert np.array_equal(windows.tokens[windows.rows + 1], windows.targets)


def test_sections_of_the_sample_are_sequences_of_their_own() -> None:
    windows = read_windows(Letters(7), TextOptions(length=4000))
    assert len(windows.sequences) == 16
    assert len(read_windows(Letters(7), TextOptions(sequences=3)).sequences) == 3
    assert len(set(windows.lengths)) > 1
    assert all(ids[0] == 7 for ids in windows.sequences)
    assert windows.rows.max() < len(windows.tokens) - 1


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    windows = read_windows(Letters(), TextOptions(written(tmp_path, "\ufeff" + LINES), sequences=1, length=4))
    assert "".join(map(chr, windows.tokens)) == "line"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "text.txt: the text is empty"),
        (b" \n\t\n", "text.txt: the text is empty: nothing but white space"),
        (b"some text \xff\xfe and more of it", "text.txt: is not UTF-8 text: byte 10 is 0xff"),
        ("short\n".encode("utf-16"), "text.txt: is not UTF-8 text: byte 0 is 0xff"),
        (b"too short", "text.txt: has 9 tokens, but one sequence needs 16: .* of at most 9 tokens"),
        ("cut off €".encode()[:-1], "text.txt: is not UTF-8 text: byte 8"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        read_windows(Letters(), TextOptions(written(tmp_path, content), length=16))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="No such file"):
        read_windows(Letters(), TextOptions(tmp_path / "absent.txt"))
    with pytest.raises(EvaluationError, match="a directory; name a text file"):
        read_windows(Letters(), TextOptions(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequences": -1}, "number of sequences is -1"),
        ({"length": 1}, "sequences of 1 tokens leave nothing"),
        ({"score": "half"}, "'half' .*second-half, all"),
        ({"from_end": True}, "no end to count from"),
    ],
)
def test_options_without_meaning(options: dict, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        TextOptions(**options)


def test_start_tokens_that_fill_a_sequence(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no room after 2 start tokens"):
        read_windows(Letters(1, 2), TextOptions(written(tmp_path, LINES), length=2))
