"""An evaluation as lines and as a table, for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxq.evaluate.quality.results import Evaluation, ModelQuality
from mlxq.evaluate.quality.statistics import Estimate

if TYPE_CHECKING:
    from rich.console import Console

#: Columns of a terminal that hold every figure.
_WIDE = 110
_SCORED = {"second-half": "the second half of each", "all": "all but the first of each"}


def heading(evaluation: Evaluation) -> str:
    """What was measured on."""
    e = evaluation
    return (
        f"{e.n_tokens:,} tokens of {e.text}: {e.n_sequences} sequences of"
        f" {'up to ' if e.n_tokens % e.n_sequences else ''}{e.length} tokens, {_SCORED[e.score]}"
    )


def render_model(evaluation: Evaluation) -> str:
    """One model, a line a figure."""
    model, reference = evaluation.models[0], evaluation.reference
    lines = [heading(evaluation), f"  size             {_megabytes(model)} MB, {model.bpw:.3f} bits per weight"]
    before = f" (reference {estimate(reference.perplexity)})" if reference else ""
    lines.append(f"  perplexity       {estimate(model.perplexity)}{before}")
    if reference:
        lines += [
            f"  KL, mean         {estimate(model.kl_mean)} nats per token",
            f"  KL, median       {estimate(model.kl_median)}",
            f"  KL, 99 %         {estimate(model.kl_p99)}",
            f"  top-1 agreement  {percent(model.agreement)} ({model.n_flips:,} tokens changed)",
        ]
    if model.block_errors:
        lines.append(f"  hidden states    relative error {model.block_errors[-1]:.3g} after the last block")
    lines.append(f"  took {evaluation.seconds:.1f} s, peak memory {model.peak_memory / 1e6:,.0f} MB")
    return "\n".join(lines + [f"  note: {note}" for note in (*evaluation.notes, *model.notes)])


def print_table(evaluation: Evaluation, console: Console) -> None:
    """All models, one a line, the reference first; on a narrow terminal without the columns that need not be there."""
    from rich.table import Table

    console.print(heading(evaluation))
    rows = _rows(evaluation, wide=console.width >= _WIDE)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(rows[0][0], overflow="fold", min_width=12)
    for name in rows[0][1:]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)
    if evaluation.reference is not None and console.width < _WIDE:
        console.print(f"Median and 99 % of KL stand in a terminal of {_WIDE} columns, and in --json")
    for m in evaluation.models:
        for note in m.notes:
            console.print(f"Note: {m.model}: {note}")
    for note in evaluation.notes:
        console.print(f"Note: {note}")


def short_names(models: Sequence[str]) -> list[str]:
    """The last part of each path; the whole name where two would be the same."""
    short = [Path(m).name or m for m in models]
    return [s if short.count(s) == 1 else m for s, m in zip(short, models, strict=True)]


def _rows(evaluation: Evaluation, wide: bool) -> list[list[str]]:
    """Names of the columns, then the cells of each model."""
    against = evaluation.reference is not None
    tail = ["KL, median", "KL, 99 %"] if wide else []
    rows = [["model", "MB", "bpw", "perplexity", *(["KL, mean", *tail, "top-1, %"] if against else [])]]
    models = [*([evaluation.reference] if against else []), *evaluation.models]
    names = [m.model for m in models] if wide else short_names([m.model for m in models])
    for m, name in zip(models, names, strict=True):
        mark = " (reference)" if m is evaluation.reference else ""
        cells = [name + mark, _megabytes(m), f"{m.bpw:.3f}", estimate(m.perplexity)]
        if against and m.agreement is None:
            cells += [""] * (2 + len(tail))
        elif against:
            shown = [m.kl_mean, *([m.kl_median, m.kl_p99] if wide else [])]
            cells += [*map(estimate, shown), percent(m.agreement, "")]
        rows.append(cells)
    return rows


def estimate(e: Estimate, scale: float = 1.0) -> str:
    """A value and its error, both to the error's second digit; four digits where there is no error."""
    value = e.value * scale
    if not math.isfinite(value):
        return "not finite"
    if e.se is None or not math.isfinite(e.se):
        return f"{value:.4g}"
    se = e.se * scale
    if se == 0:
        return f"{value:.4g} ± 0"
    digits = min(max(1 - math.floor(math.log10(se)), 0), 8)
    return f"{value:,.{digits}f} ± {se:,.{digits}f}"


def percent(e: Estimate, unit: str = " %") -> str:
    return estimate(e, 100) + unit


def _megabytes(m: ModelQuality) -> str:
    return f"{m.nbytes / 1e6:,.1f}"


def to_json(evaluation: Evaluation, stream: Any) -> None:
    """Everything but the flips, indented."""
    import json

    json.dump(evaluation.to_dict(), stream, indent=1, ensure_ascii=False)
    stream.write("\n")
