"""`mlxq convert`: quantize a model, print the plan, then the proof."""

from __future__ import annotations

from typing import Annotated

import typer

from mlxq.api import DEFAULT_CONTEXT
from mlxq.cli.options import Revision, Source

_PLAN = "Plan"
_RUN = "Run"


def convert(
    source: Source,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Directory to make. Not needed with --dry-run.")
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(
            "--bits",
            "-b",
            help="Bits per code: 2, 3, 4, 5, 6 or 8. (default: 4, or the source's own codes if it is quantized)",
            show_default=False,
            rich_help_panel=_PLAN,
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size",
            "-g",
            help="Weights that share a scale: 32, 64 or 128. (default: 64)",
            show_default=False,
            rich_help_panel=_PLAN,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="uniform, or mixed: more bits for value, down-projection, embedding and head. (default: uniform)",
            show_default=False,
            rich_help_panel=_PLAN,
        ),
    ] = None,
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(
            help="REGEX=BITS or REGEX=BITS:GROUP for matching tensors; may be repeated, the last match wins.",
            show_default=False,
            rich_help_panel=_PLAN,
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="REGEX of tensors that stay float; may be repeated.", show_default=False, rich_help_panel=_PLAN
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float16, bfloat16 or float32 for scales and kept tensors. (default: as the source)",
            show_default=False,
            rich_help_panel=_PLAN,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the plan, tensor by tensor, and write nothing.", rich_help_panel=_RUN),
    ] = False,
    context: Annotated[
        int,
        typer.Option(min=1, help="Context length, in tokens, for the dry run's memory estimate.", rich_help_panel=_RUN),
    ] = DEFAULT_CONTEXT,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Skip the proof at the end.", rich_help_panel=_RUN)
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace an existing model directory, on success only.", rich_help_panel=_RUN),
    ] = False,
    revision: Revision = None,
) -> None:
    """Quantize a model into an MLX directory that stock mlx-lm loads, and prove the result."""
    from mlxq.cli.render import ProgressBars, print_plan, print_result, print_summary
    from mlxq.conversion import convert as run
    from mlxq.errors import OutputError

    if not output and not dry_run:
        raise OutputError("say where the result goes with --output DIR (or plan only, with --dry-run)")
    with ProgressBars() as bars:
        result = run(
            source,
            output,
            bits=bits,
            group_size=group_size,
            recipe=recipe,
            tensor_types=tuple(tensor_type or ()),
            keep=tuple(keep or ()),
            dtype=dtype,
            revision=revision,
            overwrite=overwrite,
            verify=not no_verify,
            dry_run=dry_run,
            on_plan=None if dry_run else print_summary,
            progress=bars,
        )
    if dry_run:
        print_plan(result.plan, result.config, context)
    else:
        print_result(result, output)
