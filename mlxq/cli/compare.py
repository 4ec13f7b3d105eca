"""`mlxq compare`: several models on one text, in one table."""

from __future__ import annotations

from typing import Annotated

import typer

from mlxq.api import DEFAULT_LENGTH
from mlxq.cli import eval_options as o

#: Columns where there is no terminal to fit.
_WIDTH = 200


def compare(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Model directories, GGUF files, or Hugging Face Hub ids (org/name)."),
    ],
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
    """Put models of one family side by side: size, perplexity, divergence from the reference, top-1 agreement.

    For whether two artifacts hold the same weights, see `mlxq verify`.
    """
    evaluation = o.measure(
        models,
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
        from rich.console import Console

        from mlxq.evaluate.quality.table import print_table

        console = Console(highlight=False, markup=False, emoji=False)
        if not console.is_terminal:
            console.width = _WIDTH
        print_table(evaluation, console)
    if report is not None:
        typer.echo(f"Wrote {report}", err=as_json)
