"""Two tokenizers against each other: token ids of texts, the texts again, vocabulary and special ids.

The texts are those of `stress`, then every token's own (a merge that one side lacks shows where its token is spelled),
then rows of random tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlxq.checkpoint.base import Checkpoint
from mlxq.checkpoint.config import eos_token_ids
from mlxq.checkpoint.gguf.config import END_TEXTS
from mlxq.evaluate.comparison.stress import texts

#: Texts that are encoded at a time; tokens in a random row, and rows.
_BATCH = 1 << 14
_ROW, _ROWS = 8, 1024


@dataclass(frozen=True)
class TokenizerComparison:
    """What two tokenizers agree on.

    Attributes:
        same_files: both sides have one tokenizer, byte for byte; then it meets the stress texts alone.
        n_texts: texts encoded by both.
        n_different: texts whose ids differ; `first_difference` shows the first in words, empty when none does.
        vocabulary_a, vocabulary_b: number of tokens.
        entries_different: ids that both have with different texts; `first_entry` shows the first.
        special_a, special_b: `bos`, `eos`, `added` (ids put around every text) and `stop` (ids that end an answer).
        special_different: the keys of those that disagree.
        notes: what differs without consequence.
    """

    same_files: bool
    n_texts: int
    n_different: int
    first_difference: str
    vocabulary_a: int
    vocabulary_b: int
    entries_different: int
    first_entry: str
    special_a: Mapping[str, Any]
    special_b: Mapping[str, Any]
    special_different: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def same(self) -> bool:
        return not self.failure

    @property
    def failure(self) -> str:
        """What differs, in one line; empty when nothing does."""
        found = []
        if self.n_different:
            found.append(
                f"token ids differ for {self.n_different:,} of {self.n_texts:,} texts: {self.first_difference}"
            )
        if self.entries_different:
            found.append(f"{self.entries_different} vocabulary entries differ: {self.first_entry}")
        found += [f"{k} ids are {self.special_a[k]} / {self.special_b[k]}" for k in self.special_different]
        return "; ".join(found)

    @property
    def summary(self) -> str:
        """What differs, in some words; empty when nothing does."""
        found = [f"token ids differ for {self.n_different:,} of {self.n_texts:,} texts"] if self.n_different else []
        found += [f"{self.entries_different:,} vocabulary entries differ"] if self.entries_different else []
        found += [f"{', '.join(self.special_different)} ids differ"] if self.special_different else []
        return ", ".join(found)

    def to_dict(self) -> dict[str, Any]:
        return {
            "same": self.same,
            "same_files": self.same_files,
            "texts": self.n_texts,
            "texts_different": self.n_different,
            "first_difference": self.first_difference or None,
            "vocabulary": [self.vocabulary_a, self.vocabulary_b],
            "entries_different": self.entries_different,
            "first_entry": self.first_entry or None,
            "special": [dict(self.special_a), dict(self.special_b)],
            "special_different": list(self.special_different),
            "notes": list(self.notes),
        }


def compare_tokenizers(
    a: Any, b: Any, source_a: Checkpoint, source_b: Checkpoint, check: Callable[[], None] = lambda: None
) -> TokenizerComparison:
    """Compare two of transformers' tokenizers, and the special ids of their models.

    Ids are compared without the tokens that a tokenizer puts around a text; those are compared by themselves. Entries
    at the end of the larger vocabulary are padding unless a text meets them, and noted only.

    Args:
        a, b: the tokenizers; one object where both sides have the same files.
        check: called between batches of texts; it raises to stop.
    """
    n, different, first = 0, 0, ""
    for kind, batch in _batches(a, b):
        check()
        n += len(batch)
        wrong = _differing(a, b, batch)
        different += len(wrong)
        if wrong and not first:
            first = f"{kind}, {_difference(a, b, wrong[0])}"
    entries, first_entry, notes = _entries(a.get_vocab(), b.get_vocab())
    ids_a, ids_b = _special_ids(a, source_a), _special_ids(b, source_b)
    stop = _stop_ids(ids_a["stop"], ids_b["stop"], a, b, source_a, source_b)
    if ids_a["stop"] != ids_b["stop"] and stop:
        notes.append(f"stop ids are {ids_a['stop']} / {ids_b['stop']}: readers of GGUF stop at any token named so")
    keys = [k for k in ids_a if ids_a[k] != ids_b[k] and not (k == "stop" and stop)]
    for key in ("bos", "eos"):
        # Where neither puts it around a text, an id that one side does not name is used by the template alone.
        if key in keys and None in (ids_a[key], ids_b[key]) and ids_a["added"] == ids_b["added"]:
            keys.remove(key)
            notes.append(f"{key} id is {ids_a[key]} / {ids_b[key]}, put around no text by either")
    return TokenizerComparison(
        same_files=a is b,
        n_texts=n,
        n_different=different,
        first_difference=first,
        vocabulary_a=len(a.get_vocab()),
        vocabulary_b=len(b.get_vocab()),
        entries_different=entries,
        first_entry=first_entry,
        special_a=ids_a,
        special_b=ids_b,
        special_different=tuple(keys),
        notes=tuple(notes),
    )


def _special_texts(tokenizer: Any) -> list[str]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return [str(token) for token in added.values()]


def _batches(a: Any, b: Any) -> Iterator[tuple[str, list[str]]]:
    """Kind and texts, in the order in which a difference is best shown."""
    special = list(dict.fromkeys([*_special_texts(a), *_special_texts(b)]))
    groups: dict[str, list[str]] = {}
    for kind, text in texts(special):
        groups.setdefault(kind, []).append(text)
    yield from groups.items()
    if a is b:
        return
    tokens = list(dict.fromkeys(_token_texts(max(a, b, key=len))))
    for start in range(0, len(tokens), _BATCH):
        yield "a token's text", tokens[start : start + _BATCH]
    rng = random.Random(0)
    yield "random tokens", ["".join(rng.choices(tokens, k=_ROW)) for _ in range(_ROWS)]


def _token_texts(tokenizer: Any) -> list[str]:
    """The text of each token by itself."""
    ids = [[i] for i in range(len(tokenizer))]
    if getattr(tokenizer, "is_fast", False):
        return tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=False)
    return tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)


def _differing(a: Any, b: Any, batch: list[str]) -> list[str]:
    """Texts to which two tokenizers give other ids, or (in small batches, it takes long) of them other texts."""
    ids_a, ids_b = (t(batch, add_special_tokens=False, return_attention_mask=False)["input_ids"] for t in (a, b))
    if a is b:
        return []
    decode = len(batch) < _ROWS
    return [
        text
        for text, x, y in zip(batch, ids_a, ids_b, strict=True)
        if x != y or (decode and _decoded(a, x) != _decoded(b, x))
    ]


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _difference(a: Any, b: Any, text: str) -> str:
    """How two tokenizers disagree about a text."""
    ids_a, ids_b = ([int(i) for i in t.encode(text, add_special_tokens=False)] for t in (a, b))
    if ids_a == ids_b:
        return f"{_short(text)} decodes to {_short(_decoded(a, ids_a))} / {_short(_decoded(b, ids_a))}"
    at = next((i for i, (x, y) in enumerate(zip(ids_a, ids_b, strict=False)) if x != y), min(len(ids_a), len(ids_b)))
    return f"{_short(text)} at token {at}: {_token(a, ids_a, at)} / {_token(b, ids_b, at)}"


def _token(tokenizer: Any, ids: list[int], at: int) -> str:
    if at >= len(ids):
        return "end"
    return f"{ids[at]} {_short(str(tokenizer.convert_ids_to_tokens(ids[at])))}"


def _entries(a: dict[str, int], b: dict[str, int]) -> tuple[int, str, list[str]]:
    """Number of ids with different texts, the first of them, and a note about entries that one side has at its end."""
    by_id_a, by_id_b = (_by_id(part) for part in (a, b))
    shared = range(min(max(by_id_a, default=-1), max(by_id_b, default=-1)) + 1)
    wrong = [i for i in shared if by_id_a.get(i) != by_id_b.get(i)]
    first = ""
    if wrong:
        shown = (" and ".join(map(_short, part.get(wrong[0], ()))) or "no token" for part in (by_id_a, by_id_b))
        first = f"id {wrong[0]} is {' / '.join(shown)}"
    more = abs(len(by_id_a) - len(by_id_b))
    notes = []
    if more and not wrong:
        notes.append(f"{'A' if len(by_id_a) > len(by_id_b) else 'B'} has {more} more tokens at its end")
    return len(wrong), first, notes


def _by_id(vocabulary: dict[str, int]) -> dict[int, tuple[str, ...]]:
    """Texts by id: usually one, and sorted where there are more."""
    found: dict[int, tuple[str, ...]] = {}
    for token, i in vocabulary.items():
        found[i] = tuple(sorted((*found[i], token))) if i in found else (token,)
    return found


def _special_ids(tokenizer: Any, source: Checkpoint) -> dict[str, Any]:
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = [int(i) for i in tokenizer.encode("a")]
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == list(plain)), 0)
    return {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "added": [whole[:start], whole[start + len(plain) :]],
        "stop": list(eos_token_ids(tokenizer.eos_token_id, source.config, source.generation_config)),
    }


def _stop_ids(stop_a: list[int], stop_b: list[int], a: Any, b: Any, source_a: Checkpoint, source_b: Checkpoint) -> bool:
    """Whether the ids that end an answer agree, given that readers of GGUF add all control tokens of certain texts.

    A GGUF's set has those already (`build_generation_config`); they are added to the other side's.
    """
    if (source_a.kind == "gguf") != (source_b.kind == "gguf"):
        stop_a, stop_b = (sorted({*stop, *_end_ids(t)}) for stop, t in ((stop_a, a), (stop_b, b)))
    return stop_a == stop_b


def _end_ids(tokenizer: Any) -> list[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return [int(i) for i, token in added.items() if str(token) in END_TEXTS and getattr(token, "special", True)]


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 48 else f"{shown[:45]}..."
