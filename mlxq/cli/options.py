"""Options that more than one command takes, spelled once."""

from __future__ import annotations

from typing import Annotated

import typer

Source = Annotated[str, typer.Argument(help="A model directory, a GGUF file, or a Hugging Face Hub id (org/name).")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.", rich_help_panel="Source")]
Context = Annotated[int, typer.Option(min=1, help="Context length, in tokens, for the memory estimate.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]

DEFAULT_CONTEXT = 4096
MAX_TOKENS = 512
