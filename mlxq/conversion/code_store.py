"""Quantized tensors that wait on disk until all are there: what a killed calibration is taken up from.

.NAME.calibration/
    key.json     what the codes depend on; anything else there is thrown away
    0003/        one finished step (a block, or what stands beside the blocks), renamed into place when it is whole
        tensors.json, 0.w_q.npy, 0.scales.npy, 0.biases.npy, 1.w_q.npy ...
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlxq.types import QuantizedTensor, QuantSpec
from mlxq.writers.files import remove_tree, sync, writing

_PARTS = ("w_q", "scales", "biases")


class CodeStore:
    """Codes by step and by parameter name; one run at a time works in a store.

    Raises:
        OutputError: the place cannot be written.
    """

    def __init__(self, output: Path, key: Mapping[str, Any]):
        """Open the store beside `output`, empty unless an earlier run with the same `key` left its steps there."""
        self.path = output.parent / f".{output.name}.calibration"
        self._output = output
        text = json.dumps(key, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        self._places: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        with writing(output):
            if not self._belongs(digest):
                remove_tree(self.path)
                self.path.mkdir(parents=True)
                (self.path / "key.json").write_text(
                    json.dumps({"sha256": digest, "key": key}, indent=1, sort_keys=True)
                )
            for step in self.path.iterdir():
                if step.is_dir() and not step.name.isdigit():
                    remove_tree(step)
                elif step.is_dir():
                    self._open(step)

    def _belongs(self, digest: str) -> bool:
        try:
            return json.loads((self.path / "key.json").read_text())["sha256"] == digest
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _open(self, step: Path) -> dict[str, Any]:
        meta = json.loads((step / "tensors.json").read_text())
        for i, (name, described) in enumerate(meta["tensors"].items()):
            self._places[name] = step, i, described
        return meta

    def finished(self, step: int) -> dict[str, Any] | None:
        """What was noted of a step that is whole, or None."""
        path = self.path / f"{step:04d}"
        return json.loads((path / "tensors.json").read_text())["notes"] if path.is_dir() else None

    def put(self, step: int, tensors: Mapping[str, QuantizedTensor], notes: dict[str, Any]) -> None:
        """Store the tensors of a step; after a crash they are all there, or none."""
        place = self.path / f"{step:04d}"
        partial = place.with_suffix(".partial")
        described = {
            name: {"bits": q.spec.bits, "group_size": q.spec.group_size, "shape": q.shape, "dtype": q.dtype}
            for name, q in tensors.items()
        }
        with writing(self._output):
            remove_tree(partial)
            partial.mkdir()
            for i, q in enumerate(tensors.values()):
                for part in _PARTS:
                    np.save(partial / f"{i}.{part}.npy", getattr(q, part))
            (partial / "tensors.json").write_text(json.dumps({"tensors": described, "notes": notes}))
            for file in partial.iterdir():
                sync(file)
            sync(partial)
            os.rename(partial, place)
            sync(self.path)
        self._open(place)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def read(self, name: str, rows: slice | None = None) -> QuantizedTensor:
        """A tensor, or some rows of its first axis."""
        step, i, described = self._places[name]
        arrays = [np.load(step / f"{i}.{part}.npy", mmap_mode="r") for part in _PARTS]
        taken = [np.array(a if rows is None else a[rows]) for a in arrays]
        shape = tuple(described["shape"])
        if rows is not None:
            shape = (len(taken[0]), *shape[1:])
        spec = QuantSpec(described["bits"], described["group_size"])
        return QuantizedTensor(*taken, spec, shape, described["dtype"])

    def remove(self) -> None:
        """The codes are where they belong: the store is no longer needed."""
        remove_tree(self.path)
