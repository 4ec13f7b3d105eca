"""`mlxq imatrix`: how much each input of a model's matrices matters, measured on a text, for llama.cpp's quantizer."""

from __future__ import annotations

from typing import Annotated

import typer

from mlxq.cli.options import Calib, CalibLength, CalibSequences, MaxMemory, Overwrite, Revision, Seed, Source


def imatrix(
    source: Source,
    output: Annotated[
        str,
        typer.Argument(
            help="File to make, which ends in .gguf, or in .dat for the form that older versions of llama.cpp read."
        ),
    ],
    calib: Calib = "builtin",
    calib_sequences: CalibSequences = 128,
    calib_length: CalibLength = 512,
    seed: Seed = 0,
    max_memory: MaxMemory = None,
    overwrite: Overwrite = False,
    revision: Revision = None,
) -> None:
    """Run a model over a text and write an importance matrix, for `llama-quantize` and `mlxq convert --imatrix`."""
    from mlxq.cli.render import ProgressBars
    from mlxq.conversion.importance import write_importance

    with ProgressBars() as bars:
        matrix = write_importance(
            source,
            output,
            calib=calib,
            calib_sequences=calib_sequences,
            calib_length=calib_length,
            seed=seed,
            max_memory=max_memory,
            revision=revision,
            overwrite=overwrite,
            progress=bars,
        )
    text = f"{matrix.chunk_count} sequences of {matrix.chunk_size} tokens of {', '.join(matrix.datasets)}"
    typer.echo(f"{len(matrix.entries)} matrices, {text}")
    unseen = matrix.unseen()
    if unseen:
        typer.echo(f"Note: no token reached {sum(unseen.values())} experts, the first in {next(iter(unseen))}")
    typer.echo(f"Wrote {output}")
