"""Two tokenizers against each other: token ids of the stress texts, their text again, vocabulary and special ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlxq.checkpoint.base import Checkpoint
from mlxq.checkpoint.config import eos_token_ids
from mlxq.checkpoint.gguf_config import END_TEXTS
from mlxq.evaluate.stress import texts


@dataclass(frozen=True)
class TokenizerComparison:
    """What two tokenizers agree on.

    Attributes:
        n_texts: texts encoded by both.
        n_different: texts whose ids differ; `first_difference` shows the first in words, empty when none does.
        vocabulary_a, vocabulary_b: number of tokens.
        entries_different: ids that both have with different texts; `first_entry` shows the first.
        special_a, special_b: `bos`, `eos`, `added` (ids put around every text) and `stop` (ids that end an answer).
        special_different: the keys of those that disagree.
        notes: what differs without consequence.
    """

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
            found.append(f"token ids differ for {self.n_different} of {self.n_texts} texts: {self.first_difference}")
        if self.entries_different:
            found.append(f"{self.entries_different} vocabulary entries differ: {self.first_entry}")
        found += [f"{k} ids are {self.special_a[k]} / {self.special_b[k]}" for k in self.special_different]
        return "; ".join(found)

    def to_dict(self) -> dict[str, Any]:
        return {
            "same": self.same,
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


def compare_tokenizers(a: Any, b: Any, source_a: Checkpoint, source_b: Checkpoint) -> TokenizerComparison:
    """Compare two of transformers' tokenizers, and the special ids of their models.

    Ids are compared without the tokens that a tokenizer puts around a text; those are compared by themselves. Entries
    at the end of the larger vocabulary are padding unless a text meets them, and noted only.
    """
    special = list(dict.fromkeys([*_special_texts(a), *_special_texts(b)]))
    n, different, first = 0, 0, ""
    for kind, text in texts(special):
        n += 1
        found = _difference(a, b, text)
        if found:
            different += 1
            first = first or f"{kind}, {found}"
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
    sizes = (len(a.get_vocab()), len(b.get_vocab()))
    return TokenizerComparison(
        n, different, first, *sizes, entries, first_entry, ids_a, ids_b, tuple(keys), tuple(notes)
    )


def _special_texts(tokenizer: Any) -> list[str]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return [str(token) for token in added.values()]


def _difference(a: Any, b: Any, text: str) -> str:
    """How two tokenizers disagree about a text; empty when they do not."""
    ids_a, ids_b = ([int(i) for i in t.encode(text, add_special_tokens=False)] for t in (a, b))
    if ids_a == ids_b:
        back_a, back_b = (t.decode(ids_a, clean_up_tokenization_spaces=False) for t in (a, b))
        return "" if back_a == back_b else f"{_short(text)} decodes to {_short(back_a)} / {_short(back_b)}"
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
