"""Calibration text: the built-in sample's properties, packing, files, what the model writes, and every refusal."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxq.calibration import builtin, text_files
from mlxq.calibration.texts import SELF, CalibrationText, calibration_sequences
from mlxq.errors import CalibrationError
from mlxq.evaluate.texts import sections
from mlxq.types import Progress

BOS, EOS = 257, 256


class Bytes:
    """A tokenizer of bytes: what it puts around a text is told, and the chat template is `<role>content` lines."""

    eos_token_id = EOS

    def __init__(self, start: tuple[int, ...] = (BOS,), end: tuple[int, ...] = (), chat: bool = True):
        self.start, self.end = start, end
        self.chat_template = "a template" if chat else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = list(text.encode())
        return [*self.start, *ids, *self.end] if add_special_tokens else ids

    def apply_chat_template(self, messages: list[dict[str, Any]], return_dict: bool) -> list[int]:
        assert not return_dict
        if messages[0]["role"] == "tool":
            raise ValueError("no\nsuch role")
        text = "".join(f"<{m['role']}>{m['content']}\n" for m in messages)
        return [*self.start, *text.encode()]


def text_of(calibration: CalibrationText, n_start: int = 1) -> bytes:
    return bytes(calibration.sequences[:, n_start:].ravel().tolist())


def file(tmp_path: Path, content: bytes | str, name: str = "calib.txt") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# The built-in text


def test_builtin_is_large_and_of_many_kinds() -> None:
    sizes = {g: sum(len(b.encode()) for _, b in docs) for g, docs in builtin.groups().items()}
    total = sum(sizes.values())
    assert total >= 160_000
    assert set(sizes) == {"english", "code", "languages"}
    assert sizes["english"] >= 0.4 * total
    assert 0.18 * total <= sizes["code"] <= 0.33 * total
    assert 0.15 * total <= sizes["languages"] <= 0.33 * total
    domains = {d.domain for d in builtin.documents()}
    assert {"encyclopedia", "fiction", "news", "chat", "mathematics", "python", "c", "german", "french"} <= domains
    assert len(domains) >= 40


def test_builtin_languages_are_in_their_scripts() -> None:
    ranges = {
        "russian": ("а", "я"),
        "japanese": ("\u3041", "\u9fff"),
        "chinese": ("\u4e00", "\u9fff"),
        "korean": ("\uac00", "\ud7a3"),
        "arabic": ("\u0621", "\u064a"),
        "hindi": ("\u0900", "\u097f"),
    }
    texts: dict[str, str] = {}
    for domain, body in builtin.groups()["languages"]:
        texts[domain] = texts.get(domain, "") + body
    for language, (low, high) in ranges.items():
        assert sum(low <= c <= high for c in texts[language].lower()) > 0.55 * len(texts[language]), language


def test_builtin_repeats_no_long_passage() -> None:
    """No twelve words in a row occur twice; of text without spaces, no 40 characters."""
    seen: dict[tuple[str, ...], str] = {}
    for document in builtin.documents():
        words = re.findall(r"\w+", document.content)
        for i in range(len(words) - 11):
            key = tuple(words[i : i + 12])
            assert key not in seen, " ".join(key)
            seen[key] = document.domain
    unspaced = [d.content for d in builtin.documents() if d.domain in ("chinese", "japanese")]
    pieces = [t[i : i + 40] for t in unspaced for i in range(len(t) - 39)]
    assert len(pieces) == len(set(pieces))


def test_builtin_has_a_large_vocabulary() -> None:
    words = [w for _, b in builtin.groups()["english"] for w in re.findall(r"[a-z]+", b.lower())]
    assert len(set(words)) > 5_000
    assert len(set(words)) / len(words) > 0.2


def test_builtin_shares_nothing_with_the_text_of_the_proof() -> None:
    def runs(text: str, n: int = 8) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

    proof = set().union(*(runs(body) for body in sections().values()))
    ours = set().union(*(runs(d.content) for d in builtin.documents()))
    assert proof & ours == set()
    lines = {line for d in builtin.documents() for line in d.content.splitlines() if len(line) > 30}
    assert not lines & {line for body in sections().values() for line in body.splitlines()}


def test_builtin_order_is_balanced_from_the_start() -> None:
    whole = calibration_sequences(Bytes(), n_sequences=10**6)
    group = {domain: g for g, docs in builtin.groups().items() for domain, _ in docs}

    def shares(found: CalibrationText) -> dict[str, float]:
        total = sum(found.domains.values())
        sums = dict.fromkeys(builtin.groups(), 0.0)
        for domain, n in found.domains.items():
            sums[group[domain]] += n / total
        return sums

    expected = shares(whole)
    for fraction in (8, 4, 2):
        got = shares(calibration_sequences(Bytes(), n_sequences=len(whole.sequences) // fraction))
        assert all(abs(got[g] - expected[g]) < 0.12 for g in got), (fraction, got, expected)


def test_builtin_documents_follow_one_another_whole() -> None:
    found = calibration_sequences(Bytes(), n_sequences=10**6)
    text = "".join(d.content for d in builtin.documents())
    assert text.encode().startswith(text_of(found))
    assert len(text.encode()) - len(text_of(found)) < 511
    assert found.n_tokens == found.sequences.size == sum(found.domains.values()) + len(found.sequences)
    assert found.name == "builtin"


def test_same_inputs_same_bytes() -> None:
    one, two = (calibration_sequences(Bytes(), n_sequences=20, length=64) for _ in range(2))
    assert one.sequences.tobytes() == two.sequences.tobytes()
    assert (one.sha256, one.domains) == (two.sha256, two.domains)
    assert one.sequences.dtype == np.int32
    assert one.sequences.shape == (20, 64)
    assert not one.sequences.flags.writeable
    # Fewer sequences are a prefix.
    fewer = calibration_sequences(Bytes(), n_sequences=7, length=64)
    assert np.array_equal(fewer.sequences, one.sequences[:7])


# Start tokens and packing


@pytest.mark.parametrize(("start", "end"), [((), ()), ((BOS,), ()), ((BOS,), (EOS,)), ((BOS, 258), ()), ((), (EOS,))])
def test_start_tokens_are_at_every_start_and_nowhere_else(tmp_path: Path, start: tuple, end: tuple) -> None:
    path = file(tmp_path, "".join(f"line {i}\n" for i in range(100)))
    found = calibration_sequences(Bytes(start, end), path, length=50)
    n = len(start)
    assert [tuple(s[:n]) for s in found.sequences.tolist()] == [start] * len(found.sequences)
    assert found.sequences[:, n:].max() < 256
    assert path.read_bytes().startswith(text_of(found, n))


def test_a_file_is_packed_in_order_and_read_no_further_than_needed(tmp_path: Path) -> None:
    text = "".join(f"Line number {i}, für Ägypten.\n" for i in range(20_000))
    path = file(tmp_path, text.encode() + b"\xff")
    found = calibration_sequences(Bytes(()), path, n_sequences=300, length=100)
    assert text_of(found, 0) == text.encode()[:30_000]
    assert found.name == "calib.txt"
    assert found.domains == {"text": 30_000}
    with pytest.raises(CalibrationError, match=f"byte 0xff at offset {len(text.encode())}"):
        calibration_sequences(Bytes(()), path, n_sequences=10**6, length=100)


@pytest.mark.parametrize("text", ["ä" * 100_001, "x" + "語" * 70_000, "word " * 40_000, "\n" * 70_000 + "end" * 9, "a"])
def test_pieces_of_a_file_joined_are_the_file(tmp_path: Path, text: str) -> None:
    path = file(tmp_path, text)
    assert "".join(d.content for d in text_files.documents(path, Bytes())).strip() == text.strip()


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    found = calibration_sequences(Bytes(()), file(tmp_path, b"\xef\xbb\xbfhello"), length=5)
    assert text_of(found, 0) == b"hello"


def test_fewer_than_asked_are_all_there_are(tmp_path: Path) -> None:
    found = calibration_sequences(Bytes(), file(tmp_path, "x" * 1000), n_sequences=50, length=101)
    assert found.sequences.shape == (10, 101)


# JSON lines


def test_json_lines(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "ho"}]
    lines = [{"text": " one "}, {"messages": messages, "id": 7}, {"text": ""}, {"text": "two"}]
    path = file(tmp_path, "\n\n".join(json.dumps(line) for line in lines) + "\n", "chat.jsonl")
    expected = "one\n\n<user>hé\n<assistant>ho\ntwo\n\n".encode()
    found = calibration_sequences(Bytes(), path, length=1 + len(expected))
    assert text_of(found) == expected
    assert found.domains == {"text": 10, "chat": len(expected) - 10}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "is of type list"),
        ("null", "is of type NoneType"),
        ("{}", "nothing in it"),
        ('{"prompt": "a", "answer": "b"}', "an object with 'prompt', 'answer'"),
        ('{"text": 3}', "an object with 'text'"),
        ('{"messages": []}', "an object with 'messages'"),
        ('{"messages": [{"role": "user"}]}', "an object with 'messages'"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "the chat template refuses the messages: no such role"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_json_lines_that_are_refused(tmp_path: Path, line: str, message: str) -> None:
    path = file(tmp_path, '{"text": "fine"}\n\n' + line + "\n", "bad.jsonl")
    with pytest.raises(CalibrationError, match=re.escape(message)) as caught:
        calibration_sequences(Bytes(), path)
    assert f"{path}, line 3:" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_messages_need_a_template(tmp_path: Path) -> None:
    path = file(tmp_path, '{"messages": [{"role": "user", "content": "x"}]}', "a.jsonl")
    with pytest.raises(
        CalibrationError, match="line 1: has `messages`, but this model's tokenizer has no chat template"
    ):
        calibration_sequences(Bytes(chat=False), path)


# Refusals


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"short", "has 6 tokens, but one sequence needs 512: give more text, or ask for sequences of at most 6"),
        (b"x" * 600 + b"\xe9t\xe9", "not UTF-8: byte 0xe9 at offset 600"),
        ("text".encode("utf-16"), "not UTF-8: byte 0xff at offset 0"),
    ],
)
def test_unfit_text(tmp_path: Path, content: bytes, message: str) -> None:
    path = file(tmp_path, content)
    with pytest.raises(CalibrationError, match=message) as caught:
        calibration_sequences(Bytes(), path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_length_that_is_named_is_enough(tmp_path: Path) -> None:
    assert calibration_sequences(Bytes(), file(tmp_path, "short"), length=6).sequences.shape == (1, 6)


def test_unreadable(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="is a directory"):
        calibration_sequences(Bytes(), tmp_path)
    with pytest.raises(CalibrationError, match=r"nowhere.txt: the calibration text cannot be read: No such file"):
        calibration_sequences(Bytes(), tmp_path / "nowhere.txt")


def test_a_tokenizer_of_another_model() -> None:
    with pytest.raises(CalibrationError, match="yields id 257, but the model's vocabulary has 256 entries"):
        calibration_sequences(Bytes(), vocab_size=256)
    calibration_sequences(Bytes(), vocab_size=258, n_sequences=2)


@pytest.mark.parametrize(("n", "length"), [(0, 512), (1, 1), (-3, 512)])
def test_numbers_out_of_range(n: int, length: int) -> None:
    with pytest.raises(CalibrationError, match=f"{n} of {length} tokens are asked for"):
        calibration_sequences(Bytes(), n_sequences=n, length=length)


def test_no_room_beside_the_start_tokens() -> None:
    with pytest.raises(CalibrationError, match="no room for text"):
        calibration_sequences(Bytes((BOS, 258)), length=2)


# What the model writes


class Writer:
    """Continues a prompt with bytes drawn from the seed; ends early as told."""

    def __init__(self, share: float = 1.0):
        self.share = share
        self.calls: list[tuple[int, int, int]] = []

    def __call__(self, prompts: list[list[int]], n_tokens: int, seed: int) -> Any:
        self.calls.append((len(prompts), n_tokens, seed))
        rng = np.random.default_rng(seed)
        for _ in prompts:
            yield rng.integers(97, 123, int(n_tokens * self.share)).tolist()


def test_own_text() -> None:
    writer, events = Writer(), []
    found = calibration_sequences(
        Bytes(), SELF, n_sequences=6, length=64, seed=3, generate=writer, progress=events.append
    )
    assert found.sequences.shape == (6, 64)
    assert found.name == "self"
    assert found.domains == {"self": 6 * 63}
    assert (found.sequences[:, 0] == BOS).all()
    # A sequence is one prompt and what follows: the beginnings of the built-in documents, in their order.
    beginnings = [d.content.encode()[:16] for d in builtin.documents()[:6]]
    assert [bytes(s[1:17]) for s in found.sequences.tolist()] == beginnings
    assert writer.calls == [(6, 64 - 17, 3)]
    assert [e.done for e in events] == [63 * i for i in range(1, 7)]
    assert events[-1] == Progress("generate", 378, 378, "tokens", "calibration text")


def test_own_text_is_seeded() -> None:
    def write(seed: int) -> CalibrationText:
        return calibration_sequences(Bytes(), SELF, n_sequences=3, length=64, seed=seed, generate=Writer())

    assert write(1).sha256 == write(1).sha256
    assert write(1).sequences.tobytes() == write(1).sequences.tobytes()
    assert write(1).sha256 != write(2).sha256


def test_own_text_that_ends_early_is_continued_by_another() -> None:
    writer = Writer(0.5)
    found = calibration_sequences(Bytes(), SELF, n_sequences=10, length=128, generate=writer)
    assert found.sequences.shape == (10, 128)
    assert len(writer.calls) > 1
    assert len({seed for _, _, seed in writer.calls}) == len(writer.calls)


def test_a_model_that_writes_too_little_is_refused() -> None:
    writer = Writer(0.01)
    with pytest.raises(CalibrationError, match="wrote 128 tokens after 544 of prompts"):
        calibration_sequences(Bytes(), SELF, n_sequences=4, generate=writer)
    assert sum(n for n, _, _ in writer.calls) == 32


def test_a_generator_that_writes_too_much_is_a_bug() -> None:
    with pytest.raises(ValueError, match="more than a sequence of 64"):
        calibration_sequences(Bytes(), SELF, n_sequences=4, length=64, generate=Writer(1.5))


def test_own_text_needs_a_generator() -> None:
    with pytest.raises(CalibrationError, match="needs a model that can generate"):
        calibration_sequences(Bytes(), SELF)


def test_a_file_named_like_a_source_is_reached_by_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file(tmp_path, "from a file", "builtin")
    assert text_of(calibration_sequences(Bytes(()), "./builtin", length=11), 0) == b"from a file"
