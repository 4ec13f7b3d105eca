"""What a reference predicts for a text, kept on disk so that it is run once.

Kept are the hidden states that its head turns into logits, float32, for every scored row, and a sample of those after
each block. Log-probabilities over the vocabulary would be some fifty times larger, or rounded; from these they follow
bit for bit. One file a reference and text, `reference-DIGEST.npz`; the digest is of the reference's files and
configuration, of the token ids, and of which are scored. A zip file has a checksum of each part: one that is damaged is
not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from mlxq.checkpoint.base import Checkpoint
from mlxq.evaluate.quality.predictions import States
from mlxq.evaluate.quality.text import Windows
from mlxq.ops.choices import cache_directory
from mlxq.writers.laid_out import sha256

#: Changes whenever the same files and text may give other numbers, or the layout does.
_SCHEMA = "mlxq reference 1"
#: Files kept; the ones used longest ago go first.
_KEPT = 32

#: Index of a block -> hidden states float32 `[m, hidden]` after it, of the sampled rows.
SampledBlocks = Mapping[int, np.ndarray]


class ReferenceStore:
    """The file of one reference and text.

    Attributes:
        path: where it is, or would be.
    """

    def __init__(
        self, directory: str | Path | None, checkpoint: Checkpoint, windows: Windows, check: Callable[[], None]
    ):
        """Work out the file's name: reads all of the reference's files.

        Args:
            directory: None is the platform's cache directory.
            check: called between pieces of files; it may raise to cancel.
        """
        root = cache_directory() / "references" if directory is None else Path(directory).expanduser()
        self.path = root / f"reference-{_digest(checkpoint, windows, check)}.npz"
        self._shape = len(windows.rows)

    def read(self) -> tuple[States, SampledBlocks] | None:
        """What is kept, or None if there is nothing, or nothing whole."""
        try:
            with np.load(self.path, allow_pickle=False) as file:
                names = [n for n in file.files if n.startswith("block_")]
                states = States(file["hidden"], int(file["trunk"]))
                blocks = {int(n.removeprefix("block_")): file[n] for n in names}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            return None
        if states.hidden.shape[:1] != (self._shape,) or states.hidden.dtype != np.float32:
            return None
        with contextlib.suppress(OSError):
            os.utime(self.path)
        return states, blocks

    def write(self, states: States, blocks: SampledBlocks) -> str:
        """Keep it, whole or not at all; returns why that was not possible, or an empty string."""
        temporary = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=".reference-", suffix=".tmp")
            with os.fdopen(descriptor, "wb") as file:
                arrays = {f"block_{i}": a for i, a in blocks.items()}
                np.savez(file, hidden=states.hidden, trunk=np.array(states.trunk), **arrays)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
            temporary = None
            self._prune()
        except OSError as e:
            return f"what the reference predicts was not kept in {self.path.parent}: {e.strerror or e}"
        finally:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
        return ""

    def _prune(self) -> None:
        files = sorted(self.path.parent.glob("reference-*.npz"), key=lambda p: p.stat().st_mtime, reverse=True)
        for old in files[_KEPT:]:
            old.unlink(missing_ok=True)


def _digest(checkpoint: Checkpoint, windows: Windows, check: Callable[[], None]) -> str:
    digest = hashlib.sha256(_SCHEMA.encode())
    for path in checkpoint.files():
        digest.update(f"{path.name} {sha256(path, check)}\n".encode())
    digest.update(json.dumps(checkpoint.config, sort_keys=True, default=str).encode())
    for array in (windows.lengths, windows.tokens, windows.rows):
        digest.update(f"{array.shape} ".encode() + np.ascontiguousarray(array, np.int64).tobytes())
    return digest.hexdigest()[:32]
