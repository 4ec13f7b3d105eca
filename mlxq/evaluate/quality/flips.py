"""Flips as text: what stands around the token, and both candidates, as a person reads them."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxq.evaluate.quality.results import Candidate, Flip
from mlxq.evaluate.quality.scores import Scores
from mlxq.evaluate.quality.text import Windows

#: Flips that are kept of a model: those with the largest divergence.
_LISTED = 400
#: Tokens of text shown before and after.
_BEFORE, _AFTER = 32, 12
_BROKEN = "\ufffd"


def listed_flips(tokenizer: Any, windows: Windows, scores: Scores) -> tuple[Flip, ...]:
    """The flips with the largest divergence first.

    Args:
        tokenizer: transformers' tokenizer; its `decode` makes the text.
    """
    flips, kl = scores.flips, scores.kl
    order = np.argsort(-kl[flips.row], kind="stable")[:_LISTED]
    return tuple(_flip(tokenizer, windows, float(kl[flips.row[i]]), i, flips) for i in order)


def _flip(tokenizer: Any, windows: Windows, kl: float, i: int, flips: Any) -> Flip:
    row = int(flips.row[i])
    sequence = int(windows.of[row])
    ids = windows.sequences[sequence]
    at = int(windows.rows[row] - windows.starts[sequence]) + 1
    p = [float(x) for x in flips.probabilities[i]]
    return Flip(
        sequence=sequence + 1,
        position=at + 1,
        kl=kl,
        before=_text(tokenizer, ids[max(at - _BEFORE, 0) : at]),
        target=token_text(tokenizer, int(ids[at])),
        after=_text(tokenizer, ids[at + 1 : at + 1 + _AFTER]),
        reference=Candidate(token_text(tokenizer, int(flips.reference[i])), p[0], p[1]),
        model=Candidate(token_text(tokenizer, int(flips.model[i])), p[2], p[3]),
    )


def token_text(tokenizer: Any, token: int) -> str:
    """The text of one token; where it is part of a character, or stands for none, its name in the vocabulary."""
    text = _text(tokenizer, [token])
    if text and _BROKEN not in text:
        return text
    name = tokenizer.convert_ids_to_tokens(token)
    return f"[{token}]" if name is None else str(name)


def _text(tokenizer: Any, ids: Any) -> str:
    return tokenizer.decode([int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)
