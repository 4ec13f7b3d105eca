"""How wide the loads and stores are that the text asks for.

The optimizer may split a vector's load in two. The unoptimized LLVM text still has the whole: the width of each access
by the place in the source that it belongs to, under which the pieces are joined again when traffic is counted.
"""

from __future__ import annotations

import re
from functools import cached_property

_NODE = re.compile(r"^!(\d+) = (?:distinct )?!(\w+)\((.*)\)$")
_FIELD = re.compile(r'(\w+): ("[^"]*"|!?[\w-]+)')
_PLACE = re.compile(r"!dbg !(\d+)")
_ALLOCA = re.compile(r"^  (%[\w.]+) = alloca ")
_LOAD = re.compile(r"^  %[\w.]+ = load (?:volatile )?(.+?), ptr (\S+?),")
_STORE = re.compile(r"^  store (?:volatile )?(<[^>]*>|\S+) \S+?, ptr (\S+?),")
_COPY = re.compile(r"^  call void @llvm\.memcpy\.\S+\(ptr (?:align \d+ )?(\S+?), ptr (?:align \d+ )?(\S+?), i64 (\d+),")
_SCALAR_SIZES = {"half": 2, "bfloat": 2, "float": 4, "double": 8}
_VECTOR = re.compile(r"<(\d+) x (\w+)>")

Place = tuple[str, int, int]  # file, line, column


class Places:
    """The source places of instructions in LLVM text."""

    def __init__(self, ir: str) -> None:
        self._text = ir

    @cached_property
    def _nodes(self) -> dict[str, tuple[str, dict[str, str]]]:
        matches = (_NODE.match(line) for line in self._text.split("\n") if line.startswith("!"))
        return {m.group(1): (m.group(2), dict(_FIELD.findall(m.group(3)))) for m in matches if m}

    def of(self, instruction: str) -> Place | None:
        """File, line and column of an instruction, in the function where it was written."""
        m = _PLACE.search(instruction)
        kind, node = self._nodes.get(m.group(1), ("", {})) if m else ("", {})
        if kind != "DILocation":
            return None
        return self._file(node["scope"]), int(node["line"]), int(node.get("column", "0"))

    def _file(self, scope: str) -> str:
        _, fields = self._nodes[scope[1:]]
        while "file" not in fields:
            _, fields = self._nodes[fields["scope"][1:]]
        return self._nodes[fields["file"][1:]][1]["filename"]


def access_widths(unoptimized: str) -> dict[Place, int]:
    """Bytes of the widest access to memory outside of the function at each place."""
    places, widths = Places(unoptimized), {}
    local: set[str] = set()
    for line in unoptimized.split("\n"):
        if line.startswith("define "):
            local = set()
        m = _ALLOCA.match(line)
        if m:
            local.add(m.group(1))
        width = _width(line, local)
        place = places.of(line) if width else None
        if place:
            widths[place] = max(width, widths.get(place, 0))
    return widths


def _width(line: str, local: set[str]) -> int:
    m = _LOAD.match(line) or _STORE.match(line)
    if m:
        return 0 if m.group(2) in local else _size(m.group(1))
    m = _COPY.match(line)
    if m and not {m.group(1), m.group(2)} <= local:
        return min(int(m.group(3)), 16)
    return 0


def _size(type_name: str) -> int:
    """Bytes of a scalar or vector type; 0 of pointers, which kernels keep in local variables only."""
    vector = _VECTOR.match(type_name)
    if vector:
        return int(vector.group(1)) * _size(vector.group(2))
    if type_name in _SCALAR_SIZES:
        return _SCALAR_SIZES[type_name]
    return int(type_name[1:]) // 8 if re.fullmatch(r"i\d+", type_name) else 0
