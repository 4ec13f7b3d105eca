"""Which arrays an array was computed from, read off mlx's own graph."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

#: Python passes at most 1024 named arguments to mlx.
_NAMES_AT_ONCE = 1000
_LEAF = re.compile(r'\{ rank=source; "(\w+)"; \}')
_EDGE = re.compile(r'"?(\w+)"? -> "?(\w+)"?')


def dependencies(outputs: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, frozenset[str]]:
    """For each of `outputs` the names of those `leaves` that it was computed from.

    Args:
        outputs: name -> `mx.array`, not evaluated yet: evaluation makes an array forget what it came from.
        leaves: name -> `mx.array`, evaluated, and no two of them the same array.

    Returns:
        Output name -> leaf names; empty for an array that was computed from none of them.
    """
    names = list(outputs)
    found: dict[str, frozenset[str]] = {}
    for start in range(0, len(names), _NAMES_AT_ONCE):
        found |= _dependencies({n: outputs[n] for n in names[start : start + _NAMES_AT_ONCE]}, leaves)
    return found


def _dependencies(outputs: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, frozenset[str]]:
    import mlx.core as mx

    # The graph is printed from its nodes in the order given, so the leaves come first, one line each.
    labels = {f"output_{i}": array for i, array in enumerate(outputs.values())}
    text = io.StringIO()
    mx.export_to_dot(text, *leaves.values(), *outputs.values(), **labels)
    lines = text.getvalue().splitlines()[1:]
    leaf_of = {}
    for name, line in zip(leaves, lines, strict=False):
        match = _LEAF.fullmatch(line)
        if match is None:
            raise RuntimeError(f"mlx's graph of evaluated arrays begins with {line!r}, which is no leaf")
        leaf_of[match[1]] = name
    inputs: dict[str, list[str]] = {}
    for line in lines[len(leaves) :]:
        if match := _EDGE.fullmatch(line):
            inputs.setdefault(match[2], []).append(match[1])
    return {name: _reached(label, inputs, leaf_of) for name, label in zip(outputs, labels, strict=True)}


def _reached(start: str, inputs: Mapping[str, list[str]], leaf_of: Mapping[str, str]) -> frozenset[str]:
    seen, waiting = {start}, [start]
    while waiting:
        for node in inputs.get(waiting.pop(), ()):
            if node not in seen:
                seen.add(node)
                waiting.append(node)
    return frozenset(leaf_of[node] for node in seen if node in leaf_of)
