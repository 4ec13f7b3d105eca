"""From logits to the next token: greedy, or drawn at random after the filters, reproducible from a seed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import mlx.core as mx

from mlxq.errors import GenerationError


def make_sampler(
    *, temperature: float, top_p: float, top_k: int, min_p: float, seed: int
) -> Callable[[mx.array], mx.array]:
    """A function from logits `[1, vocab]` to a token `[1]`, lazy; each call draws the next random number.

    The filters look at the probabilities before the temperature, in this order: the `top_k` likeliest tokens; the
    fewest likeliest tokens whose probabilities sum to `top_p`; tokens at least `min_p` times as likely as the best.
    """
    if temperature == 0:
        return lambda logits: mx.argmax(logits, axis=-1)
    state = {"key": mx.random.key(seed & 0xFFFFFFFFFFFFFFFF)}

    def sample(logits: mx.array) -> mx.array:
        state["key"], key = mx.random.split(state["key"])
        logits = logits.astype(mx.float32)
        lowest = _lowest_logit(logits, top_p, top_k, min_p)
        if lowest is not None:
            logits = mx.where(logits < lowest, -math.inf, logits)
        return mx.random.categorical(logits / temperature, axis=-1, key=key)

    return sample


def _lowest_logit(logits: mx.array, top_p: float, top_k: int, min_p: float) -> mx.array | None:
    """The lowest logit `[1, 1]` that passes the filters; None when all are off. Ties with it pass, too."""
    limits = []
    if 0 < top_k < logits.shape[-1]:
        # What the next filter sorts are these few.
        logits = mx.topk(logits, top_k, axis=-1)
        limits.append(logits.min(axis=-1, keepdims=True))
    if top_p < 1:
        ordered = mx.sort(logits, axis=-1)[..., ::-1]
        probabilities = mx.softmax(ordered, axis=-1)
        # A token stays when those before it do not yet reach top_p; so the first always stays.
        before = mx.cumsum(probabilities, axis=-1) - probabilities
        limits.append(mx.where(before < top_p, ordered, math.inf).min(axis=-1, keepdims=True))
    if min_p > 0:
        limits.append(logits.max(axis=-1, keepdims=True) + math.log(min_p))
    return functools.reduce(mx.maximum, limits) if limits else None


def check_options(max_tokens: int, temperature: float, top_p: float, top_k: int, min_p: float) -> None:
    """Refuse options outside their range.

    Raises:
        GenerationError: naming the option, its value and the range.
    """
    for name, value, least in (("max_tokens", max_tokens, 1), ("top_k", top_k, 0)):
        if not isinstance(value, int) or value < least:
            raise GenerationError(f"{name} is {value}: it must be a whole number, {least} or more")
    if not 0 <= temperature < math.inf:
        raise GenerationError(f"temperature is {temperature}: it must be 0 or more")
    if not 0 < top_p <= 1:
        raise GenerationError(f"top_p is {top_p}: it must be above 0 and at most 1")
    if not 0 <= min_p <= 1:
        raise GenerationError(f"min_p is {min_p}: it must be between 0 and 1")
