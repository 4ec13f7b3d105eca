"""The float model, run block by block over the calibration text, with somebody looking at each block.

In memory are one block, the hidden states of all sequences (or a file of them, see `Activations`), and what one chunk
of sequences needs inside a block. The model's own forward pass is what calls the blocks, so every architecture whose
blocks are a plain list runs as it is: at each call all chunks are run through the block, and the pass goes on with a
placeholder of the right shape. What that would make of a model whose blocks are connected in other ways is found out
first (`structure`); such a model is run as one block, whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxq.architectures.parameters import ParameterMap
from mlxq.calibration.activations import Activations
from mlxq.calibration.observe import InputSeen, Observations, observing
from mlxq.calibration.structure import OnCall, Passed, logits_of, passed_to_blocks
from mlxq.errors import CalibrationError
from mlxq.runtime.block_layout import BlockLayout, LazyModule, NotStreamable, Proxy
from mlxq.runtime.layers import install_layers, with_float_weight
from mlxq.runtime.weights import load_parameters, release_parameters

__all__ = ["Activations", "Block", "BlockStream", "BlockVisitor", "put_weight"]

#: Bytes of hidden states in a chunk, about: large products, and some hundred MB inside a block.
_CHUNK_BYTES = 12 << 20


class Block:
    """One block with its parameters, ready to be run over any chunk of sequences.

    Attributes:
        index, path: its place among the blocks, and in the model (`model.layers.3`).
        module: the block itself.
    """

    def __init__(self, index: int, path: str, module: nn.Module, passed: Passed):
        self.index = index
        self.path = path
        self.module = module
        self._passed = passed

    def __call__(self, hidden: mx.array) -> mx.array:
        """The block's output `[S, L, D]` for hidden states `[S, L, D]` of some sequences; lazy."""
        args, kwargs = self._passed.for_rows(len(hidden))
        output = self.module(hidden, *args, **kwargs)
        if not isinstance(output, mx.array) or output.shape != hidden.shape:
            raise NotStreamable(f"{self.path} does not give one array of hidden states")
        return output


class _WholeModel(Block):
    """A model that cannot be taken apart: its one block takes tokens `[S, L]`, and gives them back."""

    def __init__(self, module: nn.Module):
        super().__init__(0, "", module, Passed((), {}))

    def __call__(self, hidden: mx.array) -> mx.array:
        if not bool(mx.isfinite(logits_of(self.module(hidden))).all()):
            raise CalibrationError("the model's logits are not finite on the calibration text")
        return hidden


#: What is done with a block: it sees the hidden states that come in, and leaves those that go on in their place.
BlockVisitor = Callable[[Block, Activations], None]


class BlockStream:
    """Hidden states of calibration sequences on their way through a model.

    Attributes:
        n_blocks: how many there are.
        whole: why the model is run as one block, with all parameters in memory; None where it is not.
        activations: what goes into the next block; after `run`, what came out of the last.
    """

    def __init__(
        self,
        parameter_map: ParameterMap,
        sequences: np.ndarray,
        *,
        compute_dtype: mx.Dtype | None = mx.float32,
        on_disk: bool = False,
        room: int | None = None,
    ):
        """Look at how the model calls its blocks; the embedding, the first block and the head are read for that.

        Args:
            parameter_map: the source; its own `model` is left alone.
            sequences: int32 `[S, L]` token ids.
            compute_dtype: of the activations, as in `runtime.weights.load_parameters`.
            on_disk: keep the hidden states in a temporary file.
            room: bytes of hidden states beyond which they are kept there, too; None: no limit.
        """
        self._map = parameter_map
        self._dtype = compute_dtype
        self._sequences = sequences
        self._on_disk, self._room = on_disk, room
        self._build()
        self.activations: Activations | None = None
        self.whole: str | None = None
        try:
            self._lazy: list[LazyModule] = []
            self._layout = BlockLayout(self._model, parameter_map.tensors)
            self._layout.wrap(parameter_map, compute_dtype, lambda done, total: None, self._intercept)
            self.n_blocks = len(self._layout.blocks)
            self._look()
        except NotStreamable as e:
            self.whole, self._layout, self.n_blocks = str(e), None, 1
            # The wrappers stay in the model they were put into: start again with a fresh one.
            self._build()

    def _build(self) -> None:
        self._model = self._map.new_model()
        install_layers(self._model, self._map.tensors)
        self._model.eval()

    def _look(self) -> None:
        """Find out how the blocks are called, and try the first.

        Raises:
            NotStreamable: they cannot be run one after another.
        """
        try:
            self._passed, hidden = passed_to_blocks(self._forward, self._sequences, self.n_blocks)
            self._width = hidden.shape[-1]
            with self.block(0) as block:
                block(hidden)
        finally:
            self._layout.release()

    def _forward(self, tokens: mx.array, on_call: OnCall) -> Any:
        """The model's own pass over tokens `[S, L]`, with `on_call` in the place of its blocks."""
        self._on_call = on_call
        return self._model(tokens)

    def embed(self, instead: Mapping[str, mx.array] = MappingProxyType({})) -> None:
        """Hidden states before the first block; `instead` are float weights of embeddings, by their paths."""
        n, length = self._sequences.shape
        if self.whole is not None:
            self.activations = Activations(n, 1)
            for i, part in enumerate(self.activations.chunks):
                self.activations[i] = mx.array(self._sequences[part])
            return
        chunk = max(1, min(n, _CHUNK_BYTES // (4 * length * self._width)))
        too_many = self._room is not None and 4 * n * length * self._width > self._room
        self.activations = Activations(n, chunk, on_disk=self._on_disk or too_many)

        def stop(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            raise _FirstBlock(args[0])

        with self._with_weights(instead):
            for i, part in enumerate(self.activations.chunks):
                try:
                    self._forward(mx.array(self._sequences[part]), stop)
                except _FirstBlock as e:
                    self.activations[i] = e.hidden
        self._layout.release()

    @contextlib.contextmanager
    def _with_weights(self, weights: Mapping[str, mx.array]) -> Iterator[None]:
        """Layers beside the blocks compute with other weights; those that were read are not read for it."""
        with contextlib.ExitStack() as stack:
            for owner, attribute, path in self._layout.parts:
                lazy = owner[attribute]
                if path in weights:
                    owner[attribute] = with_float_weight(lazy.unread, weights[path])
                    stack.callback(owner.__setitem__, attribute, lazy)
                for inside in (p for p in weights if p.startswith(f"{path}.")):
                    put_weight(lazy, inside.removeprefix(f"{path}."), weights[inside])
            yield

    def run(self, visit: BlockVisitor) -> None:
        """Let `visit` see every block in turn, with its parameters in memory; it moves the activations on."""
        for index in range(self.n_blocks):
            with self.block(index) as block:
                visit(block, self.activations)

    @contextlib.contextmanager
    def block(self, index: int) -> Iterator[Block]:
        """A block with its parameters."""
        if self.whole is not None:
            load_parameters(self._model, "", self._map, compute_dtype=self._dtype)
            try:
                yield _WholeModel(self._model)
            finally:
                release_parameters(self._model)
            return
        with self._lazy[index].loaded() as module:
            yield Block(index, f"{self._layout.path}.{index}", module, self._passed[index])

    def observing_parts(
        self, names_of: Callable[[str], Sequence[str]], into: Observations, **what: Any
    ) -> contextlib.AbstractContextManager[None]:
        """`observe.observing` of the matrices beside the blocks (head, embedding as a head)."""
        names = [name for path in self.parts for name in names_of(path)]
        return observing(self._model, "", names, into, **what)

    def inputs_of_head(
        self, names_of: Callable[[str], Sequence[str]], aside: np.ndarray | None = None, most: int = 0
    ) -> Observations:
        """Second moments of what goes into the matrices beside the blocks, after the last block.

        Of sequences that `aside` (bool `[S]`) marks, `most` rows altogether are put aside.
        """
        aside = np.zeros(len(self._sequences), bool) if aside is None else aside
        seen = Observations()
        with self.observing_parts(names_of, seen, inputs=False):
            self.head(self.activations[0][:1, :1])
        if not seen.order:
            return seen
        with self.observing_parts(names_of, seen, last=seen.order[-1]):
            for which, hidden, marked in self.activations.apart(aside):
                seen.aside = share_of(most, len(which), aside) if marked else None
                # Logits are large, and only what goes in is wanted.
                with contextlib.suppress(InputSeen):
                    self.head(hidden)
        return seen

    def logits(self, i: int) -> mx.array:
        """Logits `[S, L, vocabulary]` of chunk `i`, from what came out of the last block; lazy."""
        return self.head(self.activations[i])

    def head(self, hidden: mx.array) -> mx.array:
        """Logits `[S, L, vocabulary]` for what came out of the last block, `[S, L, D]`; lazy."""
        return logits_of(self._forward(mx.zeros(hidden.shape[:2], mx.int32), lambda index, args, kwargs: hidden))

    @property
    def n_sequences(self) -> int:
        return len(self._sequences)

    @property
    def n_tokens(self) -> int:
        return self._sequences.size

    @property
    def parts(self) -> list[str]:
        """Paths of the modules beside the blocks; none where the model is run whole."""
        return [path for _, _, path in self._layout.parts] if self._layout else []

    def release_parts(self) -> None:
        """Give back the memory of the modules beside the blocks, which are read again when they are needed."""
        if self._layout is not None:
            self._layout.release()
        mx.clear_cache()

    def close(self) -> None:
        self.release_parts()
        self.activations = None

    def __enter__(self) -> BlockStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _intercept(self, index: int, lazy: LazyModule) -> Proxy:
        self._lazy.append(lazy)
        return _Intercepted(lazy, index, self)


def share_of(most: int, n: int, aside: np.ndarray) -> int:
    """How many of `most` rows are those of `n` of the sequences that `aside` marks."""
    return max(1, most * n // max(int(aside.sum()), 1))


def put_weight(owner: Any, path: str, weight: mx.array) -> None:
    """Let the layer at `path` inside a module compute with another float weight, whatever held its own."""
    *parents, last = path.split(".")
    for name in parents:
        owner = owner[int(name)] if isinstance(owner, list) else owner[name]
    if isinstance(owner, list):
        owner[int(last)] = with_float_weight(owner[int(last)], weight)
    else:
        owner[last] = with_float_weight(owner[last], weight)


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
        return self._stream._on_call(self._index, args, kwargs)
