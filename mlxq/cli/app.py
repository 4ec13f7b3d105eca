"""The typer application: commands are registered here, one module each."""

from __future__ import annotations

from typing import Annotated

import typer

import mlxq
from mlxq.cli import bench, compare, convert, eval, export, generate, imatrix, inspect, verify
from mlxq.errors import UsageError

_INTERRUPTED = 130

app = typer.Typer(
    name="mlxq",
    help="Quantize language models for MLX and llama.cpp, and run them: one quantization, every runtime, proven.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("bench")(bench.bench)
app.command("compare")(compare.compare)
app.command("convert")(convert.convert)
app.command("eval")(eval.evaluate)
app.command("export")(export.export)
app.command("generate")(generate.generate)
app.command("imatrix")(imatrix.imatrix)
app.command("inspect")(inspect.inspect)
app.command("verify")(verify.verify)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"mlxq {mlxq.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Quantize language models for MLX and llama.cpp, and run them: one quantization, every runtime, proven."""


def run(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status. Errors of mlxq pass through."""
    try:
        status = app(arguments, standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except Exception as e:
        # A usage error. Its class is click's own or typer's copy of it, by typer's version.
        if not hasattr(e, "format_message"):
            raise
        where = e.ctx.command_path if getattr(e, "ctx", None) else "mlxq"
        raise UsageError(f"{e.format_message().rstrip('.')} (see {where} --help)") from None
    if status == _INTERRUPTED:
        # Typer turns Ctrl-C into this status and says nothing.
        raise KeyboardInterrupt
    return status if isinstance(status, int) else 0
