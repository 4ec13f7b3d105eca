"""Options that more than one command takes, spelled once."""

from __future__ import annotations

from typing import Annotated

import typer

Source = Annotated[str, typer.Argument(help="A model directory, a GGUF file, or a Hugging Face Hub id (org/name).")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.", rich_help_panel="Source")]
