"""A text as token sequences, and which of their tokens are scored.

A text is cut into sequences of one length, one after the other. Each begins with what the tokenizer puts before a text
(a start token, for many), as llama.cpp's perplexity tool has it. By default the second half of every sequence is
scored, as there too: every scored token then has at least half a sequence before it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from mlxq.api import DEFAULT_LENGTH, DEFAULT_SEQUENCES
from mlxq.calibration.texts import encode, start_tokens
from mlxq.errors import EvaluationError
from mlxq.evaluate.texts import sections

Score = Literal["second-half", "all"]
BUILTIN = "built-in sample"

#: Bytes of text read for each token that is wanted, at first; more where tokens are longer.
_BYTES_PER_TOKEN = 16
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class TextOptions:
    """What of a text is measured.

    Attributes:
        text: a UTF-8 file, or None for the built-in sample, each section of which is one sequence.
        sequences: at most so many; 0 takes all there are, None all sections of the sample and `DEFAULT_SEQUENCES` of
            a file.
        length: tokens of a sequence, start tokens included.
        from_end: take the last sequences of the file, not the first.
        score: `second-half` scores the tokens of the second half of each sequence, `all` every token after the first.

    Raises:
        EvaluationError: an option that has no meaning.
    """

    text: str | Path | None = None
    sequences: int | None = None
    length: int = DEFAULT_LENGTH
    from_end: bool = False
    score: Score = "second-half"

    @property
    def wanted(self) -> int:
        """Sequences at most; 0 for all there are."""
        if self.sequences is None:
            return 0 if self.text is None else DEFAULT_SEQUENCES
        return self.sequences

    def __post_init__(self) -> None:
        if self.wanted < 0:
            raise EvaluationError(f"the number of sequences is {self.sequences}; it is 1 or more, or 0 for all")
        if self.length < 2:
            raise EvaluationError(f"sequences of {self.length} tokens leave nothing to predict; ask for 2 or more")
        if self.score not in get_args(Score):
            raise EvaluationError(f"{self.score!r} says not what is scored; choose of {', '.join(get_args(Score))}")
        if self.text is None and self.from_end:
            raise EvaluationError("the built-in sample has no end to count from; name a text")


@dataclass(frozen=True, eq=False)
class Windows:
    """Token sequences and what is scored of them.

    Attributes:
        sequences: int32 arrays, their lengths may differ.
        name: of the text.
        score: which tokens are scored.
    """

    sequences: tuple[np.ndarray, ...]
    name: str
    score: Score

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.array([len(ids) for ids in self.sequences])

    @cached_property
    def tokens(self) -> np.ndarray:
        """All ids, sequence after sequence."""
        return np.concatenate(self.sequences)

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each sequence begins in `tokens`."""
        return np.cumsum(self.lengths) - self.lengths

    @cached_property
    def rows(self) -> np.ndarray:
        """`[n]`, indices into `tokens`: the predictions made there are scored, with the tokens that follow."""
        first = np.maximum(self.lengths // 2, 1) if self.score == "second-half" else np.ones_like(self.lengths)
        ranges = zip(self.starts + first - 1, self.starts + self.lengths - 1, strict=True)
        return np.concatenate([np.arange(a, b) for a, b in ranges])

    @cached_property
    def targets(self) -> np.ndarray:
        """`[n]`, the token that follows each row."""
        return self.tokens[self.rows + 1].astype(np.int64)

    @cached_property
    def of(self) -> np.ndarray:
        """`[n]`, the sequence of each row."""
        return np.searchsorted(self.starts, self.rows, side="right") - 1


def read_windows(tokenizer: Any, options: TextOptions) -> Windows:
    """Token sequences of a text.

    Args:
        tokenizer: transformers' tokenizer.
        options: which text, and how much of it.

    Raises:
        EvaluationError: the file cannot be read, is empty, not UTF-8, or has fewer tokens than one sequence.
    """
    start = start_tokens(tokenizer)
    room = options.length - len(start)
    if room < 1:
        raise EvaluationError(f"a sequence of {options.length} tokens has no room after {len(start)} start tokens")
    if options.text is None:
        bodies: Iterable[list[int]] = (encode(tokenizer, body)[:room] for body in sections().values())
        bodies = [ids for ids in bodies if len(start) + len(ids) > 1]
        bodies = bodies[: options.wanted or None]
        name = BUILTIN
        if not bodies:
            raise EvaluationError(f"the tokenizer makes fewer than two tokens of every section of the {BUILTIN}")
    else:
        path = Path(options.text).expanduser()
        bodies, name = _cut(path, _tokens(path, tokenizer, options, room), options, room, len(start)), path.name
    return Windows(tuple(np.array([*start, *ids], np.int32) for ids in bodies), name, options.score)


def _cut(path: Path, ids: list[int], options: TextOptions, room: int, n_start: int) -> list[list[int]]:
    count = len(ids) // room
    if not count:
        raise EvaluationError(
            f"{path}: has {len(ids) + n_start} tokens, but one sequence needs {options.length}: give more text, or"
            f" sequences of at most {len(ids) + n_start} tokens (--length)"
        )
    count = min(count, options.wanted or count)
    first = len(ids) - count * room if options.from_end else 0
    return [ids[first + i * room : first + (i + 1) * room] for i in range(count)]


def _tokens(path: Path, tokenizer: Any, options: TextOptions, room: int) -> list[int]:
    """At least as many tokens as are wanted of a file, from its beginning or its end, if it has so many."""
    wanted = options.wanted * room
    size = _size(path)
    nbytes = wanted * _BYTES_PER_TOKEN if wanted else size
    while True:
        ids = encode(tokenizer, _read(path, min(nbytes, size), options.from_end))
        if len(ids) >= (wanted or len(ids) + 1) or nbytes >= size:
            return ids
        nbytes *= 4


def _size(path: Path) -> int:
    try:
        if path.is_dir():
            raise EvaluationError(f"{path}: a directory; name a text file")
        size = os.stat(path).st_size
    except OSError as e:
        raise EvaluationError(f"cannot read {path}: {e.strerror or e}") from e
    if size == 0:
        raise EvaluationError(f"{path}: the text is empty")
    return size


def _read(path: Path, nbytes: int, from_end: bool) -> str:
    """Text of the first or last `nbytes` of a file, less the line that is cut."""
    try:
        with open(path, "rb") as f:
            size = f.seek(0, os.SEEK_END)
            first = f.seek(size - nbytes if from_end else 0)
            raw = f.read(nbytes)
    except OSError as e:
        raise EvaluationError(f"cannot read {path}: {e.strerror or e}") from e
    if len(raw) < size:
        cut = _whole(raw, from_end)
        first += cut.start
        raw = raw[cut]
    if first == 0:
        raw = raw.removeprefix(_BOM)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise EvaluationError(
            f"{path}: is not UTF-8 text: byte {first + e.start} is {raw[e.start]:#04x}; save it as UTF-8"
        ) from None
    if not text.strip():
        raise EvaluationError(f"{path}: the text is empty: nothing but white space")
    return text


def _whole(raw: bytes, from_end: bool) -> slice:
    """A piece of a text less the line that it was cut in, or the character where it has one line alone."""
    if from_end:
        line = raw.find(b"\n") + 1
        return slice(line or next((i for i in range(3) if not _continues(raw, i)), 3), len(raw))
    line = raw.rfind(b"\n") + 1
    start = next((i for i in range(len(raw) - 1, max(len(raw) - 5, -1), -1) if not _continues(raw, i)), 0)
    return slice(0, line or start)


def _continues(raw: bytes, i: int) -> bool:
    """Whether a byte is one of a character in UTF-8 but not its first."""
    return raw[i] & 0xC0 == 0x80
