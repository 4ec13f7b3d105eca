"""What `mlxq eval` and `mlxq compare` share: their options, the run, and where its result goes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxq.api import DEFAULT_SEQUENCES

if TYPE_CHECKING:
    from mlxq.evaluate.quality.results import Evaluation

_TEXT, _OUTPUT = "Text", "Output"

Reference = Annotated[
    str | None,
    typer.Option(
        metavar="REF",
        help="The model that it was made from: measures the divergence from it.",
        show_default=False,
    ),
]
Text = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="UTF-8 text. (default: a short built-in sample)", show_default=False, rich_help_panel=_TEXT
    ),
]
Sequences = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        help=f"Sequences at most; 0 takes all of the text. (default: {DEFAULT_SEQUENCES}; of the sample, all)",
        show_default=False,
        rich_help_panel=_TEXT,
    ),
]
Length = Annotated[int, typer.Option(min=2, metavar="L", help="Tokens of a sequence.", rich_help_panel=_TEXT)]
FromEnd = Annotated[
    bool, typer.Option("--from-end", help="Take the last sequences of the text.", rich_help_panel=_TEXT)
]
Scored = Annotated[
    str, typer.Option("--score", metavar="WHAT", help="second-half of each sequence, or all.", rich_help_panel=_TEXT)
]
Cache = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="Where the reference's predictions are kept. (default: mlxq's cache directory)",
        show_default=False,
    ),
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Neither read nor keep the reference's predictions.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=_OUTPUT)]
Report = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.html",
        help="Also write a page with charts and the places where predictions changed; replaces an older one.",
        show_default=False,
        rich_help_panel=_OUTPUT,
    ),
]


def measure(models: Sequence[str], report: str | None, as_json: bool, **options: Any) -> Evaluation:
    """Run the models under a progress bar; writes the report and JSON where they are asked for."""
    from mlxq.cli.render import ProgressBars
    from mlxq.evaluate.quality.measure import evaluate_models
    from mlxq.evaluate.quality.page import check_place, write_page
    from mlxq.evaluate.quality.table import to_json

    if report is not None:
        check_place(report)
    with ProgressBars() as bars:
        evaluation = evaluate_models(models, progress=bars, **options)
    if report is not None:
        write_page(evaluation, report)
    if as_json:
        to_json(evaluation, sys.stdout)
    return evaluation
