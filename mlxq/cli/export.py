"""`mlxq export`: a model as a GGUF file, or as GPTQ or AWQ, as it is."""

from __future__ import annotations

from typing import Annotated

import typer

from mlxq.api import DEFAULT_CONTEXT
from mlxq.cli.options import GGUF, Context, DryRun, Exact, Modelfile, NoVerify, Overwrite, Pre, Revision, Source


def export(
    source: Source,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="File to make, which ends in .gguf, or with --to the directory; not needed with --dry-run.",
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="gptq, gptq_v1 (for loaders older than version 2) or awq: a directory for CUDA servers instead of a "
            "GGUF file. Needs integer zero points, as convert --recipe four-way makes them.",
            show_default=False,
        ),
    ] = None,
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RULE",
            help="REGEX=TYPE for tensors with matching GGUF names; may be repeated, the last match wins.",
            show_default=False,
            rich_help_panel=GGUF,
        ),
    ] = None,
    exact: Exact = False,
    pre: Pre = None,
    modelfile: Modelfile = False,
    dry_run: DryRun = False,
    context: Context = DEFAULT_CONTEXT,
    no_verify: NoVerify = False,
    overwrite: Overwrite = False,
    revision: Revision = None,
) -> None:
    """Write a model as a GGUF file, GPTQ or AWQ as it is: MLX's codes keep their decoded weights."""
    from mlxq.cli.render import ProgressBars, print_plan, print_result, print_summary
    from mlxq.conversion import export as run
    from mlxq.errors import OutputError

    if not output and not dry_run:
        raise OutputError(
            "say where the result goes, with --output FILE.gguf, or --to and a directory (or plan only: --dry-run)"
        )
    with ProgressBars() as bars:
        result = run(
            source,
            output,
            to=to,
            tensor_types=tuple(tensor_type or ()),
            exact=exact,
            pre=pre,
            modelfile=modelfile,
            revision=revision,
            overwrite=overwrite,
            verify=not no_verify,
            dry_run=dry_run,
            on_plan=None if dry_run else print_summary,
            progress=bars,
        )
    if dry_run:
        print_plan(result, context)
    else:
        print_result(result, [output])
