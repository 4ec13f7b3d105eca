"""Quantized tensors that wait on disk until all are there: what a killed calibration is taken up from.

.NAME.calibration/
    key.json     what the codes depend on; anything else there is thrown away
    0003/        one finished step (a block, or what stands beside the blocks), renamed into place when it is whole
        tensors.json, 0.w_q.npy, 0.scales.npy, 0.biases.npy, 1.blocks.npy ...
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from mlxq.architectures.parameters import ParameterMap
from mlxq.calibration.texts import CalibrationText, digest
from mlxq.conversion.request import CalibrationRequest
from mlxq.errors import Cancelled, MlxqError, OutputError
from mlxq.plan.planner import Plan
from mlxq.types import QuantizedTensor, QuantSpec
from mlxq.writers.files import remove_tree, sync, writing

#: Affine codes, or a uint8 array of ggml's blocks.
Codes: TypeAlias = QuantizedTensor | np.ndarray

_PARTS = ("w_q", "scales", "biases")
_KEY, _TENSORS = "key.json", "tensors.json"
#: Of a request, what the text's tokens already say, and what changes no code.
_NOT_IN_KEY = ("source", "n_sequences", "length", "seed", "max_memory")


class CodeStore:
    """Codes by step and by parameter name. One run at a time works in a store.

    Where it is entered, it is removed when the block ends well. It is kept (unless `keep` is False), and that is said,
    when the work was interrupted or the disk was full; any other error would come again, and nothing is kept.

    Attributes:
        path: the directory.
    """

    def __init__(self, output: Path, key: Mapping[str, Any], *, keep: bool = True):
        """Open the store beside `output`, empty unless an earlier run with the same `key` left its steps there.

        Raises:
            OutputError: the place cannot be written, or another run works there.
        """
        output = Path(os.path.abspath(output))
        self.path = output.parent / f".{output.name}.calibration"
        self._output, self._keep = output, keep
        self._places: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        text = json.dumps(key, sort_keys=True)
        wanted = hashlib.sha256(text.encode()).hexdigest()
        with writing(output):
            self._created = [p for p in self.path.parents if not p.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
            belongs = self._belongs(wanted)
            for entry in self.path.iterdir():
                if entry.is_dir() and not (belongs and entry.name.isdigit() and self._open(entry)):
                    remove_tree(entry)
            if not belongs:
                (self.path / _KEY).write_text(json.dumps({"sha256": wanted, "key": key}, indent=1, sort_keys=True))

    def _lock(self) -> None:
        """The directory itself is locked, until the process ends or the store is left."""
        self._fd: int | None = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            self._release()
            raise OutputError(f"{self._output}: another run calibrates for it; wait for that, or choose another") from e
        except OSError:
            # Network file systems that cannot lock are let be.
            pass

    def _release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _belongs(self, wanted: str) -> bool:
        try:
            return json.loads((self.path / _KEY).read_text())["sha256"] == wanted
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _open(self, step: Path) -> bool:
        """Take up a step; False where its files are not those that were put there."""
        try:
            meta = json.loads((step / _TENSORS).read_text())
            found = {name: (step, i, described) for i, (name, described) in enumerate(meta["tensors"].items())}
            for place in found.values():
                self._arrays(place)
            whole = "notes" in meta
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError):
            return False
        if whole:
            self._places |= found
        return whole

    def finished(self, step: int) -> dict[str, Any] | None:
        """What was noted of a step that is whole, or None."""
        path = self.path / f"{step:04d}"
        return json.loads((path / _TENSORS).read_text())["notes"] if path.is_dir() else None

    def put(self, step: int, tensors: Mapping[str, Codes], notes: dict[str, Any]) -> None:
        """Store the tensors of a step, affine or uint8 arrays of ggml blocks; after a crash all are there, or none.

        Raises:
            OutputError: the disk is full, or fails.
        """
        place = self.path / f"{step:04d}"
        partial = place.with_suffix(".partial")
        try:
            with writing(self.path):
                remove_tree(partial)
                partial.mkdir()
                for i, tensor in enumerate(tensors.values()):
                    for part, array in _parts(tensor).items():
                        np.save(partial / f"{i}.{part}.npy", array)
                described = {name: _described(tensor) for name, tensor in tensors.items()}
                (partial / _TENSORS).write_text(json.dumps({"tensors": described, "notes": notes}))
                for file in partial.iterdir():
                    sync(file)
                sync(partial)
                os.rename(partial, place)
                sync(self.path)
        except OutputError as e:
            remove_tree(partial)
            raise OutputError(str(e).replace("; nothing was left", "")) from e
        self._open(place)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def read(self, name: str, rows: slice | None = None) -> Codes:
        """A tensor, or some rows of its first axis."""
        place = self._places[name]
        taken = {part: np.array(a if rows is None else a[rows]) for part, a in self._arrays(place).items()}
        described = place[2]
        if "blocks" in taken:
            return taken["blocks"]
        shape = tuple(described["shape"])
        if rows is not None:
            shape = (len(taken["w_q"]), *shape[1:])
        spec = QuantSpec(described["bits"], described["group_size"])
        return QuantizedTensor(*(taken[part] for part in _PARTS), spec, shape, described["dtype"])

    def _arrays(self, place: tuple[Path, int, dict[str, Any]]) -> dict[str, np.ndarray]:
        step, i, described = place
        parts = _PARTS if "bits" in described else ("blocks",)
        return {part: np.load(step / f"{i}.{part}.npy", mmap_mode="r", allow_pickle=False) for part in parts}

    def __enter__(self) -> CodeStore:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.leave(error)

    def leave(self, error: BaseException | None) -> None:
        """Keep what an interrupted run goes on from; remove what is of no use any more."""
        again = isinstance(error, MlxqError) and not isinstance(error, Cancelled | OutputError)
        if error is None or again or not (self._keep and self._places):
            self.remove()
            return
        self._release()
        warnings.warn(
            f"{self.path} keeps the blocks that are done: the same command goes on from there, or remove it",
            stacklevel=2,
        )

    def remove(self) -> None:
        """The codes are where they belong, or of no use: the store is no longer needed."""
        self._release()
        remove_tree(self.path)
        for parent in self._created:
            with contextlib.suppress(OSError):
                parent.rmdir()


def _parts(tensor: Codes) -> dict[str, np.ndarray]:
    return {"blocks": tensor} if isinstance(tensor, np.ndarray) else {part: getattr(tensor, part) for part in _PARTS}


def _described(tensor: Codes) -> dict[str, Any]:
    if isinstance(tensor, np.ndarray):
        return {}
    return {
        "bits": tensor.spec.bits,
        "group_size": tensor.spec.group_size,
        "shape": tensor.shape,
        "dtype": tensor.dtype,
    }


def store_key(
    parameters: ParameterMap,
    plan: Plan,
    text: CalibrationText,
    request: CalibrationRequest,
    measured: str | None = None,
) -> dict[str, Any]:
    """What the codes depend on: the weights' files, the plan, the text, how it is read, and the digest of the part of
    it that sensitivities were `measured` on."""
    from mlxq import __version__

    files = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in parameters.checkpoint.files()]
    planned = [[p.info.name, p.action, str(p.spec), p.dtype, p.method, p.four_way] for p in plan.tensors]
    asked = {k: v for k, v in dataclasses.asdict(request).items() if k not in _NOT_IN_KEY}
    return {
        "mlxq": __version__,
        "files": files,
        "tensors": hashlib.sha256(repr(planned).encode()).hexdigest(),
        "text": [text.name, text.sha256, digest(text.sequences)],
        "request": asked,
        "measured": measured,
    }
