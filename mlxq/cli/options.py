"""Options that more than one command takes, spelled once."""

from __future__ import annotations

from typing import Annotated

import typer

Source = Annotated[str, typer.Argument(help="A model directory, a GGUF file, or a Hugging Face Hub id (org/name).")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.", rich_help_panel="Source")]

PLAN, CALIBRATION, BUDGET, RUN, GGUF = "Plan", "Calibration", "Budget", "Run", "GGUF files"

Exact = Annotated[
    bool,
    typer.Option("--exact", help="Refuse whatever would change a decoded weight.", rich_help_panel=PLAN),
]
Pre = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="llama.cpp's name for how the tokenizer splits text, where it cannot be found out.",
        show_default=False,
        rich_help_panel=GGUF,
    ),
]
Modelfile = Annotated[
    bool, typer.Option("--modelfile", help="Write a Modelfile for Ollama beside the file.", rich_help_panel=GGUF)
]
Calib = Annotated[
    str,
    typer.Option(
        metavar="FILE",
        help="Calibration text: a file of text or JSON lines, builtin, or self (the model writes it).",
        rich_help_panel=CALIBRATION,
    ),
]
CalibSequences = Annotated[int, typer.Option(min=1, help="Sequences of it that are read.", rich_help_panel=CALIBRATION)]
CalibLength = Annotated[int, typer.Option(min=2, help="Tokens of each.", rich_help_panel=CALIBRATION)]
Seed = Annotated[int, typer.Option(help="Of what is drawn.", rich_help_panel=CALIBRATION)]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Beyond it, such as 8GB, hidden states of the text wait in a temporary file. (default: half of the "
        "machine's memory)",
        show_default=False,
        rich_help_panel=CALIBRATION,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print the plan, tensor by tensor, and write nothing.", rich_help_panel=RUN),
]
Context = Annotated[
    int,
    typer.Option(
        min=1, help="Context length, in tokens, for --fit and the dry run's memory estimate.", rich_help_panel=RUN
    ),
]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Skip the proof at the end.", rich_help_panel=RUN)]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing result, on success only.", rich_help_panel=RUN)
]
