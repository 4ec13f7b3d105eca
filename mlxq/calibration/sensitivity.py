"""How much an error in each output of each matrix changes the model's predictions: the Fisher information.

For a small error `e_t` in the output of a layer at token t the KL divergence between the float and the changed model is
`1/2 sum_t e_t^T F_t e_t`, with `F_t = E[g_t g_t^T]` and `g_t` the gradient of the log likelihood of tokens drawn from
the model's own predictions (Amari 1998, "Natural gradient works efficiently in learning"). Errors of different rows of
a matrix are taken as independent, as are inputs and gradients (Martens and Grosse 2015, "K-FAC"). Then a matrix whose
rows are off by `e_n` costs about `1/2 sum_n s_n e_n H e_n` nats per token, with `s_n` the mean squared gradient at its
output n and `H` the mean of `x x^T` of its inputs.

The model runs forwards block by block, keeping what went into each block, then backwards, block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxq.calibration.observe import Observations, observing
from mlxq.calibration.stream import Activations, Block, BlockStream
from mlxq.errors import CalibrationError

#: Logits that are worked on at a time, in the cache.
_CHUNK = 1 << 18


@dataclass(frozen=True)
class Sensitivity:
    """Of the matrices of a model.

    Attributes:
        squares: parameter name -> float64 `[N]` (or `[experts, N]`): mean squared gradient at each output per token.
        token_weights: parameter name -> float32 `[n_tokens]`, of mean 1: how much an error of the matrix matters at
            each token. What error feedback makes small is better weighted so (Kim et al. 2025, "GuidedQuant").
        embedding: float32 `[D, D]`: mean of `g g^T` of the gradients at the embedding's output.
        n_tokens: that were looked at.
    """

    squares: Mapping[str, np.ndarray]
    token_weights: Mapping[str, np.ndarray]
    embedding: np.ndarray
    n_tokens: int


#: Shown the second moments of the inputs of a block's matrices, and of the head's; gives the turns of the experts that
#: it wants to see, too (`Observations.turn`).
OnInputs = Callable[[Observations], Iterable[int] | None]


def forwards(
    stream: BlockStream,
    names_of: Callable[[str], Sequence[str]],
    on_inputs: OnInputs | None = None,
    room: int | None = None,
    on_block: Callable[[int], None] = lambda done: None,
) -> list[Activations]:
    """Run a stream forwards.

    Args:
        stream: of the sequences to look at.
        names_of: the matrices' names in a module, by its path.
        room: bytes for the second moments of a stack of experts; None: no limit.
        on_block: called after each block.

    Returns:
        What went into each block.

    Raises:
        CalibrationError: the model cannot be run block by block.
    """
    if stream.whole:
        raise CalibrationError(
            f"what bits cost is measured block by block, and this model has to run whole: {stream.whole}"
        )
    inputs: list[Activations] = []
    stream.embed()

    def look(block: Block, activations: Activations) -> None:
        inputs.append(activations.copy())
        names, turns = names_of(block.path), [0]
        while turns:
            seen = Observations(room=room, turn=turns.pop(0))
            with observing(block.module, block.path, names, seen, inputs=on_inputs is not None):
                for i, hidden in enumerate(inputs[-1]):
                    activations[i] = block(hidden)
            if on_inputs is not None:
                turns += on_inputs(seen) or ()
                names = seen.waiting()
        on_block(block.index + 1)

    stream.run(look)
    if on_inputs is not None:
        on_inputs(stream.inputs_of_head(names_of))
    return inputs


def measure(
    stream: BlockStream,
    names_of: Callable[[str], Sequence[str]],
    seed: int = 0,
    on_block: Callable[[int, int], None] = lambda done, total: None,
    on_inputs: OnInputs | None = None,
    room: int | None = None,
) -> Sensitivity:
    """Run a stream forwards and backwards.

    Args:
        seed: of the tokens that are drawn.
        on_block: called after each block, forwards and backwards.
        stream, names_of, on_inputs, room: as in `forwards`.

    Raises:
        CalibrationError: the model cannot be run block by block.
    """
    total = 2 * stream.n_blocks + 1
    inputs = forwards(stream, names_of, on_inputs, room, lambda done: on_block(done, total))
    found = Observations()
    cotangents = _through_head(stream, names_of, found, seed)
    stream.release_parts()
    on_block(stream.n_blocks + 1, total)
    for index in reversed(range(stream.n_blocks)):
        with stream.block(index) as block:
            names = names_of(block.path)
            with observing(block.module, block.path, names, found, inputs=False, gradients=True):
                for i, hidden in enumerate(inputs[index]):
                    _, (back,) = mx.vjp(block, [hidden], [cotangents[i]])
                    cotangents[i] = back
        inputs.pop()
        on_block(total - index, total)
    gram = 0
    for back in cotangents:
        rows = np.asarray(back.astype(mx.float32)).reshape(-1, back.shape[-1])
        gram = gram + rows.T @ rows
    n = stream.n_tokens
    squares = {name: s / n for name, s in found.squares.items()}
    weights = {name: _of_mean_1(np.concatenate(pieces)) for name, pieces in found.by_token.items()}
    return Sensitivity(squares, weights, gram / np.float32(n), n)


def _of_mean_1(a: np.ndarray) -> np.ndarray:
    mean = float(a.mean(dtype=np.float64))
    return a / np.float32(mean) if mean > 0 else np.ones_like(a)


def _through_head(
    stream: BlockStream, names_of: Callable[[str], Sequence[str]], found: Observations, seed: int
) -> Activations:
    """Gradients of the log likelihood of drawn tokens at what came out of the last block."""
    rng = np.random.default_rng(seed)
    cotangents = stream.activations.copy()
    with stream.observing_parts(names_of, found, inputs=False, gradients=True):
        for i, hidden in enumerate(stream.activations):
            # One at a time: logits are large.
            pieces = [_sequence_through_head(stream, hidden[j : j + 1], rng) for j in range(len(hidden))]
            cotangents[i] = mx.concatenate(pieces)
    return cotangents


def _sequence_through_head(stream: BlockStream, hidden: mx.array, rng: np.random.Generator) -> mx.array:
    logits = stream.head(hidden)
    d = mx.array(_drawn_gradient(np.asarray(logits.astype(mx.float32)), rng)).astype(logits.dtype)
    _, (back,) = mx.vjp(stream.head, [hidden], [d])
    mx.eval(back)
    return back


def _drawn_gradient(logits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gradient at logits `[..., V]` of the log likelihood of tokens drawn from their softmax: `onehot - p`."""
    V = logits.shape[-1]
    out = np.array(logits.reshape(-1, V), np.float32)
    step = max(_CHUNK // V, 1)
    for start in range(0, len(out), step):
        p = out[start : start + step]
        p -= p.max(axis=1, keepdims=True)
        np.exp(p, out=p)
        p /= p.sum(axis=1, keepdims=True)
        cumulative = np.cumsum(p, axis=1, dtype=np.float64)
        drawn = (cumulative < rng.random((len(p), 1)) * cumulative[:, -1:]).sum(axis=1)
        np.negative(p, out=p)
        p[np.arange(len(p)), drawn] += 1
    return out.reshape(logits.shape)
