"""Models measured on a text, alone or against a reference: the function behind `mlxq eval` and `mlxq compare`.

Every model is run block by block (`predictions`), one after the other, in float32; the reference once, and not at all
where its predictions for the text are on disk. Then the heads of reference and model run together, some rows at a time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from mlxq.api import DEFAULT_LENGTH, public
from mlxq.architectures.parameters import ParameterMap
from mlxq.checkpoint.base import Checkpoint
from mlxq.checkpoint.config import vocabulary_size
from mlxq.checkpoint.source import open_checkpoint
from mlxq.errors import EvaluationError
from mlxq.evaluate.inspect import bits_per_weight
from mlxq.evaluate.quality import statistics
from mlxq.evaluate.quality.block_errors import BlockErrors, BlockSamples
from mlxq.evaluate.quality.flips import listed_flips
from mlxq.evaluate.quality.predictions import Predictions, passes, resumed, run
from mlxq.evaluate.quality.reference_store import ReferenceStore
from mlxq.evaluate.quality.results import Evaluation, ModelQuality
from mlxq.evaluate.quality.scores import Scores, head_chunks, score_model, score_pair
from mlxq.evaluate.quality.text import Score, TextOptions, Windows
from mlxq.evaluate.quality.tokens import shared_windows
from mlxq.runtime.tokenizer import load_tokenizer
from mlxq.types import CancelToken, Progress, ProgressCallback

#: Steps of a head in the progress, in blocks: it is about as much work for every model.
_HEAD = 8


@public
def evaluate_models(
    models: Sequence[str | Path],
    *,
    reference: str | Path | None = None,
    text: str | Path | None = None,
    sequences: int | None = None,
    length: int = DEFAULT_LENGTH,
    from_end: bool = False,
    score: Score = "second-half",
    cache: str | Path | None = None,
    use_cache: bool = True,
    progress: ProgressCallback | None = None,
    cancel: CancelToken | None = None,
) -> Evaluation:
    """Measure models on a text: perplexity, and with a reference how far their predictions are from its own.

    Args:
        models: directories, `.gguf` files or Hub ids.
        reference: the model that the others were made from.
        text: a UTF-8 file; None is the built-in sample.
        sequences: at most so many are used; 0 takes all that the text has. None: 12 of a file, all of the sample.
        length: tokens of a sequence, start tokens included.
        from_end: the last sequences of the text, not the first.
        score: `second-half` of every sequence, or `all` tokens but the first.
        cache: directory for what the reference predicts; None is the platform's cache directory.
        use_cache: False neither reads nor writes there.
        progress: called with stage `measure` after every block and every chunk of the heads.
        cancel: checked at the same places.

    Returns:
        What was measured, the models in the order given.

    Raises:
        CheckpointError: a model cannot be read.
        EvaluationError: the text is unfit; a model has another vocabulary or tokenizer than the reference; logits or
            hidden states that are not finite.
        OutputError: no room for the logits of a model that has to be run whole.
        Cancelled: through `cancel`.
    """
    began = time.perf_counter()
    if not models:
        raise EvaluationError("no model to measure; name one or more")
    options = TextOptions(text, sequences, length, from_end, score)
    with ExitStack() as stack:
        opened = [stack.enter_context(open_checkpoint(m, None, progress)) for m in models]
        base = None if reference is None else stack.enter_context(open_checkpoint(reference, None, progress))
        tokenizer, windows, notes = shared_windows(([base] if base else []) + opened, options)
        steps = _Steps(progress, cancel or CancelToken(), windows)
        session = _Session(windows, tokenizer, steps, None if base is None else ParameterMap(base))
        maps = [ParameterMap(c) for c in opened]
        steps.expect(maps, session.reference)
        if base is not None:
            stack.enter_context(session.run_reference(cache, use_cache))
        measured = [session.measure(str(name), m) for name, m in zip(models, maps, strict=True)]
        return Evaluation(
            text=windows.name,
            score=windows.score,
            n_sequences=len(windows.sequences),
            n_tokens=len(windows.rows),
            length=int(windows.lengths.max()),
            reference=None if base is None else session.reference_quality(str(reference)),
            models=tuple(measured),
            cached=session.cached,
            notes=(*notes, *session.notes),
            seconds=time.perf_counter() - began,
        )


@public
def evaluate_model(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    text: str | Path | None = None,
    sequences: int | None = None,
    length: int = DEFAULT_LENGTH,
    from_end: bool = False,
    score: Score = "second-half",
    cache: str | Path | None = None,
    use_cache: bool = True,
    progress: ProgressCallback | None = None,
    cancel: CancelToken | None = None,
) -> ModelQuality:
    """Measure one model on a text: what `evaluate_models` finds of it, with the same arguments."""
    evaluation = evaluate_models(
        [model],
        reference=reference,
        text=text,
        sequences=sequences,
        length=length,
        from_end=from_end,
        score=score,
        cache=cache,
        use_cache=use_cache,
        progress=progress,
        cancel=cancel,
    )
    return evaluation.models[0]


def measure_on(
    windows: Windows,
    model: str | Path,
    reference: str | Path,
    *,
    revision: str | None = None,
    cache: str | Path | None = None,
    progress: ProgressCallback | None = None,
    cancel: CancelToken | None = None,
) -> ModelQuality:
    """One model against a `reference` (of a Hub `revision`) on given token sequences; else as `evaluate_models`."""
    with open_checkpoint(model) as opened, open_checkpoint(reference, revision, progress) as base, ExitStack() as stack:
        steps = _Steps(progress, cancel or CancelToken(), windows)
        session = _Session(windows, load_tokenizer(base), steps, ParameterMap(base))
        parameters = ParameterMap(opened)
        steps.expect([parameters], session.reference)
        stack.enter_context(session.run_reference(cache, True))
        return session.measure(str(model), parameters)


class _Steps:
    """Progress in blocks: of a model in passes over its sequences, and of its head."""

    def __init__(self, progress: ProgressCallback | None, cancel: CancelToken, windows: Windows):
        self._progress = progress
        self._windows = windows
        self.cancel = cancel
        self._done = 0.0
        self._total = 0.0

    def expect(self, models: Sequence[ParameterMap], reference: ParameterMap | None) -> None:
        """The models that will be run: their blocks and heads. The reference's head runs beside theirs."""
        self._total = float(sum(self.blocks(m) + _HEAD for m in models))
        self._total += self.blocks(reference) if reference else 0

    def blocks(self, parameters: ParameterMap) -> int:
        config = parameters.checkpoint.config
        layers = getattr(parameters.model, "layers", None)
        return (len(layers) if layers else 1) * len(passes(config, self._windows))

    def advance(self, item: str, steps: float = 1.0) -> None:
        self.cancel.check()
        self._done = min(self._done + steps, self._total)
        if self._progress is not None:
            self._progress(Progress("measure", round(self._done), round(self._total), "blocks", item))


class _Session:
    """One text, one reference or none, and the models measured on them one after the other."""

    def __init__(self, windows: Windows, tokenizer: Any, steps: _Steps, reference: ParameterMap | None):
        self.windows = windows
        self.reference = reference
        self.cached = False
        self.notes: list[str] = []
        self._tokenizer = tokenizer
        self._steps = steps
        self._samples = BlockSamples()
        self._predictions: Predictions | None = None
        self._nll_reference: np.ndarray | None = None
        self._reference_seconds = 0.0

    def run_reference(self, cache: str | Path | None, use_cache: bool) -> Predictions:
        """The reference's predictions, from disk or by running it."""
        began = time.perf_counter()
        checkpoint = self.reference.checkpoint
        store = ReferenceStore(cache, checkpoint, self.windows, self._steps.cancel.check) if use_cache else None
        self._predictions = self._stored(store) if store else None
        if self._predictions is None:
            self._predictions = self._computed(store)
        self._reference_seconds = time.perf_counter() - began
        return self._predictions

    def _stored(self, store: ReferenceStore) -> Predictions | None:
        found = store.read()
        if found is None:
            return None
        states, blocks = found
        try:
            predictions = resumed(self.reference, states)
        except ValueError:
            return None
        self._samples = BlockSamples(blocks)
        self.cached = True
        self._steps.advance("reference from disk", self._steps.blocks(self.reference))
        return predictions

    def _computed(self, store: ReferenceStore | None) -> Predictions:
        predictions, states = run(
            self.reference, self.windows, self._samples.add, lambda item: self._steps.advance(f"reference, {item}")
        )
        if predictions.whole:
            self.notes.append(
                f"the reference was in memory as a whole, and what it predicts is not kept: {predictions.whole}"
            )
        elif store and states is not None and (problem := store.write(states, self._samples.whole())):
            self.notes.append(problem)
        return predictions

    def measure(self, name: str, parameters: ParameterMap) -> ModelQuality:
        """Run one model and score it."""
        from mlxq.runtime.memory import peak_memory

        began = time.perf_counter()
        errors = BlockErrors(self._samples)
        predictions, _ = run(
            parameters, self.windows, errors.add, lambda item: self._steps.advance(f"{Path(name).name}, {item}")
        )
        with predictions:
            scores = self._score(parameters.checkpoint, predictions, name)
        if scores.nll_reference is not None:
            self._nll_reference = scores.nll_reference
        notes = [f"it was in memory as a whole: {predictions.whole}"] if predictions.whole else []
        return _quality(
            name,
            parameters.checkpoint,
            self.windows,
            scores,
            block_errors=errors.result(),
            flips=listed_flips(self._tokenizer, self.windows, scores) if scores.flips is not None else (),
            notes=tuple(notes),
            seconds=time.perf_counter() - began,
            peak_memory=peak_memory(),
        )

    def _score(self, checkpoint: Checkpoint, predictions: Predictions, name: str) -> Scores:
        size = vocabulary_size(checkpoint.config) or 1 << 18
        n_chunks = len(head_chunks(len(self.windows.rows), size))

        def on_chunk(item: str) -> None:
            self._steps.advance(f"{Path(name).name}, {item}", _HEAD / n_chunks)

        if self._predictions is None:
            return score_model(checkpoint.path, predictions, self.windows, size, on_chunk)
        wheres = self.reference.checkpoint.path, checkpoint.path
        return score_pair(wheres, self._predictions, predictions, self.windows, size, on_chunk)

    def reference_quality(self, name: str) -> ModelQuality:
        """The reference itself: size and perplexity."""
        return _quality(
            name,
            self.reference.checkpoint,
            self.windows,
            Scores(self._nll_reference),
            seconds=self._reference_seconds,
        )


def _quality(name: str, checkpoint: Checkpoint, windows: Windows, scores: Scores, **more: Any) -> ModelQuality:
    tensors = list(checkpoint.tensors.values())
    of = windows.of
    found: dict[str, Any] = {"perplexity": statistics.perplexity(scores.nll, of)}
    if scores.kl is not None:
        found |= {
            "kl_mean": statistics.mean(scores.kl, of),
            "kl_median": statistics.quantile(scores.kl, of, 0.5),
            "kl_p99": statistics.quantile(scores.kl, of, 0.99),
            "agreement": statistics.mean(scores.agree, of),
            "n_flips": len(scores.flips.row),
        }
    return ModelQuality(
        model=name,
        kind=checkpoint.kind,
        nbytes=sum(t.nbytes for t in tensors),
        bpw=bits_per_weight(tensors) or 0.0,
        **found,
        **more,
    )
