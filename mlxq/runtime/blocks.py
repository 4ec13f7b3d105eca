"""A model run block by block in bounded memory: parameters of one transformer block at a time, then of the head.

An mlx-lm model holds its blocks in a list (`model.layers`). Each is wrapped so that its parameters are read when it is
called and given back once its output is evaluated; the modules beside the blocks (embedding, norms, head) are wrapped
to be read at their first use. The module that owns the list, the trunk, is run once for the whole batch. Then it is
replaced by one that returns rows of the stored hidden states, and the whole model is called with them, so that whatever
`Model.__call__` does behind the trunk (tied head, scaling, soft-capping of logits) is done, a chunk of rows at a time.

A model without that structure is run whole, one sequence at a time, and its logits wait in a temporary file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlxq.architectures.parameters import ParameterMap
from mlxq.runtime.block_layout import BlockCallback, BlockLayout, NotStreamable, OutputCallback, TrunkDone
from mlxq.runtime.layers import install_layers
from mlxq.runtime.spool import spool
from mlxq.runtime.weights import load_parameters, release_parameters


class StreamedModel:
    """Logits of every token of some sequences, from a checkpoint that is never in memory as a whole.

    Attributes:
        n_blocks: steps that `run` reports.
        whole: None, or the reason why the model has to be in memory as a whole.
    """

    def __init__(self, parameter_map: ParameterMap, *, compute_dtype: mx.Dtype | None = mx.float32):
        """Build the skeleton; nothing is read yet.

        Args:
            parameter_map: the source of the parameters; its own `model` is left alone.
            compute_dtype: dtype of the activations, as in `weights.load_parameters`.
        """
        self._map = parameter_map
        self._dtype = compute_dtype
        self._build()
        self._hidden: mx.array | None = None
        self._spool: Any = None

    def _build(self) -> None:
        self._model = self._map.new_model()
        install_layers(self._model, self._map.tensors)
        self._model.eval()
        self.whole: str | None = None
        try:
            self._layout = BlockLayout(self._model, self._map.tensors)
        except NotStreamable as e:
            self.whole = str(e)
            self._layout = None
        self.n_blocks = len(self._layout.blocks) if self._layout else 1

    def run(
        self,
        sequences: Sequence[Sequence[int]],
        on_block: BlockCallback | None = None,
        on_output: OutputCallback | None = None,
    ) -> int:
        """Run all blocks over token sequences, padded on the right to one batch, and keep what the head needs.

        Attention is causal, so nothing behind a token changes its logits; padding is dropped afterwards. `on_output`
        sees what each block returns for the padded batch, unless the model is run whole.

        Returns:
            The number of rows that `logits` can be asked for: all tokens, sequence after sequence.

        Raises:
            CheckpointError: a tensor cannot be read.
            OutputError: there is no room for the logits of a model that is run whole.
        """
        on_block = on_block or (lambda done, total: None)
        if self._layout is not None:
            try:
                self._run_streamed(sequences, on_block, on_output)
            except NotStreamable as e:
                # The wrappers stay in the model they were put into: start again with a fresh one.
                self._build()
                self.whole, self._layout, self.n_blocks = str(e), None, 1
        if self._layout is None:
            self._run_whole(sequences, on_block)
        return sum(len(ids) for ids in sequences)

    def logits(self, rows: np.ndarray) -> np.ndarray:
        """Logits float32 `[n, vocabulary]` of rows `[n]` (indices into all tokens) of what `run` was given."""
        if self._spool is not None:
            return np.array(self._spool[rows])
        if self._hidden is None:
            raise ValueError("run() comes before logits()")
        self._layout.replay(self._hidden[mx.array(np.ascontiguousarray(rows))][None])
        return _float32(self._model(mx.zeros((1, len(rows)), mx.int32)))[0]

    def states(self, rows: np.ndarray) -> tuple[np.ndarray, int] | None:
        """What `resume` takes to give the same logits: hidden states float32 `[n, hidden]` of rows, as `logits` takes
        them, and which module they left. None for a model that was run whole."""
        if self._hidden is None:
            return None
        return np.array(self._hidden[mx.array(np.ascontiguousarray(rows))].astype(mx.float32)), self._layout.trunk

    def resume(self, hidden: np.ndarray, trunk: int) -> None:
        """Take the place of `run`: `logits` of row i is of the hidden states `hidden[i]` of an earlier run.

        Raises:
            ValueError: the model has no such module, and cannot have run there.
        """
        if self._layout is None or not 0 <= trunk < len(self._layout.owners) - 1:
            raise ValueError(f"the hidden states left module {trunk}, which this model does not have above its blocks")
        self._layout.wrap(self._map, self._dtype, lambda done, total: None)
        self._layout.trunk = trunk
        self._hidden = mx.array(hidden)

    def close(self) -> None:
        """Give back all memory and the temporary file."""
        if self._layout is not None:
            self._layout.release()
        self._hidden = self._spool = None
        mx.clear_cache()

    def __enter__(self) -> StreamedModel:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _run_streamed(
        self, sequences: Sequence[Sequence[int]], on_block: BlockCallback, on_output: OutputCallback | None
    ) -> None:
        layout = self._layout
        layout.wrap(self._map, self._dtype, on_block, on_output=on_output)
        tokens, kept = _batch(sequences)
        try:
            self._model(tokens)
        except TrunkDone as done:
            hidden = done.output
        else:
            raise NotStreamable("its forward pass does not call the module that owns the blocks")
        if not isinstance(hidden, mx.array) or hidden.ndim != 3 or hidden.shape[:2] != tokens.shape:
            raise NotStreamable("its blocks do not end in one array of hidden states")
        self._hidden = hidden.reshape(-1, hidden.shape[-1])[kept]
        mx.eval(self._hidden)
        layout.release()

    def _run_whole(self, sequences: Sequence[Sequence[int]], on_block: BlockCallback) -> None:
        load_parameters(self._model, "", self._map, compute_dtype=self._dtype)
        n, start = sum(len(ids) for ids in sequences), 0
        for ids in sequences:
            logits = _float32(self._model(mx.array([list(ids)])))[0]
            if self._spool is None:
                self._spool = spool((n, logits.shape[-1]), "the logits of the text")
            self._spool[start : start + len(ids)] = logits
            start += len(ids)
        release_parameters(self._model)
        on_block(1, 1)


def _batch(sequences: Sequence[Sequence[int]]) -> tuple[mx.array, mx.array]:
    """Tokens `[S, L]` padded on the right with 0, and the indices of the real ones in the flattened batch."""
    length = max(len(ids) for ids in sequences)
    tokens = np.zeros((len(sequences), length), np.int32)
    kept = []
    for i, ids in enumerate(sequences):
        tokens[i, : len(ids)] = ids
        kept.append(np.arange(len(ids)) + i * length)
    return mx.array(tokens), mx.array(np.concatenate(kept))


def _float32(logits: Any) -> np.ndarray:
    """A model's logits as NumPy float32; some models return them in a tuple or object."""
    if isinstance(logits, tuple):
        logits = logits[0]
    logits = getattr(logits, "logits", logits)
    return np.asarray(logits.astype(mx.float32))
