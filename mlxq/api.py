"""What the public functions share: defaults that the command line shows too, and how an unknown keyword is refused."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

#: Tokens that `generate` writes at most, unless the caller says otherwise.
DEFAULT_MAX_TOKENS = 512
#: Tokens of context for estimates of memory, unless the caller says otherwise or the model takes fewer.
DEFAULT_CONTEXT = 4096
#: Sequences of a text that models are measured on, and their tokens, unless the caller says otherwise.
DEFAULT_SEQUENCES = 12
DEFAULT_LENGTH = 512


def public(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: `TypeError` for an unknown keyword lists the valid ones (Python's own does not)."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise TypeError(f"{function.__name__}() takes any keyword: nothing to check")
    valid = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in valid:
                near = difflib.get_close_matches(name, valid, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ";"
                raise TypeError(f"{function.__name__}() has no keyword {name!r}{hint} valid: {', '.join(valid)}")
        return function(*args, **kwargs)

    return checked
