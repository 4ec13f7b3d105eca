"""A Hugging Face tokenizer from a GGUF file's metadata, with the ids that llama.cpp gives.

Two kinds are built. Byte-level BPE (`tokenizer.ggml.model = gpt2`): the pre-tokenizer's expressions, then merges by
rank over byte symbols. SentencePiece BPE (`llama`): spaces become `▁`, then the pair whose joined text has the best
score is merged first, and what is in no token falls back to byte tokens.

Source of the behaviour: llama.cpp `src/llama-vocab.cpp`, with `parse_special` on: texts of control, user-defined and
unknown tokens are found in the input before anything else.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from mlxq.checkpoint.config import to_json
from mlxq.checkpoint.gguf_config import CONTROL, END_TEXTS, build_generation_config
from mlxq.checkpoint.gguf_metadata import Metadata
from mlxq.checkpoint.gguf_pretokenizers import pre_tokenizer
from mlxq.errors import CheckpointError

_UNKNOWN, _USER_DEFINED = 2, 4
#: Found in the input whatever type the file gives them: ends of text (END_TEXTS), and fill-in-the-middle marks.
# fmt: off
_FIM_TEXTS = frozenset({
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "<|code_prefix|>", "<|fim_suffix|>",
    "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "<|code_suffix|>", "<|fim_middle|>", "<fim-middle>",
    "<fim_middle>", "<｜fim▁end｜>", "<MID>", "<|code_middle|>", "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>",
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
})
# fmt: on
_SPACE = "▁"
#: In tokenizer_config.json: what a GGUF file says and a Hugging Face tokenizer has no place for.
SOURCE_KEY = "gguf_source"


def build_tokenizer_files(metadata: Metadata, vocab_size: int) -> dict[str, bytes]:
    """`tokenizer.json`, `tokenizer_config.json`, `generation_config.json` and, where the file has one,
    `chat_template.jinja`; empty when the file has no vocabulary.

    Args:
        metadata: of the file.
        vocab_size: rows of the embedding, which token ids must not exceed.

    Raises:
        CheckpointError: a tokenizer model or pre-tokenizer that is not supported, or a vocabulary that is
            inconsistent.
    """
    values = metadata.values
    kind = metadata.text("tokenizer.ggml.model")
    if kind is None or kind in ("none", "no_vocab"):
        return {}
    if kind not in _BUILDERS:
        raise CheckpointError(
            f"{metadata.path}: the tokenizer model {kind!r} is not supported; supported are gpt2 (byte-level BPE) and "
            "llama (SentencePiece)"
        )
    vocabulary = _Vocabulary(metadata, vocab_size)
    tokenizer = _BUILDERS[kind](vocabulary)
    files = {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False).encode(),
        "tokenizer_config.json": to_json(_tokenizer_config(vocabulary)).encode(),
        "generation_config.json": to_json(build_generation_config(metadata, vocab_size)).encode(),
    }
    template = values.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        files["chat_template.jinja"] = template.encode()
    return files


class _Vocabulary:
    """The token list and what goes with it, checked.

    Attributes:
        tokens: text by id. ids: id by text. types: ggml token type by id. bos, eos, unk, pad: id or None.
        pre: name of the pre-tokenizer, or None.
    """

    def __init__(self, metadata: Metadata, vocab_size: int):
        self.path, self.values = metadata.path, metadata.values
        self.pre = metadata.text("tokenizer.ggml.pre")
        tokens = self._array("tokens", list)
        if len(tokens) > vocab_size:
            raise CheckpointError(f"{self.path}: {len(tokens)} tokens, but the embedding has {vocab_size} rows")
        # llama.cpp's name for a token without text.
        self.tokens = [t or f"[EMPTY_{i}]" for i, t in enumerate(tokens)]
        self.ids = {t: i for i, t in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(t for i, t in enumerate(self.tokens) if self.ids[t] != i)
            raise CheckpointError(f"{self.path}: token {twice!r} appears twice in tokenizer.ggml.tokens")
        self.types = np.ones(len(tokens), np.int32)
        if "tokenizer.ggml.token_type" in self.values:
            self.types = self._numbers("token_type")
        self.bos, self.eos, self.unk, self.pad = (
            metadata.token_id(name, len(tokens)) for name in ("bos", "eos", "unknown", "padding")
        )

    def _array(self, name: str, kind: type) -> Any:
        value = self.values.get(f"tokenizer.ggml.{name}")
        if not isinstance(value, kind):
            found = "missing" if value is None else "not an array of the right kind"
            raise CheckpointError(f"{self.path}: tokenizer.ggml.{name} is {found}")
        return value

    def _numbers(self, name: str) -> np.ndarray:
        value = self._array(name, np.ndarray)
        if len(value) < len(self.tokens):
            raise CheckpointError(
                f"{self.path}: tokenizer.ggml.{name} has {len(value)} entries for {len(self.tokens)} tokens"
            )
        return value[: len(self.tokens)]

    def merges(self) -> list[list[str]]:
        """Pairs by rank; of a pair given twice the first counts."""
        pairs: dict[tuple[str, str], None] = {}
        for line in self._array("merges", list):
            # The separator is the first space that is not the first character.
            cut = line.find(" ", 1)
            pair = (line[:cut], line[cut + 1 :]) if cut > 0 else ("", "")
            if not (pair[0] in self.ids and pair[1] in self.ids and pair[0] + pair[1] in self.ids):
                raise CheckpointError(f"{self.path}: merge {line!r} is not two tokens that make a third")
            pairs[pair] = None
        return [list(p) for p in pairs]

    def scores(self) -> np.ndarray:
        return self._numbers("scores").astype(np.float32)

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(value, (bool, np.bool_)):
            raise CheckpointError(f"{self.path}: tokenizer.ggml.{name} is {value!r}, expected true or false")
        return bool(value)

    def added_tokens(self) -> list[dict[str, Any]]:
        """Tokens whose text is found in the input first, in tokenizer.json's form."""
        control = self.types == CONTROL
        for text in (END_TEXTS | _FIM_TEXTS) & self.ids.keys():
            if self.types[self.ids[text]] != _USER_DEFINED:
                control[self.ids[text]] = True
        found = control | (self.types == _UNKNOWN) | (self.types == _USER_DEFINED)
        name = str(self.values.get("general.name", "")).lower()
        strips = "phi-3" in name or "phi3" in name
        return [
            {
                "id": int(i),
                "content": self.tokens[i],
                "single_word": False,
                "lstrip": False,
                "rstrip": strips and self.tokens[i] not in ("<unk>", "<s>", "<|endoftext|>"),
                "normalized": False,
                "special": bool(control[i]) or int(self.types[i]) == _UNKNOWN,
            }
            for i in np.flatnonzero(found)
        ]

    def begin_and_end(self, add_bos: bool) -> tuple[int | None, int | None]:
        """Ids put before and after a text, given whether BOS is added when the file does not say."""
        ids: list[int | None] = []
        for name, default, token in (("bos", add_bos, self.bos), ("eos", False, self.eos)):
            add = self.flag(f"add_{name}_token", default)
            if add and token is None:
                raise CheckpointError(
                    f"{self.path}: the tokenizer adds {name.upper()} to every text, but tokenizer.ggml.{name}_token_id "
                    "is missing or outside the vocabulary"
                )
            ids.append(token if add else None)
        return ids[0], ids[1]


def _byte_level(vocabulary: _Vocabulary) -> dict[str, Any]:
    pre = pre_tokenizer(vocabulary.pre, vocabulary.path)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    splits = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in pre.patterns]
    return _tokenizer(
        vocabulary,
        add_bos=pre.add_bos,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        decoder=byte_level,
        model={"merges": vocabulary.merges(), "ignore_merges": pre.ignore_merges},
    )


def _sentencepiece(vocabulary: _Vocabulary) -> dict[str, Any]:
    prefix = vocabulary.flag("add_space_prefix", True)
    if vocabulary.flag("remove_extra_whitespaces", False):
        raise CheckpointError(
            f"{vocabulary.path}: tokenizer.ggml.remove_extra_whitespaces is not supported for SentencePiece BPE"
        )
    missing = next((b for b in range(256) if f"<0x{b:02X}>" not in vocabulary.ids), None)
    if missing is not None:
        raise CheckpointError(f"{vocabulary.path}: the vocabulary lacks the byte token <0x{missing:02X}>")
    # SentencePiece's ids, unless the file says otherwise.
    for name, default in (("unk", 0), ("bos", 1), ("eos", 2)):
        if getattr(vocabulary, name) is None and default < len(vocabulary.tokens):
            setattr(vocabulary, name, default)
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    unescape = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return _tokenizer(
        vocabulary,
        add_bos=True,
        normalizer={"type": "Sequence", "normalizers": [*prepend, escape]},
        decoder={"type": "Sequence", "decoders": [unescape, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        model={
            "merges": score_merges(vocabulary.tokens, vocabulary.ids, vocabulary.scores()),
            "byte_fallback": True,
            "fuse_unk": True,
            "unk_token": vocabulary.tokens[vocabulary.unk],
        },
    )


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}


def score_merges(tokens: list[str], ids: dict[str, int], scores: np.ndarray) -> list[list[str]]:
    """Every pair of tokens whose joined text is a token, best score of the joined token first.

    llama.cpp merges the pair with the best joined score wherever it stands, the leftmost of equals; merging by the
    rank of the pair does the same when pairs are ranked by that score.
    """
    merges: list[list[str]] = []
    # Stable: tokens of equal score keep the order of their ids.
    for i in np.argsort(-scores, kind="stable"):
        token = tokens[i]
        merges += [
            [left, right]
            for cut in range(1, len(token))
            if (left := token[:cut]) in ids and (right := token[cut:]) in ids
        ]
    return merges


def _tokenizer(
    vocabulary: _Vocabulary,
    add_bos: bool,
    decoder: dict[str, Any],
    model: dict[str, Any],
    normalizer: dict[str, Any] | None = None,
    pre_tokenizer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    bos, eos = vocabulary.begin_and_end(add_bos)
    plain = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": vocabulary.added_tokens(),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _template(vocabulary, bos, eos),
        "decoder": decoder,
        "model": {"type": "BPE", **plain, **flags, "vocab": vocabulary.ids, **model},
    }


def _template(vocabulary: _Vocabulary, bos: int | None, eos: int | None) -> dict[str, Any]:
    """What is put around one text and around a pair of texts."""

    def around(sequence: str, type_id: int) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = [{"Sequence": {"id": sequence, "type_id": type_id}}]
        if bos is not None:
            parts.insert(0, {"SpecialToken": {"id": vocabulary.tokens[bos], "type_id": type_id}})
        if eos is not None:
            parts.append({"SpecialToken": {"id": vocabulary.tokens[eos], "type_id": type_id}})
        return parts

    special = {
        vocabulary.tokens[i]: {"id": vocabulary.tokens[i], "ids": [i], "tokens": [vocabulary.tokens[i]]}
        for i in (bos, eos)
        if i is not None
    }
    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": special,
    }


def _tokenizer_config(vocabulary: _Vocabulary) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        SOURCE_KEY: {"pre": vocabulary.pre or "default"},
    }
    for name in ("bos", "eos", "unk", "pad"):
        token = getattr(vocabulary, name)
        if token is not None:
            config[f"{name}_token"] = vocabulary.tokens[token]
    arch = vocabulary.values.get("general.architecture")
    context = vocabulary.values.get(f"{arch}.context_length")
    if isinstance(context, int):
        config["model_max_length"] = context
    return config
