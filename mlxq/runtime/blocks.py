"""A model run block by block in bounded memory: parameters of one transformer block at a time, then of the head.

An mlx-lm model holds its blocks in a list (`model.layers`). Each is wrapped so that its parameters are read when it is
called and given back once its output is evaluated; the modules beside the blocks (embedding, norms, head) are wrapped
to be read at their first use. The module that owns the list, the trunk, is run once for the whole batch. Then it is
replaced by one that returns rows of the stored hidden states, and the whole model is called with them, so that whatever
`Model.__call__` does behind the trunk (tied head, scaling, soft-capping of logits) is done, a chunk of rows at a time.

A model without that structure is run whole, one sequence at a time, and its logits wait in a temporary file.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxq.architectures.parameters import ParameterMap
from mlxq.errors import OutputError
from mlxq.runtime.layers import install_layers
from mlxq.runtime.weights import load_parameters, release_parameters

#: Bytes of a temporary file that are written at a time.
_PIECE = 1 << 22

#: Called after every block: its index is done, of the number of blocks.
BlockCallback = Callable[[int, int], None]


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
            self._layout = _Layout(self._model, self._map.tensors)
        except _NotStreamable as e:
            self.whole = str(e)
            self._layout = None
        self.n_blocks = len(self._layout.blocks) if self._layout else 1

    def run(self, sequences: Sequence[Sequence[int]], on_block: BlockCallback | None = None) -> int:
        """Run all blocks over token sequences, padded on the right to one batch, and keep what the head needs.

        Attention is causal, so nothing behind a token changes its logits; padding is dropped afterwards.

        Returns:
            The number of rows that `logits` can be asked for: all tokens, sequence after sequence.

        Raises:
            CheckpointError: a tensor cannot be read.
            OutputError: there is no room for the logits of a model that is run whole.
        """
        on_block = on_block or (lambda done, total: None)
        if self._layout is not None:
            try:
                self._run_streamed(sequences, on_block)
            except _NotStreamable as e:
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

    def _run_streamed(self, sequences: Sequence[Sequence[int]], on_block: BlockCallback) -> None:
        layout = self._layout
        layout.wrap(self._map, self._dtype, on_block)
        tokens, kept = _batch(sequences)
        try:
            self._model(tokens)
        except _TrunkDone as done:
            hidden = done.output
        else:
            raise _NotStreamable("its forward pass does not call the module that owns the blocks")
        if not isinstance(hidden, mx.array) or hidden.ndim != 3 or hidden.shape[:2] != tokens.shape:
            raise _NotStreamable("its blocks do not end in one array of hidden states")
        self._hidden = hidden.reshape(-1, hidden.shape[-1])[kept]
        mx.eval(self._hidden)
        layout.release()

    def _run_whole(self, sequences: Sequence[Sequence[int]], on_block: BlockCallback) -> None:
        load_parameters(self._model, "", self._map, compute_dtype=self._dtype)
        n, start = sum(len(ids) for ids in sequences), 0
        for ids in sequences:
            logits = _float32(self._model(mx.array([list(ids)])))[0]
            if self._spool is None:
                self._spool = _spool((n, logits.shape[-1]))
            self._spool[start : start + len(ids)] = logits
            start += len(ids)
        release_parameters(self._model)
        on_block(1, 1)


class _NotStreamable(Exception):
    """The model has not the structure that running it block by block needs; the text says what is missing."""


class _TrunkDone(Exception):
    """Leaves the model's forward pass once the trunk has computed its output."""

    def __init__(self, output: Any):
        super().__init__()
        self.output = output


class _Layout:
    """Where a model keeps its blocks, the modules beside them, and the modules on the way from the root."""

    def __init__(self, model: nn.Module, names: Iterable[str]):
        self.model = model
        self.path = _path_of_blocks(model)
        *parents, self.attribute = self.path.split(".")
        self.owners = [(model, "")]
        for i, name in enumerate(parents):
            child = self.owners[-1][0].get(name)
            if not isinstance(child, nn.Module):
                raise _NotStreamable(f"its blocks at {self.path} are not reached through modules alone")
            self.owners.append((child, ".".join(parents[: i + 1])))
        if len(self.owners) < 2:
            raise _NotStreamable("its blocks belong to the model itself, not to a trunk inside it")
        self.blocks: list[nn.Module] = list(self.owners[-1][0][self.attribute])
        self.parts = self._find_parts(names)
        self._refuse_sharing()
        self._lazy: list[_Lazy] = []
        self._cuts: list[_Cut] = []

    def _find_parts(self, names: Iterable[str]) -> list[tuple[nn.Module, str, str]]:
        """`(owner, attribute, path)` of each module with parameters that is neither a block nor above them."""
        above = {id(module) for module, _ in self.owners}
        parts = []
        for owner, prefix in self.owners:
            for attribute, child in owner.items():
                path = f"{prefix}.{attribute}" if prefix else attribute
                if path == self.path or id(child) in above:
                    continue
                if isinstance(child, nn.Module):
                    parts.append((owner, attribute, path))
                elif any(name == path or name.startswith(f"{path}.") for name in names):
                    raise _NotStreamable(f"{path} holds parameters beside the blocks that belong to no module")
        return parts

    def _refuse_sharing(self) -> None:
        seen: set[int] = set()
        for top in [*self.blocks, *(owner[attribute] for owner, attribute, _ in self.parts)]:
            own = {id(m) for m in top.modules() if any(isinstance(v, mx.array) for v in m.values())}
            if own & seen:
                raise _NotStreamable("its blocks share modules with each other")
            seen |= own

    def wrap(self, parameter_map: ParameterMap, dtype: mx.Dtype | None, on_block: BlockCallback) -> None:
        """Put the wrappers in: blocks, parts, and the cuts on the way to the blocks."""
        total = len(self.blocks)

        def make(module: nn.Module, path: str, index: int | None = None) -> _Lazy:
            def load() -> None:
                load_parameters(module, path, parameter_map, compute_dtype=dtype)

            finished = None if index is None else lambda: on_block(index + 1, total)
            return _Lazy(module, load, finished)

        self._lazy = [make(block, f"{self.path}.{i}", i) for i, block in enumerate(self.blocks)]
        owner = self.owners[-1][0]
        owner[self.attribute] = self._lazy.copy()
        for part_owner, attribute, path in self.parts:
            lazy = make(part_owner[attribute], path)
            self._lazy.append(lazy)
            part_owner[attribute] = lazy
        for (parent, _), (module, path) in zip(self.owners, self.owners[1:], strict=False):
            cut = _Cut(module)
            self._cuts.append(cut)
            parent[path.rpartition(".")[2]] = cut

    def replay(self, hidden: mx.array) -> None:
        """Let the trunk return `hidden` the next time it is called."""
        trunk = next(cut for cut in reversed(self._cuts) if cut.called)
        trunk.replay = hidden

    def release(self) -> None:
        """Drop the parameters of every part."""
        for lazy in self._lazy:
            lazy.release()


class _Proxy:
    """Stands where a module was: attributes and items are the module's."""

    def __init__(self, module: nn.Module):
        self._module = module

    def _prepare(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        self._prepare()
        return getattr(self._module, name)

    def __getitem__(self, name: str) -> Any:
        self._prepare()
        return self._module[name]

    def __contains__(self, name: str) -> bool:
        return name in self._module


class _Lazy(_Proxy):
    """A module whose parameters are read when it is needed.

    A block (`finished` is given) has them from the start of its call until its output is evaluated, and its attributes
    are passed through without them. Another part has them from its first use until `release`.
    """

    def __init__(self, module: nn.Module, load: Callable[[], None], finished: Callable[[], None] | None):
        super().__init__(module)
        self._load = load
        self._finished = finished
        self._loaded = False

    def _prepare(self) -> None:
        if not self._loaded and self._finished is None:
            self._loaded = True
            self._load()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._finished is None:
            self._prepare()
            return self._module(*args, **kwargs)
        # What comes in would otherwise be computed only now, while this block's parameters are held too.
        mx.eval([a for _, a in tree_flatten((args, kwargs)) if isinstance(a, mx.array)])
        self._load()
        try:
            output = self._module(*args, **kwargs)
            mx.eval([a for _, a in tree_flatten(output) if isinstance(a, mx.array)])
        finally:
            release_parameters(self._module)
        self._finished()
        return output

    def release(self) -> None:
        if self._loaded:
            release_parameters(self._module)
            self._loaded = False


class _Cut(_Proxy):
    """A module above the blocks. The innermost that is called is the trunk: it ends the pass with its output."""

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.called = False
        self.replay: mx.array | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.replay is not None:
            return self.replay
        if self.called:
            return self._module(*args, **kwargs)
        self.called = True
        raise _TrunkDone(self._module(*args, **kwargs))


def _path_of_blocks(model: nn.Module) -> str:
    """Path of the list that holds the blocks, e.g. `model.layers`."""
    blocks = getattr(model, "layers", None)
    if not isinstance(blocks, (list, tuple)) or not all(isinstance(b, nn.Module) for b in blocks) or not blocks:
        raise _NotStreamable("it has no list of blocks")
    wanted = {id(b) for b in blocks}
    for path, module in model.named_modules():
        for attribute, value in module.items():
            if isinstance(value, list) and wanted <= {id(v) for v in value}:
                return f"{path}.{attribute}" if path else attribute
    raise _NotStreamable("its blocks are not all in one list")


def _batch(sequences: Sequence[Sequence[int]]) -> tuple[mx.array, mx.array]:
    """Tokens `[S, L]` padded on the right with 0, and the indices of the real ones in the flattened batch."""
    length = max(len(ids) for ids in sequences)
    tokens = np.zeros((len(sequences), length), np.int32)
    kept = []
    for i, ids in enumerate(sequences):
        tokens[i, : len(ids)] = ids
        kept.append(np.arange(len(ids)) + i * length)
    return mx.array(tokens), mx.array(np.concatenate(kept))


def _spool(shape: tuple[int, int]) -> np.ndarray:
    """A float32 array in a temporary file whose bytes are all there: a mapped file with holes ends the process when
    the disk is full.

    Raises:
        OutputError: the disk has not so much room.
    """
    nbytes = 4 * prod(shape)
    try:
        with tempfile.TemporaryFile() as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, nbytes)
            else:
                for start in range(0, nbytes, _PIECE):
                    file.write(bytes(min(_PIECE, nbytes - start)))
                file.flush()
            return np.memmap(file, np.float32, "r+", shape=shape)
    except OSError as e:
        raise OutputError(
            f"{tempfile.gettempdir()}: {nbytes / 1e6:,.0f} MB for the logits of the text cannot be had there:"
            f" {e.strerror or e}; make room, or name another place in TMPDIR"
        ) from e


def _float32(logits: Any) -> np.ndarray:
    """A model's logits as NumPy float32; some models return them in a tuple or object."""
    if isinstance(logits, tuple):
        logits = logits[0]
    logits = getattr(logits, "logits", logits)
    return np.asarray(logits.astype(mx.float32))
