"""What a model writes after given tokens, several texts at once: for calibration on the model's own text."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlxq.architectures.registry import import_private
from mlxq.errors import GenerationError
from mlxq.runtime.sampling import make_sampler
from mlxq.runtime.worker import iterate
from mlxq.types import CancelToken

if TYPE_CHECKING:
    from mlxq.runtime.load import Model

#: Texts written at once: one reading of the weights serves them all.
_ROWS = 8


def continuations(
    model: Model, *, temperature: float = 1.0, rows: int = _ROWS, cancel: CancelToken | None = None
) -> Callable[[Sequence[list[int]], int, int], Iterable[list[int]]]:
    """The `generate(prompts, n_tokens, seed)` that `mlxq.calibration.texts` asks for.

    For each prompt, in order, it yields the ids that follow, up to the model's stop token or `n_tokens`. At the
    default temperature they are drawn from the model's own distribution. The same arguments, `rows` included, give the
    same ids on the same machine.

    Raises (as it yields):
        GenerationError: logits that are not finite.
        Cancelled: `cancel` was used.
    """

    def generate(prompts: Sequence[list[int]], n_tokens: int, seed: int) -> Iterator[list[int]]:
        # Random numbers of a batch are its own, so that what follows does not depend on when texts before it ended.
        seeds = np.random.default_rng(seed & 0xFFFFFFFFFFFFFFFF)
        for _, equal in groupby(prompts, key=len):
            same = list(equal)
            for first in range(0, len(same), rows):
                batch = mx.array(same[first : first + rows])
                yield from _batch(model, batch, n_tokens, temperature, int(seeds.integers(2**63)), cancel)

    return generate


def _batch(
    model: Model, prompts: mx.array, n_tokens: int, temperature: float, seed: int, cancel: CancelToken | None
) -> list[list[int]]:
    written: list[list[int]] = [[] for _ in range(prompts.shape[0])]
    open_rows = set(range(len(written)))
    steps = iterate(_steps(model, prompts, n_tokens, temperature, seed))
    try:
        for tokens in steps:
            if cancel is not None:
                cancel.check()
            open_rows -= {i for i in open_rows if tokens[i] in model.stop_tokens}
            for i in open_rows:
                written[i].append(tokens[i])
            if not open_rows:
                break
    finally:
        steps.close()
    return written


def _steps(
    model: Model, prompts: mx.array, n_tokens: int, temperature: float, seed: int
) -> Generator[list[int], None, None]:
    """One token of every row at a time; runs on the worker thread."""
    sampler = make_sampler(temperature=temperature, top_p=1.0, top_k=0, min_p=0.0, seed=seed)
    cache = import_private("models.cache").make_prompt_cache(model.module)
    tokens = prompts
    for _ in range(n_tokens):
        logits = model.module(tokens, cache=cache)[:, -1, :]
        drawn, sound = sampler(logits), mx.all(mx.logsumexp(logits, axis=-1) < mx.inf)
        mx.eval(drawn, sound)
        if not sound.item():
            raise GenerationError("the model's logits are not finite while it writes its calibration text")
        yield [int(t) for t in drawn.tolist()]
        tokens = drawn[:, None]
