"""`mlxq bench`: what a model's products cost on this machine."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from mlxq.cli.options import Revision, Source

_ROWS = "1,8,64,512"


def bench(
    model: Source,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Time our kernels and mlx's for the shapes of the model's matrices.")
    ] = False,
    rows: Annotated[str, typer.Option(metavar="M,M,...", help="Rows of x: 1 is a token, more are a prompt.")] = _ROWS,
    store: Annotated[
        bool,
        typer.Option("--store/--no-store", help="Keep for this chip and mlx which kernel is faster, and go by it."),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    revision: Revision = None,
) -> None:
    """Measure kernels with random weights of the model's shapes, beside the speed of memory. Reads no weights."""
    from mlxq.cli.render import ProgressBars
    from mlxq.errors import UsageError

    if not kernels:
        raise UsageError("nothing to measure: pass --kernels (see mlxq bench --help)")
    numbers = _parsed(rows)
    from mlxq.evaluate.kernels.measure import kernel_times
    from mlxq.evaluate.kernels.report import render, render_choice
    from mlxq.ops import choices

    with ProgressBars() as bars:
        result = kernel_times(model, rows=numbers, revision=revision, progress=bars)
    if as_json:
        json.dump(result.to_dict(), sys.stdout, indent=1, ensure_ascii=False)
        sys.stdout.write("\n")
    else:
        typer.echo(render(result))
        typer.echo(render_choice(result))
    measured = result.measured()
    if store and measured:
        path = choices.store(measured)
        typer.echo(f"Stored in {path}", err=as_json)


def _parsed(rows: str) -> list[int]:
    from mlxq.errors import UsageError

    try:
        return [int(number) for number in rows.split(",")]
    except ValueError:
        raise UsageError(f"--rows takes numbers with commas between them, such as {_ROWS}, got {rows!r}") from None
