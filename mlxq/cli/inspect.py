"""`mlxq inspect`: what a model is and weighs, from its headers alone."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from mlxq.api import DEFAULT_CONTEXT
from mlxq.cli.options import Revision, Source


def inspect(
    model: Source,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Context length, in tokens, for the memory estimate. (default: {DEFAULT_CONTEXT})",
            show_default=False,
        ),
    ] = None,
    tensors: Annotated[bool, typer.Option("--tensors/--no-tensors", help="List every tensor.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    revision: Revision = None,
) -> None:
    """Show architecture, formats, bits per weight, bytes, and the memory to run it. Reads no weights."""
    from mlxq.evaluate.inspect import inspect as run

    inspection = run(model, revision=revision, context=context)
    if as_json:
        json.dump(inspection.to_dict(), sys.stdout, indent=1, ensure_ascii=False)
        sys.stdout.write("\n")
        return
    from mlxq.evaluate.report import render_inspection

    typer.echo(render_inspection(inspection, tensors=tensors))
