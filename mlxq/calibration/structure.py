"""How a model calls its blocks, and whether they can be run one after another, each over the whole text.

That needs every block to take the hidden states that the one before it gave, and beside them nothing that depends on
the text: masks and positions do, which only sequences of another length change. The model's forward pass is run a few
times over a few sequences with placeholders in the place of what blocks give, so nothing of a block is computed. What
is not so is refused, in words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlxq.runtime.block_layout import NotStreamable

#: Called in the place of a block: its index and arguments; returns what the block gives.
OnCall = Callable[[int, tuple[Any, ...], dict[str, Any]], mx.array]
#: Runs a model's forward pass over tokens `[S, L]`.
Run = Callable[[mx.array, OnCall], Any]


@dataclass(frozen=True)
class _Repeated:
    """An argument that has sequences on its first axis, all alike: `row` `[1, ...]`."""

    row: mx.array


@dataclass(frozen=True)
class Passed:
    """What a block is given beside the hidden states, whatever the text says."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def for_rows(self, n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for `n` sequences."""

        def fit(a: Any) -> Any:
            return mx.broadcast_to(a.row, (n, *a.row.shape[1:])) if isinstance(a, _Repeated) else a

        return tree_map(fit, self.args), tree_map(fit, self.kwargs)


class _Enough(Exception):
    """Leaves the forward pass where the last block is called."""


def passed_to_blocks(run: Run, sequences: np.ndarray, n_blocks: int) -> tuple[list[Passed], mx.array]:
    """What each block is given beside the hidden states, and those of the first sequence `[1, L, D]`.

    Args:
        sequences: int32 `[S, L]` token ids.

    Raises:
        NotStreamable: the model does more with its blocks than to call one after another.
    """
    others = mx.array(np.stack([np.roll(sequences[0], 1), sequences[-1]]))
    one, two = (_calls(run, tokens, n_blocks) for tokens in (mx.array(sequences[:1]), others))
    passed = []
    for index, (a, b) in enumerate(zip(one, two, strict=True)):
        rest = [_same(x, y, index) for x, y in zip(_flat(a), _flat(b), strict=False)]
        if len(rest) != len(_flat(b)):
            raise NotStreamable(f"block {index} is called in other ways for other texts")
        passed.append(_like(a, rest))
    _check_head(run, sequences, n_blocks)
    return passed, one[0][0][0]


def _calls(run: Run, tokens: mx.array, n_blocks: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of all blocks; each gives numbers that are none."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    given: list[mx.array] = []

    def on_call(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> mx.array:
        if index != len(calls):
            raise NotStreamable("its blocks are not called in order, once each")
        if not args or not isinstance(args[0], mx.array) or args[0].ndim != 3:
            raise NotStreamable(f"block {index} is not given one array of hidden states")
        if given and args[0] is not given[-1]:
            raise NotStreamable(f"its hidden states are changed before block {index}")
        calls.append((args, kwargs))
        if len(calls) == n_blocks:
            raise _Enough
        given.append(mx.full(args[0].shape, mx.nan, args[0].dtype))
        return given[-1]

    try:
        run(tokens, on_call)
    except _Enough:
        return calls
    raise NotStreamable(f"its forward pass calls {len(calls)} of its {n_blocks} blocks")


def _flat(call: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Any]:
    return [a for _, a in tree_flatten([list(call[0][1:]), call[1]])]


def _like(call: tuple[tuple[Any, ...], dict[str, Any]], leaves: Sequence[Any]) -> Passed:
    left = iter(leaves)
    args, kwargs = tree_map(lambda _: next(left), (list(call[0][1:]), call[1]))
    return Passed(tuple(args), kwargs)


def _same(a: Any, b: Any, index: int) -> Any:
    """An argument of a block, for one sequence and for two others: what it is for any."""
    if not isinstance(a, mx.array) or not isinstance(b, mx.array):
        return a
    repeated = a.shape != b.shape and a.shape[1:] == b.shape[1:] and (a.shape[0], b.shape[0]) == (1, 2)
    if not repeated and a.shape != b.shape:
        raise NotStreamable(f"block {index} is given an array beside the hidden states whose shape is not understood")
    if not bool((a == b).all()):
        # Also what is computed from the outputs of other blocks: those are no numbers here, and equal nothing.
        raise NotStreamable(f"block {index} is given more of the text than the hidden states")
    return _Repeated(a) if repeated else a


def _check_head(run: Run, sequences: np.ndarray, n_blocks: int) -> None:
    """What comes out of the last block alone must decide the logits: here of two texts that have it in common."""
    called: list[int] = []

    def on_call(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> mx.array:
        called.append(index)
        hidden = args[0]
        if index < n_blocks - 1:
            return mx.full(hidden.shape, mx.nan, hidden.dtype)
        row = mx.cos(mx.arange(hidden.shape[-1]))
        return mx.broadcast_to(row, hidden.shape).astype(hidden.dtype)

    tokens = np.stack([sequences[0, :2], (sequences[0, :2] + 1) % (int(sequences.max()) + 1)])
    of_one, of_other = logits_of(run(mx.array(tokens), on_call))
    if called != list(range(n_blocks)):
        raise NotStreamable("its blocks are not called in order, once each")
    if not bool(mx.allclose(of_one, of_other, rtol=1e-2, atol=1e-3)):
        raise NotStreamable("its head looks at more than what its last block gives")


def logits_of(output: Any) -> mx.array:
    """The logits in what a model returns."""
    return getattr(output, "logits", output[0] if isinstance(output, tuple) else output)
