"""An importance matrix of our own: how large the inputs of each matrix are on a text, as llama.cpp's tool counts them.

The float model runs over the text; squares of what goes into every matrix are summed by channel, for each expert of a
stack by itself. `llama-quantize --imatrix` reads the result, and so does `mlxq convert --imatrix`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from mlxq.calibration.imatrix import ImportanceMatrix, Sums
from mlxq.calibration.observe import Observations, observing
from mlxq.calibration.stream import Activations, Block, BlockStream
from mlxq.errors import CalibrationError


def importance_matrix(
    stream: BlockStream,
    names: Mapping[str, str],
    *,
    dataset: str = "",
    length: int = 512,
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> ImportanceMatrix:
    """Run a stream and count what goes into its matrices.

    Args:
        stream: of the sequences to look at.
        names: matrices, parameter -> GGUF name (`blk.0.attn_q.weight`). Rows that are looked up are not counted; a
            matrix that is embedding and head is, as a head.
        dataset: name of the text.
        length: tokens of a sequence.
        on_block: called after each block, and after the head.

    Raises:
        CalibrationError: inputs that are not finite, named with the matrix.
    """
    entries: dict[str, Sums] = {}
    total = stream.n_blocks + 1

    def names_of(path: str) -> list[str]:
        return [n for n in names if n.startswith(f"{path}." if path else "")]

    def count(seen: Observations) -> None:
        for name in seen.order:
            moments = seen.moments[name]
            sums = np.ascontiguousarray(np.diagonal(moments.total, axis1=1, axis2=2))
            if not np.isfinite(sums).all():
                raise CalibrationError(f"{name}: its inputs are not finite on the calibration text")
            entries[names[name]] = Sums(sums, moments.counts.astype(np.float32))

    def look(block: Block, activations: Activations) -> None:
        seen = Observations()
        with observing(block.module, block.path, names_of(block.path), seen):
            for i, hidden in enumerate(activations):
                activations[i] = block(hidden)
        count(seen)
        on_block(block.index + 1, total)

    stream.embed()
    stream.run(look)
    count(stream.inputs_of_head(names_of))
    on_block(total, total)
    return ImportanceMatrix(entries, (dataset,) if dataset else (), -(-stream.n_tokens // length), length)
