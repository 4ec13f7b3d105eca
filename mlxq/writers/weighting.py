"""Rows of weights together with what each input channel counts, as encoders take them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from mlxq.types import TensorInfo
from mlxq.writers.stream import CHUNK_WEIGHTS

if TYPE_CHECKING:
    from mlxq.calibration.imatrix import ImportanceMatrix


class Weighting:
    """Importance of the input channels of parameters; without a matrix all count alike.

    Args:
        matrix: by GGUF names, or None.
        names: parameter -> its GGUF name.
    """

    def __init__(self, matrix: ImportanceMatrix | None = None, names: Mapping[str, str] | None = None):
        self._matrix = matrix
        self._names = names or {}

    def matrices(
        self, w: np.ndarray, info: TensorInfo, rows: slice | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Rows `[n, K]` of bounded size with the importance float32 `[K]` of their columns, or None.

        In a stack of experts each has its own importance.

        Args:
            w: rows `rows` of the first axis of the parameter.
        """
        shape = info.shape
        importance = self._matrix.get(self._names[info.name], shape) if self._matrix else None
        per_expert = len(shape) > 2 and importance is not None
        matrices = w.reshape(-1, *shape[-2:]) if per_expert else w.reshape(1, -1, shape[-1])
        first = rows.start if rows else 0
        step = max(CHUNK_WEIGHTS // shape[-1], 1)
        for i, matrix in enumerate(matrices):
            weight = importance[first + i] if per_expert else importance
            for start in range(0, len(matrix), step):
                yield matrix[start : start + step], weight
