"""The hidden directories beside an output, and what to do with those that killed runs left.

`.NAME.partial-PID-N` is a result being written, or an old one being removed: never of use to anyone else.
`.NAME.replaced-PID-N` is an old result between the two renames of its replacement: the only copy until both are done.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from pathlib import Path

from mlxq.writers.files import remove_tree

_PARTIAL, _REPLACED = "partial", "replaced"
_numbers = itertools.count()
_running: set[str] = set()


class Siblings:
    """Names of the hidden directories of one output, unique among processes and within this one.

    Between `acquire` and `release` they are in use: no other run clears them.
    """

    def __init__(self, path: Path):
        self._owner = f"{os.getpid()}-{next(_numbers)}"
        self.partial = path.parent / f".{path.name}.{_PARTIAL}-{self._owner}"
        self.replaced = path.parent / f".{path.name}.{_REPLACED}-{self._owner}"

    def acquire(self) -> None:
        _running.add(self._owner)

    def release(self) -> None:
        _running.discard(self._owner)


def recover(path: Path) -> None:
    """Clear what killed runs left beside `path`, and undo a replacement that was cut between its two renames."""
    pattern = re.compile(re.escape(f".{path.name}.") + rf"({_PARTIAL}|{_REPLACED})-((\d+)-\d+)")
    with contextlib.suppress(OSError):
        for entry in list(path.parent.iterdir()):
            match = pattern.fullmatch(entry.name)
            if match is None or _is_running(match[2], int(match[3])):
                continue
            if match[1] == _REPLACED:
                if not path.exists():
                    entry.rename(path)
                    continue
                # From here on it is incomplete and must not be taken for the only copy.
                entry = entry.rename(path.parent / f".{path.name}.{_PARTIAL}-{match[2]}")
            remove_tree(entry)


def _is_running(owner: str, pid: int) -> bool:
    if pid == os.getpid():
        return owner in _running
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
