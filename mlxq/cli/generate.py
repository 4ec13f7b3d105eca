"""`mlxq generate`: run a model on a prompt and stream its answer."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mlxq.api import DEFAULT_MAX_TOKENS
from mlxq.cli.options import Revision

_SAMPLING = "Sampling"


def generate(
    model: Annotated[str, typer.Argument(help="An MLX directory, a float model directory, a GGUF file, or a Hub id.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The prompt; read from standard input without it, or with -.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", min=1, help="Most tokens to generate.")
    ] = DEFAULT_MAX_TOKENS,
    temperature: Annotated[
        float,
        typer.Option("--temperature", "-t", min=0, help="0 takes the likeliest token.", rich_help_panel=_SAMPLING),
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Nucleus: least set of this probability.", rich_help_panel=_SAMPLING)
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(min=0, help="Only the k likeliest tokens; 0 takes all.", rich_help_panel=_SAMPLING)
    ] = 0,
    min_p: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Drop tokens below this share of the likeliest one's.", rich_help_panel=_SAMPLING
        ),
    ] = 0.0,
    seed: Annotated[
        int | None, typer.Option(help="Makes sampling repeatable.", show_default=False, rich_help_panel=_SAMPLING)
    ] = None,
    no_chat_template: Annotated[
        bool, typer.Option("--no-chat-template", help="Continue the prompt as plain text.")
    ] = False,
    revision: Revision = None,
) -> None:
    """Generate text. The answer goes to standard output, speed and memory to standard error."""
    from mlxq.architectures.memory import human_bytes
    from mlxq.cli.render import ProgressBars
    from mlxq.runtime.generate import stream
    from mlxq.runtime.load import load
    from mlxq.runtime.tokenizer import check_prompt

    text = _read_prompt(prompt)
    check_prompt(text, system)
    with ProgressBars() as bars, load(model, revision=revision, progress=bars) as loaded:
        result, begun = None, False
        try:
            for piece in stream(
                loaded,
                text,
                system=system,
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
                seed=seed,
                chat_template=False if no_chat_template else None,
                progress=bars,
            ):
                bars.finish()
                begun = True
                sys.stdout.write(piece.text)
                sys.stdout.flush()
                result = piece.result or result
        finally:
            if begun:
                sys.stdout.write("\n")
                sys.stdout.flush()
    if result is not None and sys.stderr:
        print(
            f"Prompt: {result.prompt_tokens} tokens, {result.prompt_tokens_per_second:.1f} tokens/s\n"
            f"Generation: {result.generation_tokens} tokens, {result.generation_tokens_per_second:.1f} tokens/s "
            f"({result.finish_reason})\n"
            f"Peak memory: {human_bytes(result.peak_memory)}",
            file=sys.stderr,
        )


def _read_prompt(prompt: str | None) -> str:
    from mlxq.errors import GenerationError

    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise GenerationError("no prompt: pass --prompt TEXT, or text on standard input")
    try:
        # As bytes: what the terminal's locale is must not decide how a file is read.
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise GenerationError(
            f"standard input is not UTF-8 text: byte {e.object[e.start]:#04x} at offset {e.start}; convert it to UTF-8"
        ) from None
    return text.replace("\r\n", "\n").rstrip("\n")
