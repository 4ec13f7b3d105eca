"""One model run over the windows of a text: block by block, some sequences at a time, then the head.

What is kept of the blocks is the hidden states of the scored rows, from which the head gives their logits. They are
`hidden / vocabulary` of the logits' size, and the logits follow from them exactly, which is why they are what is stored
of a reference (`reference_store`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxq.architectures.parameters import ParameterMap
from mlxq.errors import EvaluationError
from mlxq.evaluate.quality.text import Windows
from mlxq.runtime.blocks import StreamedModel

#: Bytes of the widest activation of a block, for the sequences that go through it together, and their tokens: progress
#: and Ctrl-C wait for a block.
_PASS_BYTES = 256 << 20
_PASS_TOKENS = 8192
#: Rows whose hidden states are compared after every block: evenly spaced among those that are scored.
_SAMPLE = 128

#: Called with the index of a block, the places in the sample, and the hidden states there, float32 `[m, hidden]`.
Observer = Callable[[int, np.ndarray, np.ndarray], None]


@dataclass(frozen=True, eq=False)
class States:
    """Hidden states float32 `[n, hidden]` behind the blocks, one for each scored row, and the module they left."""

    hidden: np.ndarray
    trunk: int


class Predictions:
    """Logits of the scored rows of one model. Close it: it holds the head, or a temporary file."""

    def __init__(self, model: StreamedModel, rows: np.ndarray | None):
        self._model = model
        self._rows = rows
        #: Why the model was in memory as a whole, or None.
        self.whole = model.whole

    def logits(self, part: slice) -> np.ndarray:
        """Logits float32 `[n, vocabulary]` of some of the scored rows."""
        rows = np.arange(part.start, part.stop) if self._rows is None else self._rows[part]
        return self._model.logits(rows)

    def __enter__(self) -> Predictions:
        return self

    def __exit__(self, *exc: object) -> None:
        self._model.close()


def sample_of(windows: Windows) -> np.ndarray:
    """Scored rows, as indices into all tokens, whose hidden states are compared after every block."""
    rows = windows.rows
    return rows[np.linspace(0, len(rows) - 1, min(_SAMPLE, len(rows))).astype(np.int64)]


def resumed(parameters: ParameterMap, states: States) -> Predictions:
    """The predictions that follow from hidden states of an earlier run.

    Raises:
        ValueError: they are not of this model.
    """
    model = StreamedModel(parameters)
    model.resume(states.hidden, states.trunk)
    return Predictions(model, None)


def run(
    parameters: ParameterMap, windows: Windows, observe: Observer, on_block: Callable[[str], None]
) -> tuple[Predictions, States | None]:
    """Run a model over all sequences.

    Args:
        observe: sees the hidden states of `sample_of(windows)` after every block, some sequences at a time.
        on_block: called after every block with its name.

    Returns:
        The predictions, and the states to have them again; None for a model that had to be in memory as a whole.

    Raises:
        CheckpointError: a tensor cannot be read.
        EvaluationError: what a block returns is not finite.
        OutputError: there is no room for the logits of a model that is run whole.
    """
    sample = sample_of(windows)
    found: list[np.ndarray] = []
    trunk = 0
    for first, last in passes(parameters.checkpoint.config, windows):
        with StreamedModel(parameters) as model:
            if model.whole:
                break
            watch = _Watch(parameters, windows, first, last, sample, observe)
            model.run(_ids(windows)[first:last], lambda done, total: on_block(f"block {done} of {total}"), watch)
            states = model.states(watch.inside(windows.rows)[1])
            if states is None:
                break
            hidden, trunk = states
            found.append(hidden)
    else:
        states = States(np.concatenate(found), trunk)
        return resumed(parameters, states), states
    whole = StreamedModel(parameters)
    whole.run(_ids(windows), lambda done, total: on_block("whole model"))
    return Predictions(whole, windows.rows), None


def _ids(windows: Windows) -> list[list[int]]:
    return [ids.tolist() for ids in windows.sequences]


def passes(config: dict[str, Any], windows: Windows) -> list[tuple[int, int]]:
    """Ranges of sequences that go through the blocks together."""
    text = config.get("text_config") or config
    sizes = [text.get(name) for name in ("intermediate_size", "hidden_size", "n_embd", "d_model")]
    widest = max([size for size in sizes if isinstance(size, int)], default=4096)
    length = int(windows.lengths.max())
    step = max(min(_PASS_BYTES // (4 * widest), _PASS_TOKENS) // length, 1)
    n = len(windows.sequences)
    return [(i, min(i + step, n)) for i in range(0, n, step)]


class _Watch:
    """Sees what each block returns for the sequences `first` to `last`: checks it, and passes on the sampled rows."""

    def __init__(
        self,
        parameters: ParameterMap,
        windows: Windows,
        first: int,
        last: int,
        sample: np.ndarray,
        observe: Observer,
    ):
        self._where = parameters.checkpoint.path
        self._first = first
        self._starts = windows.starts[first:last]
        self._begin = int(windows.starts[first])
        self._end = int(windows.starts[last - 1] + windows.lengths[last - 1])
        self._places, rows = self.inside(sample)
        sequence = np.searchsorted(self._starts - self._begin, rows, side="right") - 1
        self._at = mx.array(sequence), mx.array(rows - (self._starts - self._begin)[sequence])
        self._observe = observe

    def inside(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of `rows` are of these sequences, and their indices into the tokens of these."""
        places = np.flatnonzero((rows >= self._begin) & (rows < self._end))
        return places, rows[places] - self._begin

    def __call__(self, index: int, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(hidden, mx.array) or hidden.ndim != 3:
            return
        if not mx.isfinite(hidden).all().item():
            bad = np.argwhere(~np.isfinite(np.array(hidden.astype(mx.float32))).all(axis=-1))[0]
            raise EvaluationError(
                f"{self._where}: the output of block {index + 1} is NaN or infinite, first in sequence"
                f" {self._first + int(bad[0]) + 1} at token {int(bad[1]) + 1}: the model is broken or overflows"
            )
        if len(self._places):
            self._observe(index, self._places, np.array(hidden[self._at].astype(mx.float32)))
