"""`mlxq eval`: how well a model predicts a text, and how far from its reference."""

from __future__ import annotations

import typer

from mlxq.api import DEFAULT_LENGTH
from mlxq.cli import eval_options as o
from mlxq.cli.options import Source


def evaluate(
    model: Source,
    reference: o.Reference = None,
    text: o.Text = None,
    sequences: o.Sequences = None,
    length: o.Length = DEFAULT_LENGTH,
    from_end: o.FromEnd = False,
    score: o.Scored = "second-half",
    cache: o.Cache = None,
    no_cache: o.NoCache = False,
    as_json: o.AsJson = False,
    report: o.Report = None,
) -> None:
    """Measure perplexity, and with a reference KL divergence and top-1 agreement, each with its standard error."""
    evaluation = o.measure(
        [model],
        report,
        as_json,
        reference=reference,
        text=text,
        sequences=sequences,
        length=length,
        from_end=from_end,
        score=score,
        cache=cache,
        use_cache=not no_cache,
    )
    if not as_json:
        from mlxq.evaluate.quality.table import render_model

        typer.echo(render_model(evaluation))
    if report is not None:
        typer.echo(f"Wrote {report}", err=as_json)
