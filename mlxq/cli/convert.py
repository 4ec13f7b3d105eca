"""`mlxq convert`: quantize a model, print the plan, then the proof."""

from __future__ import annotations

from typing import Annotated

import typer

from mlxq.api import DEFAULT_CONTEXT
from mlxq.cli.options import (
    BUDGET,
    CALIBRATION,
    GGUF,
    PLAN,
    Calib,
    CalibLength,
    CalibSequences,
    Context,
    DryRun,
    Exact,
    MaxMemory,
    Modelfile,
    NoVerify,
    Overwrite,
    Pre,
    Revision,
    Seed,
    Source,
)


def convert(
    source: Source,
    output: Annotated[
        list[str] | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="Directory to make for MLX, or a file name that ends in .gguf; with --recipe portable or four-way "
            "both, each with its own -o. Not needed with --dry-run.",
        ),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(
            "--bits",
            "-b",
            help="Bits per code: 2, 3, 4, 5, 6 or 8. (default: 4, or the source's own codes if it is quantized)",
            show_default=False,
            rich_help_panel=PLAN,
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size",
            "-g",
            help="Weights that share a scale: 32, 64 or 128. (default: 64)",
            show_default=False,
            rich_help_panel=PLAN,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="uniform; mixed: more bits for value, down-projection, embedding and head; portable: as mixed, in "
            "codes that a GGUF file holds exactly too; or four-way: 4 bits that GGUF, GPTQ and AWQ files hold exactly. "
            "(default: uniform)",
            show_default=False,
            rich_help_panel=PLAN,
        ),
    ] = None,
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RULE",
            help="REGEX=BITS or REGEX=BITS:GROUP for matching tensors; in a GGUF file REGEX=TYPE, with GGUF names. May "
            "be repeated; the last match wins.",
            show_default=False,
            rich_help_panel=PLAN,
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX",
            help="Tensors that stay float; may be repeated.",
            show_default=False,
            rich_help_panel=PLAN,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="float16, bfloat16 or float32 for scales and kept tensors. (default: as the source)",
            show_default=False,
            rich_help_panel=PLAN,
        ),
    ] = None,
    exact: Exact = False,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="rtn: round to nearest, in seconds instead of minutes; search, gptq, awq or awq+gptq: by what a "
            "calibration text sends into each layer. (default: gptq for 6 bits or fewer, rtn for more)",
            show_default=False,
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    calib: Calib = "builtin",
    calib_sequences: CalibSequences = 128,
    calib_length: CalibLength = 512,
    seed: Seed = 0,
    tune: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Gradient steps that go on to move each block's scales, biases and codes, after --method; 0: none.",
            rich_help_panel=CALIBRATION,
        ),
    ] = 0,
    max_memory: MaxMemory = None,
    target_bpw: Annotated[
        float | None,
        typer.Option(
            metavar="BITS",
            help="Bits per weight of the result, everything counted; each tensor's bits by what they cost.",
            show_default=False,
            rich_help_panel=BUDGET,
        ),
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="The same as a size: 4.2GB.", show_default=False, rich_help_panel=BUDGET),
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory of the machine, such as 16GB, for weights and the cache of --context tokens.",
            show_default=False,
            rich_help_panel=BUDGET,
        ),
    ] = None,
    target_kl: Annotated[
        float | None,
        typer.Option(
            metavar="NATS",
            help="The smallest whose measured divergence from the source is at most so much, found by some trials.",
            show_default=False,
            rich_help_panel=BUDGET,
        ),
    ] = None,
    costs: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Measured costs: read if it is there, else written, to be used again. Also for --method gptq.",
            show_default=False,
            rich_help_panel=BUDGET,
        ),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="What each matrix gets: followed if it is there, else written, to be used again.",
            show_default=False,
            rich_help_panel=PLAN,
        ),
    ] = None,
    type: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="What llama.cpp calls the file: Q4_K_M, Q5_K_S, Q6_K, Q8_0, IQ4_XS, BF16 ... (default: Q4_K_M, or "
            "what the source holds if it is quantized)",
            show_default=False,
            rich_help_panel=GGUF,
        ),
    ] = None,
    imatrix: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Importance matrix that weights the errors, in llama.cpp's GGUF or .dat form; also for the portable "
            "recipe.",
            show_default=False,
            rich_help_panel=GGUF,
        ),
    ] = None,
    pre: Pre = None,
    modelfile: Modelfile = False,
    dry_run: DryRun = False,
    context: Context = DEFAULT_CONTEXT,
    no_verify: NoVerify = False,
    overwrite: Overwrite = False,
    revision: Revision = None,
) -> None:
    """Quantize a model into an MLX directory that stock mlx-lm loads, or a GGUF file that llama.cpp loads; prove it."""
    from mlxq.cli.render import ProgressBars, print_plan, print_result, print_summary
    from mlxq.conversion import convert as run
    from mlxq.errors import OutputError

    if not output and not dry_run:
        raise OutputError("say where the result goes, with --output DIR or FILE.gguf (or plan only, with --dry-run)")
    with ProgressBars() as bars:
        result = run(
            source,
            output,
            type=type,
            bits=bits,
            group_size=group_size,
            recipe=recipe,
            tensor_types=tuple(tensor_type or ()),
            keep=tuple(keep or ()),
            dtype=dtype,
            imatrix=imatrix,
            exact=exact,
            method=method,
            calib=calib,
            calib_sequences=calib_sequences,
            calib_length=calib_length,
            seed=seed,
            tune=tune,
            max_memory=max_memory,
            target_bpw=target_bpw,
            target_size=target_size,
            fit=fit,
            target_kl=target_kl,
            context=context,
            costs=costs,
            plan=plan,
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
        print_result(result, output)
