"""Tokens of preprocessed Metal text, and the operands of its conditional expressions."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

_TOKEN = re.compile(
    r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\''
    r"|[A-Za-z_]\w*"
    r"|(?:\d[\w.]*(?:[eEpP][+-]\w+)?|\.\d[\w]*(?:[eE][+-]\w+)?)"
    r"|\n#[^\n]*|\[\[|\]\]|::|->|\s+|.",
    re.S,
)
_MARKER = re.compile(r'\n# \d+ "([^"]*)"')
_OPENING = ("(", "[", "{", "[[")
_CLOSING = (")", "]", "}", "]]")


class MslError(Exception):
    """Metal text that does not compile here, or a finding of the checker."""


def tokenize(text: str) -> list[str]:
    """Tokens, white space and line markers of a preprocessed text; the first is the line feed put before it."""
    return _TOKEN.findall("\n" + text)


def is_marker(token: str) -> bool:
    """Is this a line marker of the preprocessor?"""
    return token.startswith("\n#")


def is_space(token: str) -> bool:
    """Is this white space or a line marker?"""
    return token.isspace() or is_marker(token)


def marker_is_shim(marker: str, before: bool) -> bool:
    """Does a line marker enter the shim's own headers (`msl_*`)? Other directives change nothing."""
    m = _MARKER.match(marker)
    return PurePosixPath(m.group(1)).name.startswith("msl_") if m else before


def ternary_operands(tokens: list[str]) -> list[tuple[int, int]]:
    """First and last token of each operand of `?:` outside the shim; literals and ambiguous ends are left out."""
    out, shim = [], False
    for i, t in enumerate(tokens):
        if is_marker(t):
            shim = marker_is_shim(t, shim)
        if t != "?" or shim:
            continue
        colon, _ = _operand_end(tokens, i + 1)
        if colon >= len(tokens) or tokens[colon] != ":":
            continue
        end, in_template = _operand_end(tokens, colon + 1)
        if in_template:
            continue
        for first, stop in ((i + 1, colon), (colon + 1, end)):
            words = [x for x in tokens[first:stop] if not is_space(x)]
            literal = len(words) == 1 and (words[0][0].isdigit() or words[0] in ("nullptr", "true", "false"))
            if not literal and "throw" not in words:
                out.append((first, stop - 1))
    return out


def _operand_end(tokens: list[str], i: int) -> tuple[int, bool]:
    """Where the operand that begins at i ends, and whether a template's `>` closed inside it."""
    depth = nested = angles = 0
    closed = False
    for j in range(i, len(tokens)):
        t = tokens[j]
        if t in _OPENING:
            depth += 1
        elif t in _CLOSING:
            if depth == 0:
                return j, closed
            depth -= 1
        elif depth == 0:
            if t in (",", ";"):
                return j, closed
            if t == "?":
                nested += 1
            elif t == ":":
                if nested == 0:
                    return j, closed
                nested -= 1
            elif t in ("<", ">"):
                angles += 1 if t == "<" else -1
                closed = closed or angles < 0
    return len(tokens), closed
