"""The token list of a GGUF file, checked, and the parts of a `tokenizer.json` that every kind of tokenizer has.

Source of the behaviour: llama.cpp `src/llama-vocab.cpp`, with `parse_special` on: texts of control, user-defined and
unknown tokens are found in the input before anything else.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxq.checkpoint.gguf.file import shown
from mlxq.checkpoint.gguf.metadata import Metadata
from mlxq.checkpoint.gguf.tokens import CONTROL, END_TEXTS, FIM_TEXTS, UNKNOWN, USER_DEFINED
from mlxq.checkpoint.safetensors import quoted
from mlxq.errors import CheckpointError


class Vocabulary:
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
            raise CheckpointError(f"{self.path}: token {quoted(twice)} appears twice in tokenizer.ggml.tokens")
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
                raise CheckpointError(f"{self.path}: merge {quoted(line)} is not two tokens that make a third")
            pairs[pair] = None
        return [list(p) for p in pairs]

    def scores(self) -> np.ndarray:
        return self._numbers("scores").astype(np.float32)

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(value, (bool, np.bool_)):
            raise CheckpointError(f"{self.path}: tokenizer.ggml.{name} is {shown(value)}, expected true or false")
        return bool(value)

    def added_tokens(self) -> list[dict[str, Any]]:
        """Tokens whose text is found in the input first, in tokenizer.json's form."""
        control = self.types == CONTROL
        for text in (END_TEXTS | FIM_TEXTS) & self.ids.keys():
            if self.types[self.ids[text]] != USER_DEFINED:
                control[self.ids[text]] = True
        found = control | (self.types == UNKNOWN) | (self.types == USER_DEFINED)
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
                "special": bool(control[i]) or int(self.types[i]) == UNKNOWN,
            }
            for i in np.flatnonzero(found)
        ]

    def begin_and_end(self, add_bos: bool, add_eos: bool = False) -> tuple[int | None, int | None]:
        """Ids put before and after a text, given whether they are added when the file does not say."""
        ids: list[int | None] = []
        for name, default, token in (("bos", add_bos, self.bos), ("eos", add_eos, self.eos)):
            add = self.flag(f"add_{name}_token", default)
            if add and token is None:
                raise CheckpointError(
                    f"{self.path}: the tokenizer adds {name.upper()} to every text, but tokenizer.ggml.{name}_token_id "
                    "is missing or outside the vocabulary"
                )
            ids.append(token if add else None)
        return ids[0], ids[1]

    def default_ids(self, **ids: int) -> None:
        """Special tokens that llama.cpp assumes where the file names none."""
        for name, number in ids.items():
            if getattr(self, name) is None and number < len(self.tokens):
                setattr(self, name, number)


def tokenizer_json(
    vocabulary: Vocabulary,
    begin_and_end: tuple[int | None, int | None],
    decoder: dict[str, Any],
    model: dict[str, Any],
    normalizer: dict[str, Any] | None = None,
    pre_tokenizer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """`tokenizer.json` around a model and the steps before and after it."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": vocabulary.added_tokens(),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _template(vocabulary, *begin_and_end),
        "decoder": decoder,
        "model": model,
    }


def bpe_model(vocabulary: Vocabulary, merges: list[list[str]], **settings: Any) -> dict[str, Any]:
    """The model of BPE with these merges by rank."""
    plain = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **plain, **flags, "vocab": vocabulary.ids, "merges": merges, **settings}


def _template(vocabulary: Vocabulary, bos: int | None, eos: int | None) -> dict[str, Any]:
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
