"""Hidden states of the calibration text between two blocks, in memory or on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import prod
from typing import IO

import mlx.core as mx
import numpy as np

from mlxq.runtime.spool import room_on_disk
from mlxq.runtime.weights import to_mlx


class Activations:
    """Hidden states `[S, L, D]` of all sequences, in memory or in a temporary file, by chunks of sequences.

    They are stored in the dtype that the model computes in.
    """

    def __init__(self, n_sequences: int, chunk: int, *, on_disk: bool = False):
        self.chunks = [slice(i, min(i + chunk, n_sequences)) for i in range(0, n_sequences, chunk)]
        self._on_disk = on_disk
        self._held: dict[int, mx.array] = {}
        #: Read and written, not mapped: mapped pages count as memory that is in use.
        self._file: IO[bytes] | None = None
        self._shape: tuple[int, ...] = ()
        self._dtype: mx.Dtype | None = None

    def __getitem__(self, i: int) -> mx.array:
        if self._file is None:
            return self._held[i]
        part = self.chunks[i]
        row = 4 * prod(self._shape)
        found = os.pread(self._file.fileno(), (part.stop - part.start) * row, part.start * row)
        return to_mlx(np.frombuffer(found, np.float32).reshape(-1, *self._shape)).astype(self._dtype)

    def __setitem__(self, i: int, hidden: mx.array) -> None:
        mx.eval(hidden)
        if not self._on_disk:
            self._held[i] = hidden
            return
        if self._file is None:
            self._dtype, self._shape = hidden.dtype, hidden.shape[1:]
            nbytes = 4 * self.chunks[-1].stop * prod(self._shape)
            self._file = room_on_disk(nbytes, "the activations of the calibration text")
        wide = np.ascontiguousarray(hidden.astype(mx.float32))
        os.pwrite(self._file.fileno(), wide, self.chunks[i].start * 4 * prod(self._shape))

    def copy(self) -> Activations:
        """The same hidden states, which the other's no longer touch."""
        new = Activations(self.chunks[-1].stop, self.chunks[0].stop, on_disk=self._on_disk)
        for i, hidden in enumerate(self):
            new[i] = hidden
        return new

    def apart(self, aside: np.ndarray) -> Iterator[tuple[np.ndarray, mx.array, bool]]:
        """The same by chunks, with sequences that `aside` (bool `[S]`) marks by themselves.

        Yields which sequences, int `[s]`; their hidden states `[s, L, D]`; whether they are marked.
        """
        for part, hidden in zip(self.chunks, self, strict=True):
            for marked in (False, True):
                some = np.flatnonzero(aside[part] == marked)
                if len(some) == len(hidden):
                    yield part.start + some, hidden, marked
                elif len(some):
                    yield part.start + some, hidden[mx.array(some)], marked

    def __iter__(self) -> Iterator[mx.array]:
        return (self[i] for i in range(len(self.chunks)))
