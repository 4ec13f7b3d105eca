"""An evaluation as lines and as a table, for a terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from mlxq.evaluate.quality.results import Evaluation, ModelQuality
from mlxq.evaluate.quality.statistics import Estimate

if TYPE_CHECKING:
    from rich.console import Console

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
    """All models, one a line, the reference first."""
    from rich.table import Table

    console.print(heading(evaluation))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", overflow="fold")
    against = evaluation.reference is not None
    names = ["MB", "bpw", "perplexity", *(["KL mean", "KL median", "KL 99 %", "top-1 %"] if against else [])]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for m in ([evaluation.reference] if against else []) + list(evaluation.models):
        table.add_row(*_row(m, against, " (reference)" if m is evaluation.reference else ""))
    console.print(table)
    for m in evaluation.models:
        for note in m.notes:
            console.print(f"Note: {m.model}: {note}")
    for note in evaluation.notes:
        console.print(f"Note: {note}")


def _row(m: ModelQuality, against: bool, mark: str) -> list[str]:
    cells = [m.model + mark, _megabytes(m), f"{m.bpw:.3f}", estimate(m.perplexity)]
    if against:
        cells += [estimate(e) if e else "" for e in (m.kl_mean, m.kl_median, m.kl_p99)]
        cells.append(percent(m.agreement, "") if m.agreement else "")
    return cells


def estimate(e: Estimate, scale: float = 1.0) -> str:
    """A value and its error, both to the error's second digit; four digits where there is no error."""
    value = e.value * scale
    if not math.isfinite(value):
        return "not finite"
    if e.se is None or not math.isfinite(e.se):
        return f"{value:.4g}"
    se = e.se * scale
    digits = min(max(1 - math.floor(math.log10(se)), 0), 8) if se else 4
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
