"""The built-in calibration text: `sample/*.txt`, written for this project, in an order of which any part is balanced.

A file holds documents, each after a line `=== domain`. Its name tells the group: English prose, code, other languages.
Nothing of it may be in the text of the proof (`mlxq/evaluate/sample.txt`): what was calibrated on is not measured on.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import resources

from mlxq.calibration.text_files import Document

_HEADING = re.compile(r"^=== ([\w-]+)\n", re.MULTILINE)
#: Multiples of it, modulo 1, are spread evenly however many there are.
_GOLDEN = (5**0.5 - 1) / 2


@cache
def groups() -> dict[str, list[tuple[str, str]]]:
    """Group -> its documents in the file's order, each with its domain."""
    found: dict[str, list[tuple[str, str]]] = {}
    for file in sorted(resources.files("mlxq.calibration").joinpath("sample").iterdir(), key=lambda f: f.name):
        parts = _HEADING.split(file.read_text(encoding="utf-8"))[1:]
        group = file.name.removesuffix(".txt").split("-")[0]
        pairs = zip(parts[::2], parts[1::2], strict=True)
        found.setdefault(group, []).extend((domain, body.strip("\n")) for domain, body in pairs)
    return found


@cache
def documents() -> tuple[Document, ...]:
    """All documents, a blank line after each, the domains interleaved in proportion to their length.

    Each document has a place between 0 and 1: where it lies in the text of its domain. A domain's phase says where in
    a document its place is, so that those of domains with one document are spread too.
    """
    by_domain: dict[str, list[str]] = {}
    for domain, body in (d for group in groups().values() for d in group):
        by_domain.setdefault(domain, []).append(f"{body}\n\n")
    placed = []
    for number, (domain, bodies) in enumerate(by_domain.items(), 1):
        total, before = sum(map(len, bodies)), 0
        for body in bodies:
            place = (before + number * _GOLDEN % 1 * len(body)) / total
            placed.append((place, number, Document(domain, body, body.encode())))
            before += len(body)
    return tuple(document for _, _, document in sorted(placed, key=lambda p: p[:2]))
