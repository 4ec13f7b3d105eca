"""The token loop: prompt in chunks, then one token after another. It runs on the worker thread."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from mlxq.architectures.registry import import_private
from mlxq.errors import GenerationError
from mlxq.runtime.sampling import make_sampler
from mlxq.runtime.weights import on_accelerator, release_cache
from mlxq.types import CancelToken, Progress

FinishReason = Literal["stop", "length", "cancelled"]

#: Prompt tokens processed at a time. Larger ones are a little faster, but slower to cancel and larger in memory.
_CHUNK = {"cpu": 512, "gpu": 2048}
#: Tokens between two times that the memory which grows with the text (copies of a growing cache) is given back.
_RELEASE_EVERY = 256


@dataclass(frozen=True)
class Request:
    """What to generate: checked already, except for the ranges that `make_sampler` checks."""

    prompt: list[int]
    max_tokens: int
    stop_tokens: frozenset[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int


@dataclass(frozen=True)
class Finished:
    """Last item of the loop: why it ended, tokens of the prompt that were read, and seconds for them and the others."""

    reason: FinishReason
    prompt_tokens: int
    prompt_seconds: float
    generation_seconds: float


def decode(
    module: nn.Module, request: Request, cancel: CancelToken | None = None
) -> Generator[Progress | int | Finished, None, None]:
    """Yield `Progress` of the prompt, then token ids (the stop token is not one of them), then `Finished`.

    On a GPU the next token is computed while the caller looks at the current one.

    Raises:
        GenerationError: a logit is NaN or infinite.
    """

    def cancelled() -> bool:
        return cancel is not None and cancel.cancelled

    sampler = make_sampler(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        seed=request.seed,
    )
    start = time.perf_counter()
    cache = import_private("models.cache").make_prompt_cache(module)
    for progress in _read_prompt(module, request.prompt, cache):
        yield progress
        if cancelled():
            yield Finished("cancelled", progress.done, time.perf_counter() - start, 0.0)
            return

    def step(token: mx.array) -> tuple[mx.array, mx.array]:
        logits = module(token[None], cache=cache)[:, -1, :]
        # NaN and +inf reach the sum; -inf, by which some models rule tokens out, does not.
        sound = mx.logsumexp(logits, axis=-1) < mx.inf
        result = sampler(logits), sound
        mx.async_eval(*result)
        return result

    pending = step(mx.array(request.prompt[-1:]))
    first = 0.0
    reason: FinishReason = "length"
    for count in range(1, request.max_tokens + 1):
        following = step(pending[0]) if on_accelerator() and count < request.max_tokens else None
        token, sound = pending[0].item(), pending[1].item()
        if count == 1:
            first = time.perf_counter()
            yield Progress("prompt", len(request.prompt), len(request.prompt), "tokens")
        if not sound:
            raise GenerationError(f"the model's logits are not finite after {len(request.prompt) + count - 1} tokens")
        if token in request.stop_tokens:
            reason = "stop"
            break
        yield token
        if cancelled():
            reason = "cancelled"
            break
        if count < request.max_tokens:
            pending = following or step(pending[0])
        if count % _RELEASE_EVERY == 0:
            release_cache()
    yield Finished(reason, len(request.prompt), first - start, time.perf_counter() - first)


def _read_prompt(module: nn.Module, prompt: list[int], cache: list[Any]) -> Iterator[Progress]:
    """Fill the cache with all tokens but the last, without the output projection where the model lets us."""
    run = _trunk(module)
    chunk = _CHUNK["gpu" if on_accelerator() else "cpu"]
    total = len(prompt)
    yield Progress("prompt", 0, total, "tokens")
    for start in range(0, total - 1, chunk):
        tokens = prompt[start : min(start + chunk, total - 1)]
        hidden = run(mx.array([tokens]), cache=cache)
        # On a GPU nothing but the cache is computed. On the CPU the products were made already.
        mx.eval([c.state for c in cache])
        del hidden
        release_cache()
        yield Progress("prompt", start + len(tokens), total, "tokens")


def _trunk(module: nn.Module) -> Callable[..., mx.array]:
    """The model without its output projection when it has one we know how to call, else the whole model.

    Models that also see or hear wrap their `language_model`, and pass tokens and cache on to it unchanged.
    """
    wrapped = getattr(module, "language_model", None)
    if _takes_cache_alone(wrapped):
        return _trunk(wrapped)
    trunk = getattr(module, "model", None)
    return trunk if _takes_cache_alone(trunk) else module


def _takes_cache_alone(part: Any) -> bool:
    """Whether this is a module to be called with tokens and `cache`, all else being optional."""
    if not isinstance(part, nn.Module) or not callable(part):
        return False
    inputs, *others = list(inspect.signature(part).parameters.values()) or [None]
    known = inputs is not None and any(p.name == "cache" for p in others)
    return known and all(p.name == "cache" or p.default is not p.empty for p in others)
