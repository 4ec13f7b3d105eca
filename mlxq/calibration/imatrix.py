"""Importance matrices: the mean square of every input channel of every matrix, read and written as llama.cpp does.

Two containers hold them, both under GGUF names (sources: `tools/imatrix/imatrix.cpp` and `tools/quantize/quantize.cpp`
in llama.cpp):

    GGUF   general.type "imatrix"; imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size; per matrix two tensors
           of F32: `<name>.in_sum2` [n_mat, K], sums of squared inputs, and `<name>.counts` [n_mat, 1], rows summed;
           n_mat is the number of experts, or 1. Other tensors (`.in_sum`) say nothing that is used here.
    .dat   the old one: `mlxq.calibration.imatrix_old`

The weight of a channel is its sum divided by its count. An expert that no token reached has no sums: its weights are
1, as llama.cpp's quantizer sets them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import ceil, prod
from pathlib import Path

import numpy as np

from mlxq.calibration import imatrix_old
from mlxq.checkpoint.gguf.file import GgufFile
from mlxq.checkpoint.safetensors import quoted
from mlxq.errors import CheckpointError, FormatError, OutputError, PlanError

_SUMS, _COUNTS = ".in_sum2", ".counts"
#: Tokens of a chunk where the file does not say: the context that llama.cpp computes matrices with by default.
_CHUNK_SIZE = 512
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Sums:
    """Squared inputs of one matrix: `sums` float32 `[n_mat, n]` and `counts` float32 `[n_mat]` of rows in each.

    Files of the old form keep one count for all experts: there `n_mat` is 1 and `n` the experts' channels together.
    """

    sums: np.ndarray
    counts: np.ndarray

    def means(self) -> np.ndarray:
        """Mean squares, float32 `[n_mat, n]`; 1 where nothing was counted."""
        counted = self.counts[:, None] > 0
        return np.where(counted, self.sums / np.where(counted, self.counts[:, None], np.float32(1)), np.float32(1))


@dataclass
class ImportanceMatrix:
    """Importance of the input channels of a model's matrices, by GGUF tensor name.

    Attributes:
        entries: GGUF name of a weight -> its sums.
        datasets: names of the texts it was computed from.
        chunk_count, chunk_size: how much of them was read, in chunks and in tokens a chunk.
    """

    entries: dict[str, Sums]
    datasets: tuple[str, ...] = ()
    chunk_count: int = 0
    chunk_size: int = _CHUNK_SIZE
    _path: str = field(default="importance matrix", repr=False, compare=False)

    @classmethod
    def read(cls, path: str | Path) -> ImportanceMatrix:
        """Read a matrix in either form.

        Raises:
            CheckpointError: the file cannot be opened or read.
            FormatError: it is neither form, truncated, or holds what no matrix can: the message names the field.
        """
        path = Path(path)
        try:
            with open(path, "rb") as f:
                is_gguf = f.read(4) == b"GGUF"
                old = b"" if is_gguf else f.seek(0) or f.read()
        except OSError as e:
            raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from e
        matrix = _read_gguf(path) if is_gguf else _read_old(path, old)
        matrix._path = str(path)
        return matrix

    def get(self, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray | None:
        """Weights of the input channels of one matrix, or None when the matrix says nothing about it.

        Args:
            name: GGUF name, such as `blk.0.ffn_down.weight`.
            shape: the tensor's, `[N, K]` or `[E, N, K]`; needed for experts out of a file of the old form.

        Returns:
            float32 `[K]`, or `[E, K]` for a stack of experts.

        Raises:
            PlanError: the matrix has another number of channels or experts than the tensor.
        """
        entry = self.entries.get(name)
        if entry is None:
            return None
        if shape is None:
            means = entry.means()
            return means[0] if len(means) == 1 else means
        experts, channels = prod(shape[:-2]), shape[-1]
        n_mat, n = entry.sums.shape
        if n_mat * n != experts * channels or n_mat not in (1, experts):
            raise PlanError(
                f"{self._path}: {quoted(name)} has {n_mat} x {n} importance values, but the tensor {list(shape)} has "
                f"{experts} x {channels} input channels: the matrix was computed for another model"
            )
        return entry.means().reshape(-1) if len(shape) == 2 else entry.means().reshape(experts, channels)

    def check(self, tensors: Iterable[tuple[str, tuple[int, ...]]]) -> list[str]:
        """Hold the matrix against the tensors that are to be quantized, given as (GGUF name, shape).

        Returns:
            The names of those it says nothing about.

        Raises:
            PlanError: another number of channels than a tensor has, or no tensor in common.
        """
        missing, found = [], False
        for name, shape in tensors:
            entry = self.get(name, shape)
            found = found or entry is not None
            if entry is None:
                missing.append(name)
        if missing and not found:
            raise PlanError(
                f"{self._path}: none of its {len(self.entries)} entries, such as "
                f"{quoted(next(iter(self.entries), ''))}, is a tensor to be quantized, such as {missing[0]}: "
                "the matrix was computed for another model"
            )
        return missing

    def unseen(self) -> dict[str, int]:
        """GGUF name -> experts that no token reached, where there are any."""
        counts = {name: int((entry.counts == 0).sum()) for name, entry in self.entries.items()}
        return {name: n for name, n in counts.items() if n}

    def write(self, path: str | Path) -> None:
        """Write the matrix: the old form where the name ends in `.dat`, else GGUF. An existing file is replaced.

        Raises:
            OutputError: the file cannot be written.
            FormatError: a name, sums or counts that the form cannot hold.
        """
        path = Path(path)
        for name, entry in self.entries.items():
            _check(path, name, entry)
        if not self.entries or self.chunk_size < 1:
            raise FormatError(
                f"{path}: {len(self.entries)} entries of chunks of {self.chunk_size}: both must be above 0"
            )
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            if path.suffix == ".dat":
                temporary.write_bytes(self._old_form())
            else:
                self._write_gguf(temporary)
            with open(temporary, "rb") as f:
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except OSError as e:
            raise OutputError(f"{path}: cannot be written: {e.strerror}") from e
        finally:
            temporary.unlink(missing_ok=True)

    def _write_gguf(self, path: Path) -> None:
        from gguf import GGUFWriter

        writer = GGUFWriter(str(path), "")
        # A matrix has no architecture.
        writer.kv_data[0].clear()
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", list(self.datasets) or [""])
        writer.add_uint32("imatrix.chunk_count", self.chunk_count)
        writer.add_uint32("imatrix.chunk_size", self.chunk_size)
        for name in sorted(self.entries):
            entry = self.entries[name]
            writer.add_tensor(name + _SUMS, np.ascontiguousarray(entry.sums, np.float32))
            writer.add_tensor(name + _COUNTS, np.ascontiguousarray(entry.counts[:, None], np.float32))
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()

    def _old_form(self) -> bytes:
        entries = []
        for name in sorted(self.entries):
            entry = self.entries[name]
            # Whole chunks, rounded up, so that what was counted never becomes 0.
            n_calls = max(ceil(float(entry.counts.max()) / self.chunk_size), 1)
            entries.append((name, n_calls, entry.means().reshape(-1) * np.float32(n_calls)))
        return imatrix_old.encode(entries, self.chunk_count, self.datasets[-1] if self.datasets else "")


def _read_gguf(path: Path) -> ImportanceMatrix:
    file = GgufFile(path)
    try:
        kind = file.metadata.get("general.type")
        if not isinstance(kind, str) or kind != "imatrix":
            raise FormatError(f"{path}: general.type is {_shown(kind)}, expected 'imatrix': not an importance matrix")
        datasets = file.metadata.get("imatrix.datasets")
        if not isinstance(datasets, list):
            raise FormatError(f"{path}: imatrix.datasets is {_shown(datasets)}, expected a list of texts")
        count, size = (_natural(path, f"imatrix.{key}", file.metadata) for key in ("chunk_count", "chunk_size"))
        entries = {}
        stems = [n[: -len(end)] for n in file.tensors for end in (_SUMS, _COUNTS) if n.endswith(end)]
        for name in dict.fromkeys(stems):
            entries[name] = Sums(_matrix(file, name + _SUMS), _matrix(file, name + _COUNTS).reshape(-1))
            _check(path, name, entries[name])
        if not entries:
            raise FormatError(f"{path}: no tensor is called <name>{_SUMS}: the importance matrix is empty")
        return ImportanceMatrix(entries, tuple(t for t in datasets if t), count, size or _CHUNK_SIZE)
    finally:
        file.close()


def _read_old(path: Path, data: bytes) -> ImportanceMatrix:
    listed, n_chunks, dataset = imatrix_old.decode(path, data)
    entries: dict[str, Sums] = {}
    for name, n_calls, values in listed:
        if name in entries:
            raise FormatError(f"{path}: entry {quoted(name)} appears twice")
        # Values of no call count as they are.
        calls = np.array([max(n_calls, 1)], np.float32)
        _check(path, name, Sums(values[None], calls))
        # Calls are chunks, counts are tokens; a power of two changes no digit.
        with np.errstate(over="ignore"):
            entries[name] = Sums(values[None] * np.float32(_CHUNK_SIZE), calls * np.float32(_CHUNK_SIZE))
        _check(path, name, entries[name])
    return ImportanceMatrix(entries, (dataset,) if dataset else (), n_chunks)


def _matrix(file: GgufFile, name: str) -> np.ndarray:
    """A tensor of a matrix file, float32 `[n_mat, n]`."""
    tensor = file.tensors.get(name)
    if tensor is None:
        raise FormatError(f"{file.path}: there is no tensor {quoted(name)} beside its counterpart")
    if tensor.type_name != "F32" or len(tensor.shape) > 2:
        raise FormatError(
            f"{file.path}: tensor {quoted(name)} is {tensor.type_name} {list(tensor.shape)}, "
            "expected F32 [matrices, values]"
        )
    values = file.read_bytes(tensor.offset, tensor.nbytes).view("<f4")
    return values.astype(np.float32, copy=False).reshape(-1, tensor.shape[-1])


def _check(path: Path, name: str, entry: Sums) -> None:
    """Refuse what no matrix holds: no name, shapes that do not belong together, negative or non-finite numbers."""
    if not name:
        raise FormatError(f"{path}: an entry has an empty name")
    if entry.sums.ndim != 2 or entry.counts.ndim != 1 or len(entry.sums) != len(entry.counts) or not entry.sums.size:
        raise FormatError(
            f"{path}: {quoted(name)}: sums {list(entry.sums.shape)} need one count for each row, "
            f"got {list(entry.counts.shape)}"
        )
    for what, values in (("sums", entry.sums), ("counts", entry.counts)):
        # False for NaN too.
        good = (values >= 0) & (values <= _LARGEST)
        if not good.all():
            bad = values[~good].flat[0]
            raise FormatError(f"{path}: {quoted(name)}: one of its {what} is {bad}, expected a finite number from 0 up")


def _natural(path: Path, key: str, metadata: dict) -> int:
    value = metadata.get(key)
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise FormatError(f"{path}: {key} is {_shown(value)}, expected an integer from 0 to {(1 << 31) - 1}")
    return value


def _shown(value: object) -> str:
    return f"an array of {len(value)}" if isinstance(value, (list, np.ndarray)) else quoted(value)
