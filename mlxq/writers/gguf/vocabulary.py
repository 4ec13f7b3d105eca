"""Tokens, scores, types and merges as a GGUF file keeps them, from each kind of Hugging Face tokenizer.

Sources: what llama.cpp's converter writes (`get_vocab_base`, `_create_vocab_sentencepiece`, `T5Model.set_vocab`) and
what llama.cpp does with it (`src/llama-vocab.cpp`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from mlxq.checkpoint.gguf.tokens import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from mlxq.checkpoint.huggingface import is_tokenizer
from mlxq.checkpoint.safetensors import quoted
from mlxq.errors import CheckpointError
from mlxq.writers.gguf.pre import pre_name
from mlxq.writers.gguf.sentencepiece_model import BPE, SentencePieceModel, parse_sentencepiece
from mlxq.writers.gguf.tokenizer_files import AddedToken, TokenizerFiles
from mlxq.writers.gguf.whitespace import (
    SPACE,
    InexpressibleError,
    charsmap,
    check_spaces,
    normalizers,
    removes_whitespace,
    space_prefix,
)

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_PAD_TOKEN = re.compile(r"\[PAD(\d+)\]")
#: Scores of rows without a token, and of added tokens, which no merge may make.
_PAD_SCORE, _ADDED_SCORE = -10000.0, -1000.0
_SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
#: Texts that end or frame a turn though some models do not mark them special.
_CONTROL_TEXTS = frozenset({"<pad>", "<mask>", "<2mass>", "[@BOS@]"})
_CONTROL_LOOKS = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>", re.DOTALL)
_REFUSED = {"WordPiece": "WordPiece (bert)", "WordLevel": "WordLevel"}


@dataclass
class Vocabulary:
    """What goes under `tokenizer.ggml`: `model`, one text and type per row of the embedding, and what splitting needs.

    `scores` and `merges` are None where the model has none; `flags` are the whitespace rules of SentencePiece.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    flags: dict[str, bool] = field(default_factory=dict)
    charsmap: bytes = b""
    unk: int | None = None


def build_vocabulary(files: TokenizerFiles, vocab_size: int, pre: str | None) -> Vocabulary:
    """The vocabulary of a model whose embedding has `vocab_size` rows.

    Raises:
        CheckpointError: no tokenizer, one of a kind that llama.cpp lacks, or one that is inconsistent.
    """
    name = next((n for n in _SENTENCEPIECE_FILES if n in files.files), None)
    if files.tokenizer is None and (name is None or _is_tiktoken(files.read(name))) and is_tokenizer(files.files):
        files.convert()
    kind = (files.tokenizer or {}).get("model", {}).get("type")
    if kind in _REFUSED:
        raise CheckpointError(
            f"{files.where('tokenizer.json')}: a {_REFUSED[kind]} tokenizer is not supported; supported are byte-level "
            "BPE, SentencePiece BPE and SentencePiece unigram"
        )
    if kind == "BPE" and not files.tokenizer["model"].get("byte_fallback"):
        return _byte_level(files, vocab_size, pre)
    build = {"BPE": _fallback_bpe, "Unigram": _unigram}.get(kind)
    if build is not None:
        try:
            # What Hugging Face runs comes first: transformers does not always merge as the SentencePiece model does.
            return build(files, vocab_size)
        except InexpressibleError:
            if name is None:
                raise
    if name is not None:
        model = parse_sentencepiece(files.read(name), files.where(name))
        return _sentencepiece(files, model, vocab_size)
    raise CheckpointError(
        f"{files.where('tokenizer.json')}: no tokenizer that GGUF can hold: expected tokenizer.json with a model of "
        f"type BPE or Unigram, or a SentencePiece tokenizer.model; found {quoted(kind)}"
    )


def _is_tiktoken(data: bytes) -> bool:
    """Whether a `tokenizer.model` is tiktoken's kind: lines of a token in base64 and its rank."""
    return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data) is not None


class _Rows:
    """Texts, scores and types by row of the embedding, filled in any order."""

    def __init__(self, files: TokenizerFiles, vocab_size: int):
        self.where = files.where("tokenizer.json")
        self.left_out = {t.content for t in beyond(files, vocab_size)}
        self.tokens = [f"[PAD{i}]" for i in range(vocab_size)]
        self.scores = [_PAD_SCORE] * vocab_size
        self.types = [UNUSED] * vocab_size

    def put(self, row: int, text: str, score: float, kind: int) -> None:
        if row >= len(self.tokens) and text in self.left_out:
            return
        if not 0 <= row < len(self.tokens):
            raise CheckpointError(
                f"{self.where}: token {text!r} has the id {row}, but the embedding has {len(self.tokens)} rows"
            )
        self.tokens[row], self.scores[row], self.types[row] = text, score, kind

    def check(self) -> None:
        """No text stands twice: llama.cpp finds tokens by their text."""
        ids = {t: i for i, t in enumerate(self.tokens)}
        twice = next((i for i, t in enumerate(self.tokens) if ids[t] != i), None)
        if twice is not None:
            text = self.tokens[twice]
            raise CheckpointError(f"{self.where}: the ids {twice} and {ids[text]} have the same text {text!r}")


def beyond(files: TokenizerFiles, vocab_size: int) -> list[AddedToken]:
    """Added tokens without a row in the embedding: no model can be given them (Gemma 3's text models and pictures)."""
    return [t for t in files.added_tokens().values() if t.id >= vocab_size]


def _is_control(token: AddedToken, trusted: bool) -> bool:
    looks = token.content in _CONTROL_TEXTS or _CONTROL_LOOKS.fullmatch(token.content)
    return token.special or bool(looks and not trusted)


def _plain_type(row: int, text: str) -> int:
    """Type of a token of the vocabulary itself: rows without a token carry their own number."""
    pad = _PAD_TOKEN.fullmatch(text)
    return UNUSED if pad and int(pad[1]) == row else NORMAL


def _byte_level(files: TokenizerFiles, vocab_size: int, pre: str | None) -> Vocabulary:
    model = files.tokenizer["model"]
    _check_byte_level(files)
    rows = _Rows(files, vocab_size)
    for text, row in _texts(files).items():
        rows.put(row, text, 0.0, _plain_type(row, text))
    for token in files.added_tokens().values():
        kind = CONTROL if _is_control(token, files.from_gguf) else USER_DEFINED
        rows.put(token.id, token.content, 0.0, kind)
    rows.check()
    merges = [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in _pairs(files, model)]
    return Vocabulary("gpt2", pre_name(files, pre), rows.tokens, rows.types, merges=merges)


def _check_byte_level(files: TokenizerFiles) -> None:
    where, tokenizer = files.where("tokenizer.json"), files.tokenizer
    if (tokenizer.get("decoder") or {}).get("type") != "ByteLevel":
        raise CheckpointError(f"{where}: a BPE tokenizer that is neither byte-level nor falls back to bytes")
    kind = {n["type"] for n in normalizers(tokenizer)} - {"NFC"}
    if kind:
        raise CheckpointError(
            f"{where}: the text is normalized ({', '.join(sorted(kind))}) before it is cut, which llama.cpp does not do"
        )


def _texts(files: TokenizerFiles) -> dict[str, int]:
    vocab = files.tokenizer["model"].get("vocab")
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise CheckpointError(f"{files.where('tokenizer.json')}: model.vocab is not an object of texts and ids")
    return vocab


def _pairs(files: TokenizerFiles, model: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = []
    for merge in model.get("merges") or []:
        parts = tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
        if len(parts) != 2 or not all(isinstance(p, str) for p in parts):
            raise CheckpointError(f"{files.where('tokenizer.json')}: the merge {merge!r} is not a pair of texts")
        pairs.append(parts)
    if not pairs:
        raise CheckpointError(f"{files.where('tokenizer.json')}: model.merges is empty")
    return pairs


def _add(rows: _Rows, files: TokenizerFiles, unk: int | None) -> None:
    """Added tokens over what the vocabulary says; llama.cpp looks for user-defined ones in text with real spaces."""
    for token in files.added_tokens().values():
        if token.id == unk or rows.types[token.id : token.id + 1] == [BYTE]:
            continue
        if _is_control(token, files.from_gguf):
            rows.put(token.id, token.content, _ADDED_SCORE, CONTROL)
        else:
            rows.put(token.id, token.content.replace(SPACE, " "), _ADDED_SCORE, USER_DEFINED)


def _sentencepiece(files: TokenizerFiles, model: SentencePieceModel, vocab_size: int) -> Vocabulary:
    rows = _Rows(files, vocab_size)
    for row, (text, score, kind) in enumerate(zip(model.pieces, model.scores, model.types, strict=True)):
        rows.put(row, text.replace(SPACE, " ") if kind == USER_DEFINED else text, score, kind)
    unk = model.types.index(UNKNOWN) if UNKNOWN in model.types else None
    _check_agreement(files, model)
    _add(rows, files, unk)
    rows.check()
    prefix = space_prefix(files)
    flags = {"add_space_prefix": model.add_dummy_prefix if prefix is None else prefix}
    if model.model_type == BPE:
        return Vocabulary("llama", "default", rows.tokens, rows.types, rows.scores, flags=flags, unk=unk)
    flags["remove_extra_whitespaces"] = model.remove_extra_whitespaces
    table = model.precompiled_charsmap
    return Vocabulary("t5", "default", rows.tokens, rows.types, rows.scores, flags=flags, charsmap=table, unk=unk)


def _check_agreement(files: TokenizerFiles, model: SentencePieceModel) -> None:
    """tokenizer.json, where there is one, must hold the words of the SentencePiece model under the same ids."""
    vocab = (files.tokenizer or {}).get("model", {}).get("vocab", {})
    if isinstance(vocab, list):
        vocab = {entry[0]: row for row, entry in enumerate(vocab)}
    added = files.added_tokens()
    for row, (text, kind) in enumerate(zip(model.pieces, model.types, strict=True)):
        if vocab and kind == NORMAL and vocab.get(text) != row and row not in added:
            raise CheckpointError(
                f"{files.where('tokenizer.json')}: {text!r} has the id {vocab.get(text)}, but {row} in "
                "tokenizer.model: leave out the one that does not belong to the model"
            )


def _fallback_bpe(files: TokenizerFiles, vocab_size: int) -> Vocabulary:
    """SentencePiece BPE that only a tokenizer.json holds: scores from the ranks of the merges."""
    model = files.tokenizer["model"]
    vocab = _texts(files)
    check_spaces(files, list(vocab), unigram=False)
    scores = _scores_of_merges(files, vocab, _pairs(files, model))
    rows = _Rows(files, vocab_size)
    unk = vocab.get(model.get("unk_token"))
    for text, row in vocab.items():
        kind = BYTE if _BYTE_TOKEN.fullmatch(text) else UNKNOWN if row == unk else _plain_type(row, text)
        rows.put(row, text, scores.get(text, 0.0), kind)
    _add(rows, files, unk)
    rows.check()
    flags = {"add_space_prefix": bool(space_prefix(files))}
    return Vocabulary("llama", "default", rows.tokens, rows.types, rows.scores, flags=flags, unk=unk)


def _scores_of_merges(files: TokenizerFiles, vocab: dict[str, int], pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Scores with which llama.cpp merges in the order of the ranks.

    llama.cpp joins any two neighbours whose joined text is a token, best score first. That is the order of the ranks
    if every such pair is a merge and the merges that make one token follow each other.

    Raises:
        InexpressibleError: they are not so.
    """
    where = files.where("tokenizer.json")
    scores: dict[str, float] = {}
    previous = None
    for left, right in pairs:
        text = left + right
        if text != previous and text in scores:
            raise InexpressibleError(
                f"{where}: the merges that make {text!r} do not follow each other, so no score gives their order: "
                "tokenizer.model is needed"
            )
        scores.setdefault(text, -float(len(scores)))
        previous = text
    merges = set(pairs)
    added = {t.content for t in files.added_tokens().values()}
    for text in vocab:
        if text in added or _BYTE_TOKEN.fullmatch(text):
            continue
        for cut in range(1, len(text)):
            pair = (text[:cut], text[cut:])
            if pair not in merges and pair[0] in vocab and pair[1] in vocab:
                raise InexpressibleError(
                    f"{where}: llama.cpp would merge {pair[0]!r} and {pair[1]!r}, which this tokenizer does not: "
                    "tokenizer.model is needed"
                )
    return scores


def _unigram(files: TokenizerFiles, vocab_size: int) -> Vocabulary:
    model = files.tokenizer["model"]
    rows, unk = _Rows(files, vocab_size), model.get("unk_id")
    entries = model.get("vocab")
    if not isinstance(entries, list) or not all(isinstance(e, list) and len(e) == 2 for e in entries):
        raise CheckpointError(f"{files.where('tokenizer.json')}: model.vocab is not a list of texts and scores")
    check_spaces(files, [text for text, _ in entries], unigram=True)
    for row, (text, score) in enumerate(entries):
        fallback = model.get("byte_fallback") and _BYTE_TOKEN.fullmatch(text)
        kind = UNKNOWN if row == unk else BYTE if fallback else _plain_type(row, text)
        rows.put(row, text, float(score), kind)
    _add(rows, files, unk)
    rows.check()
    flags = {
        "add_space_prefix": bool(space_prefix(files)),
        "remove_extra_whitespaces": removes_whitespace(files.tokenizer),
    }
    table = charsmap(files)
    return Vocabulary("t5", "default", rows.tokens, rows.types, rows.scores, flags=flags, charsmap=table, unk=unk)
