"""`mlxq verify`: whether two artifacts of one model hold the same weights, tokenizer, chat template and settings."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

_COMPARE = "Compare"
#: Columns where there is no terminal to fit.
_WIDTH = 200


def verify(
    a: Annotated[
        str, typer.Argument(metavar="A", help="A model directory, a GGUF file, or a Hugging Face Hub id (org/name).")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The same model in another form, or once more.")],
    tolerance: Annotated[
        float,
        typer.Option(
            metavar="REL",
            help="Relative RMSE that a tensor may have. 0 asks for the same numbers.",
            rich_help_panel=_COMPARE,
        ),
    ] = 0.0,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PART",
            help="Compare this alone: tensors, tokenizer, template or config; may be repeated. (default: all)",
            show_default=False,
            rich_help_panel=_COMPARE,
        ),
    ] = None,
    no_tokenizer: Annotated[
        bool, typer.Option("--no-tokenizer", help="Leave out tokenizer and chat template.", rich_help_panel=_COMPARE)
    ] = False,
    logits: Annotated[
        bool,
        typer.Option(
            "--logits", help="Also run both over a short text and measure the divergence.", rich_help_panel=_COMPARE
        ),
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="List every tensor, not the 10 worst.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    revision_a: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a Hub id A.", rich_help_panel="Source")
    ] = None,
    revision_b: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a Hub id B.", rich_help_panel="Source")
    ] = None,
) -> None:
    """Compare two artifacts of one model: weights as numbers, token ids, chat template, settings.

    Each is a Hugging Face, MLX or GGUF model. The exit status is 0 if all are the same, 1 if not.
    """
    from mlxq.cli.render import ProgressBars
    from mlxq.evaluate.comparison.compare import PARTS, compare

    parts = list(only) if only else list(PARTS)
    if no_tokenizer:
        parts = [p for p in parts if p not in ("tokenizer", "template")]
    with ProgressBars() as bars:
        comparison = compare(
            a,
            b,
            tolerance=tolerance,
            only=parts,
            logits=logits,
            revision_a=revision_a,
            revision_b=revision_b,
            progress=bars,
        )
    if as_json:
        json.dump(comparison.to_dict(), sys.stdout, indent=1, ensure_ascii=False)
        sys.stdout.write("\n")
    else:
        from rich.console import Console

        from mlxq.evaluate.comparison.report import print_comparison

        console = Console(highlight=False, markup=False, emoji=False)
        if not console.is_terminal:
            console.width = _WIDTH
        print_comparison(comparison, console, every=every)
    if not comparison.passed:
        raise typer.Exit(1)
