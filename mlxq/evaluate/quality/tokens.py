"""One text for several models: the token ids of the first, and a check that the others read the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlxq.checkpoint.base import Checkpoint
from mlxq.checkpoint.config import context_length, vocabulary_size
from mlxq.checkpoint.huggingface import is_tokenizer
from mlxq.errors import EvaluationError
from mlxq.evaluate.quality.scores import vocabularies_differ
from mlxq.evaluate.quality.text import TextOptions, Windows, read_windows
from mlxq.runtime.tokenizer import load_tokenizer

#: Files that decide which ids a text gets.
_DECIDING = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")


def shared_windows(checkpoints: Sequence[Checkpoint], options: TextOptions) -> tuple[Any, Windows, tuple[str, ...]]:
    """The tokenizer of the first model that has one, the text as its ids, and notes.

    Raises:
        CheckpointError: none has a tokenizer, or one cannot be loaded.
        EvaluationError: the text is unfit (see `read_windows`) or has ids that a model does not have; sequences longer
            than a model's context; vocabularies of different sizes; another model's tokenizer gives other ids.
    """
    first = checkpoints[0]
    for other in checkpoints[1:]:
        sizes = vocabulary_size(other.config), vocabulary_size(first.config)
        if None not in sizes and sizes[0] != sizes[1]:
            raise EvaluationError(vocabularies_differ(other.path, sizes[0], first.path, sizes[1]))
    owners = [c for c in checkpoints if is_tokenizer(c.companion_files())]
    owner = owners[0] if owners else first
    tokenizer = load_tokenizer(owner)
    windows = read_windows(tokenizer, options)
    for checkpoint in checkpoints:
        _check_fits(checkpoint, windows)
    files = _deciding(owner)
    for other in owners[1:]:
        if _deciding(other) != files:
            _check_same(owner, windows, other, read_windows(load_tokenizer(other), options))
    without = [c for c in checkpoints if c not in owners]
    notes = tuple(f"{c.path} has no tokenizer; the text was read with that of {owner.path}" for c in without)
    return tokenizer, windows, notes


def _check_fits(checkpoint: Checkpoint, windows: Windows) -> None:
    size, largest = vocabulary_size(checkpoint.config), int(windows.tokens.max())
    if size is not None and largest >= size:
        raise EvaluationError(
            f"{checkpoint.path}: the tokenizer yields id {largest}, but the model's vocabulary has {size} entries: the"
            " tokenizer belongs to another model"
        )
    longest, context = int(windows.lengths.max()), context_length(checkpoint.config)
    if context is not None and longest > context:
        raise EvaluationError(
            f"{checkpoint.path}: was made for {context} tokens at most, but the sequences have {longest}: pass a"
            f" --length of at most {context}"
        )


def _deciding(checkpoint: Checkpoint) -> dict[str, bytes]:
    files = checkpoint.companion_files()
    return {n: f.read_bytes() if isinstance(f, Path) else f for n, f in files.items() if n in _DECIDING}


def _check_same(first: Checkpoint, expected: Windows, other: Checkpoint, found: Windows) -> None:
    lengths = np.array_equal(expected.lengths, found.lengths)
    if lengths and np.array_equal(expected.tokens, found.tokens):
        return
    n = min(len(expected.tokens), len(found.tokens))
    differing = np.flatnonzero(expected.tokens[:n] != found.tokens[:n])
    at = int(differing[0]) if len(differing) else n
    ids = [str(w.tokens[at]) if at < len(w.tokens) else "none" for w in (found, expected)]
    raise EvaluationError(
        f"{other.path}: its tokenizer reads the text differently from that of {first.path}: token {at + 1} has id"
        f" {ids[0]}, not {ids[1]}; predictions for different tokens cannot be compared"
    )
