"""`generate` and `stream`: a prompt goes in, text comes out; options checked before anything is computed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlxq.api import DEFAULT_MAX_TOKENS, public
from mlxq.errors import GenerationError
from mlxq.runtime.decoding import Finished, FinishReason, Request, decode
from mlxq.runtime.memory import peak_memory
from mlxq.runtime.sampling import check_options, check_stop_tokens
from mlxq.runtime.tokenizer import Detokenizer, Messages, check_prompt
from mlxq.runtime.worker import iterate
from mlxq.types import CancelToken, Progress, ProgressCallback

if TYPE_CHECKING:
    from mlxq.runtime.load import Model


@dataclass(frozen=True)
class GenerationResult:
    """What was generated, and how fast.

    `token_ids` excludes the stop token. Rates are tokens per second: of the prompt up to the first token, and of the
    tokens after the first. `peak_memory` is in bytes: of mlx on a GPU, of the whole process on the CPU.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    generation_tokens: int
    prompt_tokens_per_second: float
    generation_tokens_per_second: float
    peak_memory: int


@dataclass(frozen=True)
class TextChunk:
    """A piece of generated text: whole characters. `token_ids` made it; the last chunk carries the `result`."""

    text: str
    token_ids: tuple[int, ...] = ()
    result: GenerationResult | None = None


@public
def generate(
    model: Model | str | Path,
    prompt: str | Messages,
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int | None = None,
    system: str | None = None,
    chat_template: bool | None = None,
    stop_tokens: Iterable[int] | None = None,
    progress: ProgressCallback | None = None,
    cancel: CancelToken | None = None,
) -> GenerationResult:
    """Generate text.

    Args:
        model: a `Model` from `load`, or what `load` accepts (it is then loaded, and closed afterwards).
        prompt: text (the user's message, when the tokenizer has a chat template), or a list of messages
            `{"role": ..., "content": ...}`.
        max_tokens: tokens to generate at most; the context length limits it too.
        temperature: 0 takes the likeliest token; higher is more random.
        top_p, top_k, min_p: filters before drawing, see `sampling.make_sampler`; the defaults are off.
        seed: of the random numbers; the same seed gives the same text. None draws one.
        system: system message.
        chat_template: True requires the tokenizer's template, False passes the text as it is, None uses it if any.
        stop_tokens: ids that end the text instead of the model's own; empty for none.
        progress: called in this thread with stages `load`, `prompt` and `generate`.
        cancel: ends the text within one token, with `finish_reason` `cancelled`.

    Raises:
        GenerationError: an option out of its range, an empty prompt, one longer than the context, a template that
            is missing or refuses the messages, or logits that are not finite.
        CheckpointError: the model cannot be loaded.
        Cancelled: `cancel` was used while loading.
    """
    chunk = None
    for chunk in stream(  # noqa: B007
        model,
        prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        system=system,
        chat_template=chat_template,
        stop_tokens=stop_tokens,
        progress=progress,
        cancel=cancel,
    ):
        pass
    return chunk.result


@public
def stream(
    model: Model | str | Path,
    prompt: str | Messages,
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int | None = None,
    system: str | None = None,
    chat_template: bool | None = None,
    stop_tokens: Iterable[int] | None = None,
    progress: ProgressCallback | None = None,
    cancel: CancelToken | None = None,
) -> Iterator[TextChunk]:
    """Generate text piece by piece: `generate`'s arguments and errors, which are raised before the first piece.

    The pieces joined are the whole text; the last one carries the `GenerationResult`. Leaving the iterator stops the
    work. Several may be open, in any threads: they are computed in turn.
    """
    from mlxq.runtime.load import Model, load

    options = check_options(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed
    )
    stops = None if stop_tokens is None else check_stop_tokens(stop_tokens)
    check_prompt(prompt, system)
    owned = not isinstance(model, Model)
    if owned:
        model = load(model, progress=progress, cancel=cancel)
    try:
        ids = model.encode(prompt, system=system, chat_template=chat_template)
        options["max_tokens"] = _room(model.context_length, len(ids), options["max_tokens"])
        if options["seed"] is None:
            options["seed"] = int.from_bytes(os.urandom(8), "little")
        request = Request(prompt=ids, stop_tokens=model.stop_tokens if stops is None else stops, **options)
    except BaseException:
        if owned:
            model.close()
        raise
    return _chunks(model, request, progress, cancel, owned)


def _room(context_length: int | None, n_prompt: int, max_tokens: int) -> int:
    """Tokens that may be generated after `n_prompt`."""
    if context_length is None:
        return max_tokens
    if n_prompt > context_length:
        raise GenerationError(
            f"the prompt has {n_prompt} tokens, more than the model's context of {context_length}: shorten the prompt"
        )
    # The last token generated needs no place of its own.
    return min(max_tokens, context_length - n_prompt + 1)


def _chunks(
    model: Model, request: Request, progress: ProgressCallback | None, cancel: CancelToken | None, owned: bool
) -> Iterator[TextChunk]:
    module = model.module
    detokenizer = Detokenizer(model.tokenizer)
    ids: list[int] = []
    text: list[str] = []
    waiting: list[int] = []
    dropped = 0
    items = iterate(decode(module, request, cancel))
    try:
        for item in items:
            if isinstance(item, Progress):
                _report(progress, item)
            elif isinstance(item, Finished):
                piece = detokenizer.finish()
                text.append(piece)
                yield TextChunk(piece, tuple(waiting), _result(request, item, ids, "".join(text), dropped))
            elif cancel is not None and cancel.cancelled:
                # Computed ahead of a slow reader, who wants no more.
                dropped += 1
            else:
                ids.append(item)
                waiting.append(item)
                piece = detokenizer.add(item)
                _report(progress, Progress("generate", len(ids), request.max_tokens, "tokens"))
                if piece:
                    text.append(piece)
                    yield TextChunk(piece, tuple(waiting))
                    waiting.clear()
    finally:
        items.close()
        if owned:
            model.close()


def _report(progress: ProgressCallback | None, event: Progress) -> None:
    if progress is not None:
        progress(event)


def _result(request: Request, finished: Finished, ids: list[int], text: str, dropped: int) -> GenerationResult:
    # A stop token was computed too, though it is not part of the text.
    computed = len(ids) + dropped + (finished.reason == "stop")
    seconds = finished.generation_seconds
    return GenerationResult(
        text=text,
        token_ids=tuple(ids),
        finish_reason="cancelled" if dropped else finished.reason,
        prompt_tokens=len(request.prompt),
        generation_tokens=len(ids),
        prompt_tokens_per_second=finished.prompt_tokens / finished.prompt_seconds if finished.prompt_seconds else 0.0,
        generation_tokens_per_second=(computed - 1) / seconds if computed > 1 and seconds > 0 else 0.0,
        peak_memory=peak_memory(),
    )
