"""The float model, run block by block over the calibration text, with somebody looking at each block.

In memory are one block, the hidden states of all sequences (or a file of them, see `Activations`), and what one chunk
of sequences needs inside a block. The model's own forward pass is what calls the blocks, so every architecture whose
blocks are a plain list runs as it is: at each call all chunks are run through the block, and the pass goes on with a
placeholder of the right shape. A pass that changes the hidden states between two blocks is refused, by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlxq.architectures.parameters import ParameterMap
from mlxq.calibration.observe import Observations, observing
from mlxq.errors import CalibrationError
from mlxq.runtime.block_layout import BlockLayout, LazyModule, NotStreamable, Proxy
from mlxq.runtime.layers import install_layers
from mlxq.runtime.spool import spool
from mlxq.runtime.weights import to_mlx

#: Bytes of hidden states in a chunk, about: large products, and some hundred MB inside a block.
_CHUNK_BYTES = 12 << 20


class Block:
    """One block with its parameters, ready to be run over any chunk of sequences.

    Attributes:
        index, path: its place among the blocks, and in the model (`model.layers.3`).
        module: the block itself.
    """

    def __init__(self, index: int, path: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], rows: int):
        self.index = index
        self.path = path
        self.module = module
        self._rest = args[1:], kwargs
        self._rows = rows

    def __call__(self, hidden: mx.array) -> mx.array:
        """The block's output `[S, L, D]` for hidden states `[S, L, D]` of some sequences; lazy."""
        args, kwargs = tree_map(lambda a: self._cut(a, len(hidden)), self._rest)
        output = self.module(hidden, *args, **kwargs)
        if not isinstance(output, mx.array) or output.shape != hidden.shape:
            raise NotStreamable(f"{self.path} does not give one array of hidden states")
        return output

    def _cut(self, a: Any, n: int) -> Any:
        """What belongs to the first sequences of an argument that has them on its first axis."""
        batched = isinstance(a, mx.array) and a.ndim > 2 and a.shape[0] == self._rows
        return a[:n] if batched and n != self._rows else a


class Activations:
    """Hidden states `[S, L, D]` of all sequences, in memory or in a temporary file, by chunks of sequences.

    They are stored in the dtype that the model computes in.
    """

    def __init__(self, n_sequences: int, chunk: int, *, on_disk: bool = False):
        self.chunks = [slice(i, min(i + chunk, n_sequences)) for i in range(0, n_sequences, chunk)]
        self._on_disk = on_disk
        self._held: dict[int, mx.array] = {}
        self._file: np.ndarray | None = None
        self._dtype: mx.Dtype | None = None

    def __getitem__(self, i: int) -> mx.array:
        if self._file is None:
            return self._held[i]
        return to_mlx(np.array(self._file[self.chunks[i]])).astype(self._dtype)

    def __setitem__(self, i: int, hidden: mx.array) -> None:
        mx.eval(hidden)
        if not self._on_disk:
            self._held[i] = hidden
            return
        if self._file is None:
            n = self.chunks[-1].stop
            self._dtype = hidden.dtype
            flat = spool((n, prod(hidden.shape[1:])), "the activations of the calibration text")
            self._file = flat.reshape(n, *hidden.shape[1:])
        self._file[self.chunks[i]] = np.asarray(hidden.astype(mx.float32))

    def copy(self) -> Activations:
        """The same hidden states, which the other's no longer touch."""
        new = Activations(self.chunks[-1].stop, self.chunks[0].stop, on_disk=self._on_disk)
        for i, hidden in enumerate(self):
            new[i] = hidden
        return new

    def __iter__(self) -> Iterator[mx.array]:
        return (self[i] for i in range(len(self.chunks)))


#: What is done with a block: it sees the hidden states that come in, and leaves those that go on in their place.
BlockVisitor = Callable[[Block, Activations], None]


class BlockStream:
    """Hidden states of calibration sequences on their way through a model.

    Attributes:
        n_blocks: how many there are.
        activations: what goes into the next block; after `run`, what came out of the last.
    """

    def __init__(
        self,
        parameter_map: ParameterMap,
        sequences: np.ndarray,
        *,
        compute_dtype: mx.Dtype | None = mx.float32,
        on_disk: bool = False,
    ):
        """Build the skeleton; nothing is read yet.

        Args:
            parameter_map: the source; its own `model` is left alone.
            sequences: int32 `[S, L]` token ids.
            compute_dtype: of the activations, as in `runtime.weights.load_parameters`.
            on_disk: keep the hidden states in a temporary file.

        Raises:
            NotStreamable: the model has no plain list of blocks.
        """
        self._map = parameter_map
        self._dtype = compute_dtype
        self._sequences = sequences
        self._on_disk = on_disk
        self._model = parameter_map.new_model()
        install_layers(self._model, parameter_map.tensors)
        self._model.eval()
        self._layout = BlockLayout(self._model, parameter_map.tensors)
        self.n_blocks = len(self._layout.blocks)
        self._call: Callable[[int, LazyModule, tuple, dict[str, Any]], Any] = self._stop_at_first
        self._layout.wrap(parameter_map, compute_dtype, lambda done, total: None, self._intercept)

    def embed(self) -> None:
        """Hidden states before the first block."""
        width = self._width()
        n, length = self._sequences.shape
        chunk = max(1, min(n, _CHUNK_BYTES // (4 * length * width)))
        self.activations = Activations(n, chunk, on_disk=self._on_disk)
        self._call = self._stop_at_first
        for i, part in enumerate(self.activations.chunks):
            try:
                self._model(mx.array(self._sequences[part]))
            except _FirstBlock as e:
                self.activations[i] = e.hidden
            else:
                raise NotStreamable("its forward pass does not call its blocks")

    def run(self, visit: BlockVisitor) -> None:
        """Let `visit` see every block in turn, with its parameters in memory; it moves the activations on.

        Raises:
            NotStreamable: the forward pass does more between blocks than to call them.
        """
        expected: list[mx.array] = []
        self._calls = []

        def call(index: int, lazy: LazyModule, args: tuple, kwargs: dict[str, Any]) -> mx.array:
            if expected and args[0] is not expected[-1]:
                raise NotStreamable(f"its hidden states are changed before block {index}")
            self._calls.append((lazy, args, kwargs))
            with self.block(index) as block:
                visit(block, self.activations)
            # Lazy: it is passed on, and never computed.
            expected.append(mx.zeros(args[0].shape, args[0].dtype))
            return expected[-1]

        self._call = call
        first = self.activations.chunks[0]
        self._model(mx.array(self._sequences[first]))
        if len(expected) != self.n_blocks:
            raise NotStreamable(f"its forward pass calls {len(expected)} of its {self.n_blocks} blocks")

    @contextlib.contextmanager
    def block(self, index: int) -> Iterator[Block]:
        """A block with its parameters, once `run` has come to it."""
        lazy, args, kwargs = self._calls[index]
        with lazy.loaded() as module:
            yield Block(index, f"{self._layout.path}.{index}", module, args, kwargs, len(args[0]))

    def observing_parts(
        self, names_of: Callable[[str], Sequence[str]], into: Observations, **what: bool
    ) -> contextlib.AbstractContextManager[None]:
        """`observe.observing` of the matrices beside the blocks (head, embedding as a head)."""
        names = [name for path in self.parts for name in names_of(path)]
        return observing(self._model, "", names, into, **what)

    def inputs_of_head(self, names_of: Callable[[str], Sequence[str]]) -> Observations:
        """Second moments of what goes into the matrices beside the blocks, after the last block."""
        seen = Observations()
        with self.observing_parts(names_of, seen):
            for hidden in self.activations:
                # Its logits stay lazy: only what goes in is wanted.
                self.head(hidden)
        return seen

    def logits(self, i: int) -> mx.array:
        """Logits `[S, L, vocabulary]` of chunk `i`, from what came out of the last block; lazy."""
        return self.head(self.activations[i])

    def head(self, hidden: mx.array) -> mx.array:
        """Logits `[S, L, vocabulary]` for what came out of the last block, `[S, L, D]`; lazy."""
        self._call = lambda index, lazy, args, kwargs: hidden
        logits = self._model(mx.zeros(hidden.shape[:2], mx.int32))
        return getattr(logits, "logits", logits[0] if isinstance(logits, tuple) else logits)

    def part(self, path: str) -> Any:
        """The module beside the blocks at `path` (`lm_head`, `model.embed_tokens`), read at its first use."""
        found = self._model
        for name in path.split("."):
            found = found[name]
        return found

    @property
    def n_tokens(self) -> int:
        return self._sequences.size

    @property
    def parts(self) -> list[str]:
        """Paths of the modules beside the blocks."""
        return [path for _, _, path in self._layout.parts]

    def close(self) -> None:
        self._layout.release()
        self.activations = None
        mx.clear_cache()

    def __enter__(self) -> BlockStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _intercept(self, index: int, lazy: LazyModule) -> Proxy:
        return _Intercepted(lazy, index, self)

    def _stop_at_first(self, index: int, lazy: LazyModule, args: tuple, kwargs: dict[str, Any]) -> Any:
        raise _FirstBlock(args[0])

    def _width(self) -> int:
        config = self._map.checkpoint.config
        for part in (config, config.get("text_config") or {}):
            width = part.get("hidden_size") or part.get("n_embd") or part.get("d_model") or part.get("model_dim")
            if isinstance(width, int):
                return width
        raise CalibrationError(f"{self._map.checkpoint.path}: config.json does not say how wide hidden states are")


class _FirstBlock(Exception):
    """Leaves the forward pass where the first block is called."""

    def __init__(self, hidden: mx.array):
        super().__init__()
        self.hidden = hidden


class _Intercepted(Proxy):
    """Stands where a block was; whoever calls it gets what the stream makes of that."""

    def __init__(self, lazy: LazyModule, index: int, stream: BlockStream):
        super().__init__(lazy)
        self._index = index
        self._stream = stream

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._stream._call(self._index, self._module, args, kwargs)
