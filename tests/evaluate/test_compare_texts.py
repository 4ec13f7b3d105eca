"""Tokenizers, special ids and chat templates that differ in one thing are told apart; those that do not are not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from gguf_models import add_byte_tokenizer, byte_alphabet, llama_weights, write_llama

from mlxq import compare
from mlxq.errors import CheckpointError
from mlxq.evaluate.comparison.stress import CONVERSATIONS, TEXTS, texts

PARTS = ("tokenizer", "template")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def write(directory: Path, name: str, change: Callable[[Any], None]) -> None:
    path = directory / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A byte-level tokenizer with merges of common letters, and a template that refuses tools."""
    directory = tiny.make_model(tmp_path / "a")

    def merges(tokenizer: dict) -> None:
        tokenizer["model"]["vocab"] |= {"<eos>": 256, "<bos>": 257}
        tokenizer["model"]["merges"] = [["t", "h"], ["th", "e"], ["l", "l"]]
        tokenizer["model"]["vocab"] |= {"th": 258, "the": 259, "ll": 260}

    write(directory, "tokenizer.json", merges)
    write(directory, "tokenizer_config.json", lambda c: c.update(chat_template=TEMPLATE))
    return directory


@pytest.fixture
def other(source: Path, tmp_path: Path) -> Path:
    return shutil.copytree(source, tmp_path / "b")


def run(source: Path, other: Path):
    return compare(source, other, only=PARTS)


def test_the_corpus_has_what_tokenizers_stumble_over() -> None:
    everything = "".join(text for _, text in texts())
    for part in ("\u200d", "\r\n", "\t", "你", "م", "한", "\ufffd", "\ufeff", "½", "\U0001f468", " " * 60, "a" * 150):
        assert part in everything
    assert all(isinstance(text, str) and text.encode() is not None for _, text in texts())
    assert len(TEXTS) >= 10
    assert any(m and m[0]["role"] == "system" for m in CONVERSATIONS.values())
    special = [f"<{i}>" for i in range(1000)]
    met = [text for kind, text in texts(special) if kind == "special tokens"]
    assert all(any(token in text for text in met) for token in special)
    assert len(met) < 250


def test_copies_agree(source: Path, other: Path) -> None:
    # Other bytes, so that both are loaded.
    write(other, "tokenizer_config.json", lambda c: c.update(note="harmless"))
    found = run(source, other)
    assert found.passed, found.failure
    # Each token's text and rows of them too.
    assert found.tokenizer.n_texts > 1200
    same = run(source, source)
    assert same.tokenizer.same_files
    assert 100 < same.tokenizer.n_texts < 300
    assert (found.tokenizer.vocabulary_a, found.tokenizer.vocabulary_b) == (261, 261)
    assert not found.tokenizer.same_files
    assert found.template.n_probes == 2 * len(CONVERSATIONS)
    assert found.template.n_refused == 2


def test_one_merge(source: Path, other: Path) -> None:
    write(other, "tokenizer.json", lambda t: t["model"]["merges"].pop())
    found = run(source, other)
    assert found.tokenizer.n_different > 1
    assert found.tokenizer.entries_different == 0
    # The first text with "ll", and where its ids part.
    assert "260 'll' / " in found.failure
    assert found.template.same


def test_a_merge_that_no_stress_text_needs(source: Path, other: Path) -> None:
    """Every token's own text is encoded."""

    def add(tokenizer: dict, merges: list) -> None:
        tokenizer["model"]["vocab"] |= {"qz": 261}
        tokenizer["model"]["merges"] += merges

    write(source, "tokenizer.json", lambda t: add(t, [["q", "z"]]))
    write(other, "tokenizer.json", lambda t: add(t, []))
    found = run(source, other)
    assert found.tokenizer.n_different >= 1
    assert "a token's text, 'qz' at token 0: 261 'qz' / " in found.failure


def test_two_merges_in_another_order(source: Path, other: Path) -> None:
    def add(tokenizer: dict, merges: list) -> None:
        tokenizer["model"]["vocab"] |= {"he": 261}
        tokenizer["model"]["merges"] = merges

    write(source, "tokenizer.json", lambda t: add(t, [["t", "h"], ["h", "e"], ["th", "e"], ["l", "l"]]))
    write(other, "tokenizer.json", lambda t: add(t, [["h", "e"], ["t", "h"], ["th", "e"], ["l", "l"]]))
    assert "token ids differ" in run(source, other).failure


def test_one_vocabulary_entry_that_no_text_meets(source: Path, other: Path) -> None:
    write(source, "tokenizer.json", lambda t: t["model"]["vocab"].update(qqqqq=261))
    write(other, "tokenizer.json", lambda t: t["model"]["vocab"].update(qqqqz=261))
    found = run(source, other)
    assert found.tokenizer.n_different == 0
    assert "1 vocabulary entries differ: id 261 is 'qqqqq' / 'qqqqz'" in found.failure


def test_padding_of_the_vocabulary_is_noted_and_passes(source: Path, other: Path) -> None:
    write(other, "tokenizer.json", lambda t: t["model"]["vocab"].update({f"[PAD{i}]": i for i in range(261, 271)}))
    found = run(source, other)
    assert found.passed, found.failure
    assert "10 more tokens" in " ".join(found.notes)
    assert (found.tokenizer.vocabulary_a, found.tokenizer.vocabulary_b) == (261, 271)


def test_another_pre_tokenizer(source: Path, other: Path) -> None:
    write(other, "tokenizer.json", lambda t: t["pre_tokenizer"].update(add_prefix_space=True))
    assert "token ids differ" in run(source, other).failure


def test_a_special_token_that_is_plain_text_on_one_side(source: Path, other: Path) -> None:
    token = {"id": 261, "content": "<|tool|>", "special": True, "lstrip": False, "rstrip": False}
    token |= {"normalized": False, "single_word": False}
    write(source, "tokenizer.json", lambda t: t["added_tokens"].append(token))
    found = run(source, other)
    assert "'<|tool|>'" in found.failure
    assert found.tokenizer.n_different >= 3


def test_another_decoder(source: Path, other: Path) -> None:
    write(other, "tokenizer.json", lambda t: t.update(decoder=None))
    assert "decodes to" in run(source, other).failure


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("tokenizer_config.json", {"eos_token": "<bos>"}, "eos ids are 256 / 257"),
        ("tokenizer_config.json", {"bos_token": "<eos>"}, "bos ids are 257 / 256"),
        ("generation_config.json", {"eos_token_id": [256, 7]}, "stop ids are [256] / [7, 256]"),
        ("config.json", {"eos_token_id": 9}, "stop ids are [256] / [9, 256]"),
    ],
)
def test_special_ids(source: Path, other: Path, name: str, change: dict, words: str) -> None:
    (other / "generation_config.json").write_text("{}")
    write(other, name, lambda c: c.update(change))
    assert words in run(source, other).failure


def test_a_start_token_that_one_side_adds(source: Path, other: Path) -> None:
    processor = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [257], "tokens": ["<bos>"]}},
    }
    write(other, "tokenizer.json", lambda t: t.update(post_processor=processor))
    found = run(source, other)
    assert found.tokenizer.n_different == 0
    assert "added ids are [[], []] / [[257], []]" in found.failure


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("assistant:", "assistant: ", "with the prompt of an answer"),
        ("{{ m.role }}: ", "{{ m.role }}:", "at character 12"),
        ("{{ m.content }}", "{{ m.content | trim }}", "one question"),
        ("raise_exception('no tools')", "''", "a tool's answer"),
        ("{{ bos_token }}", "", "at character 0"),
    ],
)
def test_one_change_of_the_template(source: Path, other: Path, old: str, new: str, words: str) -> None:
    assert old in TEMPLATE
    write(other, "tokenizer_config.json", lambda c: c.update(chat_template=TEMPLATE.replace(old, new)))
    found = run(source, other)
    assert words in found.failure
    assert found.tokenizer.same
    assert words in run(other, source).failure


def test_templates_spelled_otherwise_that_render_the_same_agree(source: Path, other: Path) -> None:
    template = TEMPLATE.replace("m.role", "m['role']").replace("no tools", "tools are refused")
    write(other, "tokenizer_config.json", lambda c: c.update(chat_template=template))
    assert run(source, other).passed


def test_a_template_on_one_side_only(source: Path, other: Path) -> None:
    write(other, "tokenizer_config.json", lambda c: c.pop("chat_template"))
    assert run(source, other).failure == "only A has a chat template"
    write(source, "tokenizer_config.json", lambda c: c.pop("chat_template"))
    assert run(source, other).passed


def test_a_tokenizer_on_one_side_only(source: Path, other: Path) -> None:
    (other / "tokenizer.json").unlink()
    assert run(source, other).failure == "only A has a tokenizer"
    assert compare(source, other, only=["tensors", "config"]).passed


def test_a_tokenizer_that_cannot_be_loaded(source: Path, other: Path) -> None:
    (other / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="--no-tokenizer"):
        run(source, other)


def test_a_gguf_stops_at_every_token_named_so(tmp_path: Path) -> None:
    """Readers of GGUF add control tokens of certain texts to the stop ids; a Hugging Face directory names its own."""
    weights = llama_weights(vocab=259)

    def configure(writer: Any) -> None:
        tokens = [*byte_alphabet(), "<|im_end|>", "<|endoftext|>", "ab"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([1] * 256 + [3, 3, 1])
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(256)

    gguf = write_llama(tmp_path / "a.gguf", weights, configure=configure)
    directory = tmp_path / "b"
    config = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "tie_word_embeddings": True}
    config |= {"vocab_size": 259, "eos_token_id": 256}
    tiny.make_model(directory, tensors=weights, dtype="F32", **config)

    def rename(tokenizer: dict) -> None:
        letters = {c: i for i, c in enumerate(byte_alphabet())}
        tokenizer["model"]["vocab"] = letters | {"<|im_end|>": 256, "<|endoftext|>": 257, "ab": 258}
        tokenizer["model"]["merges"] = [["a", "b"]]
        for token, name in zip(tokenizer["added_tokens"], ("<|im_end|>", "<|endoftext|>"), strict=True):
            token["content"] = name

    write(directory, "tokenizer.json", rename)
    write(directory, "tokenizer_config.json", lambda c: (c.clear(), c.update(eos_token="<|im_end|>")))
    found = compare(gguf, directory, only=["tokenizer"])
    assert found.passed, found.failure
    assert any("stop ids are [256, 257] / [256]" in note for note in found.notes)
    write(directory, "config.json", lambda c: c.update(eos_token_id=[256, 65]))
    assert "stop ids" in compare(gguf, directory, only=["tokenizer"]).failure


def test_a_gguf_with_other_merges(tmp_path: Path) -> None:
    a, b = (
        write_llama(
            tmp_path / f"{name}.gguf",
            llama_weights(vocab=262),
            configure=lambda w, merges=merges: add_byte_tokenizer(w, merges=merges),
        )
        for name, merges in (("a", ["a b", "e l"]), ("b", ["e l", "a b"]))
    )
    assert "vocabulary entries differ" in compare(a, b).failure
    assert compare(a, a).identical
