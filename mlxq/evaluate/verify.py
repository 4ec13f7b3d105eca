"""The proof of a conversion: source and result read the same text, and their predictions are compared.

Both models are run block by block (`runtime.blocks`), the source first, then the result; then both heads together, some
rows at a time. All is computed in float32, so what is compared is the weights. The largest things in memory are one
block, or the two heads, and hidden states and logits of some hundred tokens.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlxq.architectures.arguments import effective
from mlxq.architectures.parameters import ParameterMap
from mlxq.checkpoint.base import Checkpoint
from mlxq.checkpoint.config import context_length, vocabulary_size
from mlxq.checkpoint.huggingface import is_tokenizer
from mlxq.checkpoint.source import open_checkpoint
from mlxq.errors import CheckpointError
from mlxq.evaluate.bounds import better_than_chance, kl_bound, suspicious_kl
from mlxq.evaluate.comparison.tensors import compare_tensors
from mlxq.evaluate.divergence import Accumulator, Divergence, score_tokens
from mlxq.evaluate.inspect import bits_per_weight
from mlxq.evaluate.tensors import TensorError, not_finite, same_format, tensor_errors
from mlxq.evaluate.texts import MAX_TOKENS, token_sequences
from mlxq.evaluate.verdict import NAMED, config_difference, failure, remarks
from mlxq.types import FLOAT_BYTES, CancelToken, Progress, ProgressCallback, TensorInfo
from mlxq.writers.manifest import scaled_tensors

#: Logits of one model that are computed at a time (32 MB in float32), but at least so many rows: the head is decoded
#: once for each chunk.
_LOGITS = 1 << 23
_LEAST_ROWS = 64


@dataclass(frozen=True)
class VerificationResult:
    """What the proof measured.

    Attributes:
        passed: the result's configuration is the source's; all its tensors and logits are finite; no tensor is further
            from its source than rounding can bring it (compared when the divergence is beyond what needs no second
            look, see `bounds`); and `kl` is within `kl_bound`.
        failure: one line that says why not, naming the tensors furthest from the source; empty when it passed.
        kl, kl_se: mean KL(source || result) in nats per token, and its standard error.
        kl_bound: the largest `kl` that is accepted at the result's bits per weight; infinite where rounding may do
            anything, and where the source predicts text no better than chance.
        agreement: share of tokens for which both put the same token first.
        perplexity_source, perplexity_result: of the text, before and after.
        n_tokens, n_sequences: tokens scored, and independent texts that they come from.
        bpw: bits per weight of the result.
        worst_tensors: when it failed, the tensors furthest beyond what their bits explain, the worst first.
        notes: what was done otherwise than described (a model that had to be in memory as a whole).
        n_identical: weights, where every one was found to be the source's own number; then nothing was run, `kl` is 0
            and the perplexities are NaN.
        seconds, peak_memory: wall time, and the process's largest memory so far in bytes.
    """

    passed: bool
    failure: str
    kl: float
    kl_se: float | None
    kl_bound: float
    agreement: float
    perplexity_source: float
    perplexity_result: float
    n_tokens: int
    n_sequences: int
    bpw: float
    worst_tensors: tuple[TensorError, ...] = ()
    notes: tuple[str, ...] = ()
    n_identical: int = 0
    seconds: float = field(default=0.0, compare=False)
    peak_memory: int = field(default=0, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; without what differs from run to run (time and memory). Numbers that are not finite are null."""
        return {
            "passed": self.passed,
            "failure": self.failure,
            "kl_nats_per_token": _rounded(self.kl),
            "kl_standard_error": _rounded(self.kl_se),
            "kl_bound": _rounded(self.kl_bound),
            "top1_agreement": _rounded(self.agreement),
            "perplexity_source": _rounded(self.perplexity_source),
            "perplexity_result": _rounded(self.perplexity_result),
            "tokens": self.n_tokens,
            "sequences": self.n_sequences,
            "bpw": _rounded(self.bpw),
            "identical_weights": self.n_identical,
            "worst_tensors": [t.to_dict() for t in self.worst_tensors],
            "notes": list(self.notes),
        }


def verify(
    source: ParameterMap | Checkpoint,
    result_path: str | Path,
    *,
    bpw: float | None = None,
    scaled: ParameterMap | None = None,
    always_run: bool = False,
    progress: ProgressCallback | None = None,
    cancel: CancelToken | None = None,
) -> VerificationResult:
    """Compare a converted directory or file with the model it was made from.

    Where the formats allow that every weight is the source's own number, the weights are compared first, and only if
    one is not, or `always_run` asks for it, both models are run.

    Args:
        source: where the conversion started; its tokenizer reads the text.
        result_path: the directory that was made.
        bpw: bits per weight of the result, everything counted; measured from its tensors when None.
        scaled: the source with channels scaled as in the result, to compare tensors with; the same function.
        progress: called with stage `verify` after every block and every chunk of the heads.
        cancel: checked at the same places.

    Returns:
        A result with `passed` False when the converted model is broken. That is no exception.

    Raises:
        CheckpointError: the source has no tokenizer, or the *source* yields logits that are not finite; the result
            cannot be read.
        Cancelled: through `cancel`.
    """
    from mlxq.runtime.memory import peak_memory

    began = time.perf_counter()
    parameters = source if isinstance(source, ParameterMap) else ParameterMap(source)
    sequences = _sequences(parameters.checkpoint)
    with open_checkpoint(result_path) as checkpoint:
        result = ParameterMap(checkpoint)
        tensors = list(result.tensors.values())
        if bpw is None:
            bpw = bits_per_weight(tensors) or 0.0
        difference = _config_difference(parameters.checkpoint, checkpoint)
        if not (difference or always_run) and _is_identical(parameters, result, progress, cancel):
            return _identical(result, bpw, time.perf_counter() - began)
        divergence, notes = _Comparison(parameters, result, sequences, progress, cancel).run()
        exact = {t.name for t in tensors if same_format(parameters.tensors.get(t.name), t)}
        # A comparison with NaN is false, so this holds for a divergence that is not finite too. A tensor may be broken
        # where the text does not reach it.
        suspicious = not divergence.kl <= suspicious_kl(tensors, exact) or bool(not_finite(result, cancel))
        errors = tensor_errors(scaled or parameters, result, cancel) if suspicious else []
        unlike = frozenset() if scaled is not None else scaled_tensors(checkpoint.path)
        errors = [e for e in errors if e.name not in unlike]
        if suspicious and unlike:
            notes += (f"{len(unlike)} tensors are scaled in the result, and were not compared one by one",)
        vocabulary = vocabulary_size(parameters.checkpoint.config)
        predicts = better_than_chance(divergence.nll_source, vocabulary)
        bound = kl_bound(tensors, exact, predicts=predicts)
        reason = failure(difference, divergence, bound, bpw, errors)
        notes += remarks(divergence, bound, suspicious, predicts, vocabulary)
    return VerificationResult(
        passed=not reason,
        failure=reason,
        kl=divergence.kl,
        kl_se=divergence.kl_se,
        kl_bound=bound,
        agreement=divergence.agreement,
        perplexity_source=divergence.perplexity_source,
        perplexity_result=divergence.perplexity_result,
        n_tokens=divergence.n_tokens,
        n_sequences=divergence.n_sequences,
        bpw=bpw,
        worst_tensors=tuple(errors[:NAMED]) if reason else (),
        notes=notes,
        seconds=time.perf_counter() - began,
        peak_memory=peak_memory(),
    )


def _is_identical(
    source: ParameterMap, result: ParameterMap, progress: ProgressCallback | None, cancel: CancelToken | None
) -> bool:
    """Whether every weight of the result is the same number as in the source; not tried where it cannot be."""
    if source.tensors.keys() != result.tensors.keys():
        return False
    pairs = [(info, result.tensors[name]) for name, info in source.tensors.items()]
    if not all(a.spec == b.spec if a.spec else b.spec is None and _both_or_no_floats(a, b) for a, b in pairs):
        return False
    same = all(c.status in ("identical", "equal") for c in compare_tensors(source, result, progress, cancel))
    return same and not not_finite(result, cancel)


def _both_or_no_floats(a: TensorInfo, b: TensorInfo) -> bool:
    return a.dtype == b.dtype or (a.dtype in FLOAT_BYTES and b.dtype in FLOAT_BYTES)


def _identical(result: ParameterMap, bpw: float, seconds: float) -> VerificationResult:
    from mlxq.runtime.memory import peak_memory

    return VerificationResult(
        passed=True,
        failure="",
        kl=0.0,
        kl_se=0.0,
        kl_bound=0.0,
        agreement=1.0,
        perplexity_source=math.nan,
        perplexity_result=math.nan,
        n_tokens=0,
        n_sequences=0,
        bpw=bpw,
        n_identical=sum(info.size for info in result.tensors.values()),
        seconds=seconds,
        peak_memory=peak_memory(),
    )


def _config_difference(source: Checkpoint, result: Checkpoint) -> str:
    """`config_difference`; where a GGUF file is involved, of what is computed: it says little else."""
    configs = source.config, result.config
    if "gguf" in (source.kind, result.kind) and source.kind != result.kind:
        configs = effective(source.config), effective(result.config)
    return config_difference(*configs)


class _Comparison:
    """Runs both models over the text and adds up what their logits tell."""

    def __init__(
        self,
        source: ParameterMap,
        result: ParameterMap,
        sequences: list[list[int]],
        progress: ProgressCallback | None,
        cancel: CancelToken | None,
    ):
        from mlxq.runtime.blocks import StreamedModel

        self._models = (StreamedModel(source), StreamedModel(result))
        self._where = source.checkpoint.path
        self._sequences = sequences
        self._progress = progress
        self._cancel = cancel
        counts = np.array([len(ids) for ids in sequences])
        tokens = np.concatenate([np.array(ids) for ids in sequences])
        last = np.cumsum(counts) - 1
        #: Rows that are followed by a token of the same sequence; that token; the sequence.
        self._rows = np.setdiff1d(np.arange(len(tokens)), last)
        self._targets = tokens[self._rows + 1]
        self._of = np.repeat(np.arange(len(counts)), counts)[self._rows]
        vocabulary = vocabulary_size(source.checkpoint.config) or 1 << 18
        self._step = max(_LOGITS // vocabulary, _LEAST_ROWS)
        self._done = 0
        self._total = sum(m.n_blocks for m in self._models) + len(self._chunks())

    def _chunks(self) -> list[slice]:
        n = len(self._rows)
        return [slice(i, min(i + self._step, n)) for i in range(0, n, self._step)]

    def _advance(self, item: str) -> None:
        if self._cancel is not None:
            self._cancel.check()
        self._done = min(self._done + 1, self._total)
        if self._progress is not None:
            self._progress(Progress("verify", self._done, self._total, "blocks", item))

    def run(self) -> tuple[Divergence, tuple[str, ...]]:
        accumulator = Accumulator(len(self._sequences))
        source, result = self._models
        with source, result:
            for model, name in ((source, "source"), (result, "result")):
                model.run(self._sequences, lambda done, total, name=name: self._advance(f"{name} block {done}"))
            for part in self._chunks():
                rows = self._rows[part]
                a = source.logits(rows)
                # Models that mask tokens give them negative infinity, which is a probability of 0.
                if not np.isfinite(a.max(axis=1)).all():
                    raise CheckpointError(
                        f"{self._where}: the source itself yields logits that are NaN or infinite, so there is nothing"
                        " to compare with (--no-verify converts it all the same)"
                    )
                accumulator.add(score_tokens(a, result.logits(rows), self._targets[part]), self._of[part])
                self._advance("head")
        return accumulator.result(), self._notes()

    def _notes(self) -> tuple[str, ...]:
        names = zip(("source", "result"), self._models, strict=True)
        return tuple(f"the {n} was in memory as a whole, because {m.whole}" for n, m in names if m.whole)


def _sequences(checkpoint: Checkpoint) -> list[list[int]]:
    from mlxq.runtime.tokenizer import load_tokenizer

    if not is_tokenizer(checkpoint.companion_files()):
        raise CheckpointError(
            f"{checkpoint.path}: has no tokenizer, so no text can be read to verify the result; copy tokenizer.json"
            " (or tokenizer.model) from the original model, or pass --no-verify"
        )
    # Positions that a table does not have are read from whatever lies behind it.
    longest = min(context_length(checkpoint.config) or MAX_TOKENS, MAX_TOKENS)
    return token_sequences(load_tokenizer(checkpoint), vocabulary_size(checkpoint.config), longest)


def _rounded(x: float | None) -> float | None:
    """Six significant digits; None for what JSON cannot hold."""
    return float(f"{x:.6g}") if x is not None and math.isfinite(x) else None
