"""The built-in calibration text: `sample/*.txt`, written for this project, in an order of which any part is balanced.

A file holds documents, each after a line `=== domain`. Its name tells the group: English prose, code, other languages.
It is no reference: many of the people, places and figures in it are invented.
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
    """All documents, a blank line after each: groups, and in a group its domains, in proportion to their size."""
    found: dict[str, list[Document]] = {}
    for group, pairs in groups().items():
        by_domain: dict[str, list[Document]] = {}
        for domain, body in pairs:
            document = Document(domain, f"{body}\n\n", f"{body}\n\n".encode())
            by_domain.setdefault(domain, []).append(document)
        found[group] = _interleaved(list(by_domain.values()))
    return tuple(_interleaved(list(found.values())))


def _interleaved(sets: list[list[Document]]) -> list[Document]:
    """Documents of all sets, each set in its order and spread over the whole.

    A document's place is between 0 and 1: where it lies in the text of its set. A set's phase says where in a document
    its place is, so that sets of one document are spread too.
    """
    placed = []
    for number, documents in enumerate(sets, 1):
        total, before = sum(len(d.raw) for d in documents), 0
        for document in documents:
            place = (before + number * _GOLDEN % 1 * len(document.raw)) / total
            placed.append((place, number, document))
            before += len(document.raw)
    return [document for _, _, document in sorted(placed, key=lambda p: p[:2])]
