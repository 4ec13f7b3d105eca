"""Calibration text as token sequences of one length: the built-in sample, a file, or what the model writes itself.

One rule for start tokens: every sequence begins with what the tokenizer puts before a text (a start token, for most
families; nothing for some), and has it nowhere else, as a prompt does when the model is used. Documents follow one
another, a blank line between them, and a document that a sequence cuts goes on in the next: no padding, so that every
position counts. What is left after the last whole sequence is dropped.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlxq.calibration import builtin, text_files
from mlxq.errors import CalibrationError
from mlxq.types import Progress, ProgressCallback

#: Sequences and their tokens where the caller does not say: 65536 tokens, as GPTQ's and AWQ's authors use.
N_SEQUENCES, LENGTH = 128, 512
#: Names of the sources that are not files.
BUILTIN, SELF = "builtin", "self"

#: `generate(prompts, n_tokens, seed)`: for each prompt (token ids, start tokens included) the ids that follow it, at
#: most `n_tokens`, in the prompts' order, one at a time if it is an iterator. The same arguments give the same ids.
Generate = Callable[[Sequence[list[int]], int, int], Iterable[Sequence[int]]]

#: Tokens of a built-in document that the model continues: enough to set language and subject, 3 % of a sequence.
_PROMPT = 16
#: Prompts for every sequence wanted, at most. A model that ends its texts early needs more than one.
_PROMPTS_A_SEQUENCE = 8


@dataclass(frozen=True)
class CalibrationText:
    """Token sequences to calibrate on.

    Attributes:
        sequences: int32 `[S, L]`.
        name: `builtin`, `self`, or the name of the file.
        sha256: hex digest of the text that was read, in UTF-8 (of `self`: of the ids, little-endian int32).
        n_tokens: `S * L`.
        domains: kind of text -> tokens of it in the sequences, start tokens not counted.
    """

    sequences: np.ndarray
    name: str
    sha256: str
    n_tokens: int
    domains: Mapping[str, int]


def calibration_sequences(
    tokenizer: Any,
    source: str | Path = BUILTIN,
    *,
    n_sequences: int = N_SEQUENCES,
    length: int = LENGTH,
    vocab_size: int | None = None,
    seed: int = 0,
    generate: Generate | None = None,
    progress: ProgressCallback | None = None,
) -> CalibrationText:
    """The first `n_sequences` sequences of a text, or all there are.

    Args:
        tokenizer: transformers' tokenizer of the model.
        source: `builtin`, `self` (the model continues the beginnings of the built-in documents, by `generate`), or a
            UTF-8 file: text, or by the ending `.jsonl` lines with `text` or chat `messages`. A file of one of those
            names is reached as `./self` or by a `Path`. Of a file hardly more is read than is used.
        length: tokens of a sequence.
        vocab_size: rows of the model's embedding; None skips the check.
        seed: of what the model writes; texts are taken in their order.
        progress: called with stage `generate` while the model writes.

    Raises:
        CalibrationError: the file cannot be read, is empty, not UTF-8, or has a line that is neither; the text is
            shorter than one sequence; an id is beyond the vocabulary; a chat template is missing or refuses messages;
            `self` without `generate`, or with a model that writes too little.
    """
    if n_sequences < 1 or length < 2:
        raise CalibrationError(
            f"calibration needs at least 1 sequence of 2 tokens; {n_sequences} of {length} tokens are asked for"
        )
    packer = _Packer(start_tokens(tokenizer), n_sequences, length, vocab_size)
    if packer.room < 1:
        raise CalibrationError(f"a sequence of {length} tokens has no room for text after {packer.start} at its start")
    if source == SELF:
        return _own_text(tokenizer, packer, seed, generate, progress)
    read = hashlib.sha256()
    for text in builtin.documents() if source == BUILTIN else text_files.documents(source, tokenizer):
        read.update(text.raw)
        packer.add(text.domain, encode(tokenizer, text.content) if isinstance(text.content, str) else text.content)
        if packer.full:
            break
    return packer.result(str(source), Path(source).name, read.hexdigest())


def digest(sequences: np.ndarray) -> str:
    """SHA-256 of token sequences (little-endian int32), in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(sequences, "<i4")).hexdigest()


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text without what the tokenizer puts around it."""
    return tokenizer.encode(text, add_special_tokens=False)


def start_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text: most have one start token or none, some have two."""
    plain, whole = encode(tokenizer, "a"), list(tokenizer.encode("a"))
    for i in range(len(whole) - len(plain) + 1):
        if whole[i : i + len(plain)] == list(plain):
            return [int(t) for t in whole[:i]]
    return []


@dataclass
class _Packer:
    """Ids in the order they come, cut into sequences."""

    start: list[int]
    n_sequences: int
    length: int
    vocab_size: int | None
    runs: list[tuple[str, np.ndarray]] = field(default_factory=list)
    n_ids: int = 0

    @property
    def room(self) -> int:
        """Tokens of a sequence after its start."""
        return self.length - len(self.start)

    @property
    def full(self) -> bool:
        return self.n_ids >= self.n_sequences * self.room

    def add(self, domain: str, ids: Sequence[int]) -> None:
        """Append a document: start tokens in front of it, as chat templates write them, are left out."""
        n = len(self.start)
        if n and list(ids[:n]) == self.start:
            ids = ids[n:]
        if len(ids):
            self.runs.append((domain, np.asarray(ids, np.int64)))
            self.n_ids += len(ids)

    def result(self, shown: str, name: str, sha256: str | None) -> CalibrationText:
        count = min(self.n_ids // self.room, self.n_sequences)
        if not self.n_ids:
            raise CalibrationError(f"{shown}: the calibration text is empty")
        if not count:
            have = self.n_ids + len(self.start)
            raise CalibrationError(
                f"{shown}: the calibration text has {have} tokens, but one sequence needs {self.length}: give more"
                f" text, or ask for sequences of at most {have} tokens"
            )
        ids = np.concatenate([ids for _, ids in self.runs])[: count * self.room].reshape(count, self.room)
        starts = np.broadcast_to(np.asarray(self.start, np.int64), (count, len(self.start)))
        sequences = np.concatenate([starts, ids], axis=1)
        self._check_vocabulary(shown, sequences)
        sequences = np.ascontiguousarray(sequences, np.int32)
        sequences.flags.writeable = False
        return CalibrationText(sequences, name, sha256 or digest(sequences), sequences.size, self._domains(ids.size))

    def _check_vocabulary(self, shown: str, sequences: np.ndarray) -> None:
        largest = int(sequences.max())
        if self.vocab_size is not None and largest >= self.vocab_size:
            raise CalibrationError(
                f"{shown}: the tokenizer yields id {largest}, but the model's vocabulary has {self.vocab_size} entries:"
                " the tokenizer belongs to another model"
            )

    def _domains(self, n_used: int) -> dict[str, int]:
        found: dict[str, int] = {}
        for domain, ids in self.runs:
            n = min(len(ids), n_used)
            n_used -= n
            if n:
                found[domain] = found.get(domain, 0) + n
        return found


def _own_text(
    tokenizer: Any, packer: _Packer, seed: int, generate: Generate | None, progress: ProgressCallback | None
) -> CalibrationText:
    """What the model writes after the first tokens of the built-in documents (LLM-QAT, Liu et al. 2023, draws the
    first token alone, from the vocabulary: here the beginnings decide how much of which language is written)."""
    if generate is None:
        raise CalibrationError("calibration on the model's own text needs a model that can generate: pass `generate`")
    beginnings = [packer.start + encode(tokenizer, text.content)[:_PROMPT] for text in builtin.documents()]
    prompts = [p for p in beginnings if 0 < len(p) < packer.length]
    if not prompts:
        raise CalibrationError("the tokenizer makes no usable prompt of the built-in text")
    left, total = packer.n_sequences * _PROMPTS_A_SEQUENCE, packer.n_sequences * packer.room
    n_given = n_written = 0
    for number in itertools.count():
        # Every round goes through the documents again, under another seed, and asks for no more than is missing.
        missing = -(-(total - packer.n_ids) // packer.room)
        chosen = list(itertools.islice(prompts, min(missing, left)))
        for prompt, ids in zip(chosen, _checked(generate, chosen, packer.length, seed + number), strict=True):
            packer.add(SELF, [*prompt, *ids])
            n_given, n_written = n_given + len(prompt), n_written + len(ids)
            if progress is not None:
                progress(Progress("generate", min(packer.n_ids, total), total, "tokens", "calibration text"))
        left -= len(chosen)
        if packer.full or left <= 0:
            break
    if n_written < n_given:
        raise CalibrationError(
            f"{SELF}: the model wrote {n_written} tokens after {n_given} of prompts: it ends its texts too soon to be"
            " calibrated on what it writes; calibrate on a file or on the built-in text"
        )
    return packer.result(SELF, SELF, None)


def _checked(generate: Generate, prompts: list[list[int]], length: int, seed: int) -> Iterator[list[int]]:
    for prompt, ids in zip(prompts, generate(prompts, length - max(map(len, prompts)), seed), strict=True):
        if len(prompt) + len(ids) > length:
            raise ValueError(f"{len(ids)} tokens were generated after {len(prompt)}, more than a sequence of {length}")
        yield [int(i) for i in ids]
