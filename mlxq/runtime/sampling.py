"""From logits to the next token: greedy, or drawn at random after the filters, reproducible from a seed."""

from __future__ import annotations

import functools
import math
import numbers
import operator
from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx

from mlxq.errors import GenerationError

#: Below this the likeliest token alone is drawn anyway, and float32 would soon take the temperature for 0.
_LOWEST_TEMPERATURE = 1e-30


def make_sampler(
    *, temperature: float, top_p: float, top_k: int, min_p: float, seed: int
) -> Callable[[mx.array], mx.array]:
    """A function from logits `[1, vocab]` to a token `[1]`, lazy; each call draws the next random number.

    The filters look at the probabilities before the temperature, in this order: the `top_k` likeliest tokens; the
    fewest likeliest tokens whose probabilities sum to `top_p`; tokens at least `min_p` times as likely as the best.
    """
    if temperature == 0 or top_k == 1:
        return lambda logits: mx.argmax(logits, axis=-1)
    state = {"key": mx.random.key(seed & 0xFFFFFFFFFFFFFFFF)}

    def sample(logits: mx.array) -> mx.array:
        state["key"], key = mx.random.split(state["key"])
        logits = logits.astype(mx.float32)
        lowest = _lowest_logit(logits, top_p, top_k, min_p)
        if lowest is not None:
            logits = mx.where(logits < lowest, -math.inf, logits)
        # The best one's becomes 0, so that no temperature, however low, makes it infinite.
        logits = logits - logits.max(axis=-1, keepdims=True)
        return mx.random.categorical(logits / max(temperature, _LOWEST_TEMPERATURE), axis=-1, key=key)

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


def check_options(
    *, max_tokens: int, temperature: float, top_p: float, top_k: int, min_p: float, seed: int | None
) -> dict[str, Any]:
    """The options as Python's own numbers, by name; those outside their range are refused.

    Raises:
        GenerationError: naming the option, its value and the range.
    """
    checked = {
        "max_tokens": _whole("max_tokens", max_tokens, 1),
        "temperature": _real("temperature", temperature, "0 or more"),
        "top_p": _real("top_p", top_p, "above 0 and at most 1"),
        "top_k": _whole("top_k", top_k, 0),
        "min_p": _real("min_p", min_p, "between 0 and 1"),
        "seed": None if seed is None else _whole("seed", seed),
    }
    if not 0 <= checked["temperature"] < math.inf:
        raise GenerationError(f"temperature is {temperature}: it must be 0 or more")
    if not 0 < checked["top_p"] <= 1:
        raise GenerationError(f"top_p is {top_p}: it must be above 0 and at most 1")
    if not 0 <= checked["min_p"] <= 1:
        raise GenerationError(f"min_p is {min_p}: it must be between 0 and 1")
    return checked


def check_stop_tokens(stop_tokens: Iterable[int]) -> frozenset[int]:
    """The ids as a set.

    Raises:
        GenerationError: not a collection, or one of them is no whole number.
    """
    if isinstance(stop_tokens, str | bytes) or not isinstance(stop_tokens, Iterable):
        raise GenerationError(f"stop_tokens is {stop_tokens!r}: it must be a list of token ids")
    return frozenset(_whole("a stop token", token, 0) for token in stop_tokens)


def _whole(name: str, value: Any, least: int | None = None) -> int:
    """An integer of any kind (NumPy's, too) as Python's."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        bound = "" if least is None else f", {least} or more"
        raise GenerationError(f"{name} is {value!r}: it must be a whole number{bound}")
    return number


def _real(name: str, value: Any, expected: str) -> float:
    """A number of any kind as Python's float; infinite where it is too large for one."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise GenerationError(f"{name} is {value!r}: it must be a number, {expected}")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
