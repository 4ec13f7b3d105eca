"""Scores of every token from the logits of one model, or of a model and its reference, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlxq.errors import EvaluationError
from mlxq.evaluate.divergence import score_tokens
from mlxq.evaluate.quality.predictions import Predictions
from mlxq.evaluate.quality.text import Windows

#: Logits of one model that are computed at a time (64 MB in float32), but at least so many rows.
_LOGITS = 1 << 24
_LEAST_ROWS = 64


@dataclass(frozen=True, eq=False)
class Flips:
    """Rows where model and reference put different tokens first, as arrays `[f]`.

    `row` counts the scored rows; `reference`, `model` are token ids; `probabilities` `[f, 4]` are those of the
    reference's token under reference and model, then of the model's token under both.
    """

    row: np.ndarray
    reference: np.ndarray
    model: np.ndarray
    probabilities: np.ndarray


@dataclass(frozen=True, eq=False)
class Scores:
    """Per scored token `[n]`: negative log likelihoods, and with a reference `kl` in nats and `agree` (0 or 1)."""

    nll: np.ndarray
    nll_reference: np.ndarray | None = None
    kl: np.ndarray | None = None
    agree: np.ndarray | None = None
    flips: Flips | None = None


def score_model(
    where: Path, model: Predictions, windows: Windows, vocabulary: int, on_chunk: Callable[[str], None]
) -> Scores:
    """Score a model alone.

    Raises:
        EvaluationError: its logits are not finite.
    """
    nll = np.empty(len(windows.rows))
    for part in head_chunks(len(nll), vocabulary):
        logits = model.logits(part)
        check_finite(logits, where, windows, part)
        nll[part] = _log_totals(logits) - logits[np.arange(len(logits)), windows.targets[part]].astype(np.float64)
        on_chunk("head")
    return Scores(nll)


def score_pair(
    wheres: tuple[Path, Path],
    reference: Predictions,
    model: Predictions,
    windows: Windows,
    vocabulary: int,
    on_chunk: Callable[[str], None],
) -> Scores:
    """Score a model against its reference; `wheres` are the reference's path and the model's.

    Raises:
        EvaluationError: logits that are not finite, or of vocabularies of different sizes.
    """
    n = len(windows.rows)
    found = {name: np.empty(n) for name in ("kl", "agree", "nll_source", "nll_result")}
    flips = []
    for part in head_chunks(n, vocabulary):
        a, b = reference.logits(part), model.logits(part)
        if a.shape != b.shape:
            raise EvaluationError(vocabularies_differ(wheres[1], b.shape[1], wheres[0], a.shape[1]))
        check_finite(a, wheres[0], windows, part)
        check_finite(b, wheres[1], windows, part)
        scores = score_tokens(a, b, windows.targets[part])
        for name, values in found.items():
            values[part] = getattr(scores, name)
        flips.append(_flips(a, b, np.flatnonzero(scores.agree == 0), part.start))
        on_chunk("head")
    return Scores(
        found["nll_result"],
        found["nll_source"],
        found["kl"],
        found["agree"],
        Flips(*(np.concatenate(parts) for parts in zip(*flips, strict=True))),
    )


def head_chunks(n_rows: int, vocabulary: int) -> list[slice]:
    """Ranges of rows whose logits are computed together: the head is decoded for each."""
    step = max(_LOGITS // vocabulary, _LEAST_ROWS)
    return [slice(i, min(i + step, n_rows)) for i in range(0, n_rows, step)]


def vocabularies_differ(model: Path, n: int, reference: Path, n_reference: int) -> str:
    return (
        f"{model}: predicts {n:,} tokens, the reference {reference} {n_reference:,}: vocabularies of different sizes"
        " cannot be compared; is it a quantization of that reference?"
    )


def check_finite(logits: np.ndarray, where: Path, windows: Windows, part: slice) -> None:
    """Refuse NaN and positive infinity; models that mask tokens give them negative infinity, a probability of 0.

    Raises:
        EvaluationError: naming the model and the first such place.
    """
    bad = np.flatnonzero(~np.isfinite(logits.max(axis=1)))
    if len(bad):
        row = part.start + int(bad[0])
        sequence = int(windows.of[row])
        token = int(windows.rows[row] - windows.starts[sequence])
        raise EvaluationError(
            f"{where}: yields logits that are NaN or infinite, first in sequence {sequence + 1} at token {token + 1}:"
            " the model is broken, or overflows"
        )


def _flips(a: np.ndarray, b: np.ndarray, rows: np.ndarray, start: int) -> tuple[np.ndarray, ...]:
    """Of chunk rows: place, the two candidates, and the four probabilities."""
    a, b = a[rows], b[rows]
    first, second = a.argmax(axis=1), b.argmax(axis=1)
    at = np.arange(len(rows))
    totals = _log_totals(a), _log_totals(b)
    columns = [
        np.exp(logits[at, ids].astype(np.float64) - total)
        for ids in (first, second)
        for logits, total in zip((a, b), totals, strict=True)
    ]
    return rows + start, first, second, np.stack(columns, axis=1)


def _log_totals(logits: np.ndarray) -> np.ndarray:
    """`log sum exp` of each row, float64 `[n]`; a row at a time, so that float64 copies stay in the cache."""
    totals = np.empty(len(logits))
    for i, row in enumerate(logits):
        wide = row.astype(np.float64)
        largest = wide.max()
        wide -= largest
        totals[i] = largest + np.log(np.exp(wide, out=wide).sum())
    return totals
