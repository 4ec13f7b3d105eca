"""`verify` of two artifacts of one model: tensors, tokenizer, chat template and configuration, side by side."""

from __future__ import annotations

import difflib
import math
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mlxq.api import public
from mlxq.architectures.parameters import ParameterMap
from mlxq.checkpoint.base import Checkpoint
from mlxq.checkpoint.source import open_checkpoint
from mlxq.errors import UsageError
from mlxq.evaluate.comparison.configs import ConfigDifference, compare_configs, different_architecture
from mlxq.evaluate.comparison.report import severity, tensors_failure
from mlxq.evaluate.comparison.templates import TemplateComparison
from mlxq.evaluate.comparison.tensors import TensorComparison, compare_tensors
from mlxq.evaluate.comparison.texts import compare_texts
from mlxq.evaluate.comparison.tokenizers import TokenizerComparison
from mlxq.evaluate.verify import VerificationResult, verify
from mlxq.types import CancelToken, ProgressCallback

Part = Literal["tensors", "tokenizer", "template", "config"]
#: What can be compared, in the order of the report.
PARTS: tuple[Part, ...] = ("tensors", "tokenizer", "template", "config")
#: With a larger share of tensors that have no counterpart of their shape, two models are not one.
_UNLIKE = 0.5


@dataclass(frozen=True)
class Comparison:
    """What two artifacts of one model have in common, and what not. A part that was not compared is None.

    Attributes:
        a, b: as they were named; kind_a, kind_b: `huggingface`, `gguf` or `mlx`.
        architecture: `model_type` of the first.
        unlike: why the two are no artifacts of one model, in one line; then nothing else was compared.
        tolerance: relative RMSE of a tensor that is accepted.
        tensors: every tensor of either side, by mlx-lm's parameter names.
        tokenizer, template, config: see their classes; `config` is empty where all settings agree.
        missing_tokenizer: which side alone has one; empty where both or neither have.
        divergence: of the predictions, where asked for; it decides nothing.
        notes: what was not compared, and what differs without consequence.
        seconds: wall time.
    """

    a: str
    b: str
    kind_a: str
    kind_b: str
    architecture: str
    tolerance: float = 0.0
    unlike: str = ""
    tensors: tuple[TensorComparison, ...] | None = None
    tokenizer: TokenizerComparison | None = None
    template: TemplateComparison | None = None
    config: tuple[ConfigDifference, ...] | None = None
    missing_tokenizer: str = ""
    divergence: VerificationResult | None = None
    notes: tuple[str, ...] = ()
    seconds: float = field(default=0.0, compare=False)

    @property
    def passed(self) -> bool:
        """Whether everything that was compared is the same (tensors: within the tolerance)."""
        return not self.failure

    @property
    def identical(self) -> bool:
        """Like `passed`, with a tolerance of 0."""
        return self.passed and not any(not t.within(0.0) for t in self.tensors or ())

    @property
    def outside(self) -> list[TensorComparison]:
        """Tensors beyond the tolerance: those that only one side has, then other shapes, then the largest error."""
        found = [t for t in self.tensors or () if not t.within(self.tolerance)]
        return sorted(found, key=severity, reverse=True)

    @property
    def failure(self) -> str:
        """What differs, in one line that shows the first of each kind; empty when it passed."""
        texts = [part.failure for part in (self.tokenizer, self.template) if part]
        return self._join([*texts, ", ".join(map(str, self.config or ()))])

    @property
    def summary(self) -> str:
        """What differs, in a short line; empty when it passed."""
        texts = [part.summary for part in (self.tokenizer, self.template) if part]
        keys = ", ".join(d.key for d in self.config or ())
        return self._join([*texts, f"settings differ: {keys}" if keys else ""])

    def _join(self, texts: list[str]) -> str:
        if self.unlike:
            return self.unlike
        found = [tensors_failure(self.outside, len(self.tensors or ())), self.missing_tokenizer, *texts]
        return "; ".join(f for f in found if f)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; numbers that are not finite are null."""
        statuses = Counter(t.status for t in self.tensors or ())
        return {
            "a": self.a,
            "b": self.b,
            "kinds": [self.kind_a, self.kind_b],
            "architecture": self.architecture,
            "passed": self.passed,
            "identical": self.identical,
            "tolerance": self.tolerance,
            "failure": self.failure or None,
            "summary": self.summary or None,
            "unlike": self.unlike or None,
            "tensor_counts": None if self.tensors is None else dict(statuses),
            "tensors": None if self.tensors is None else [t.to_dict() for t in self.tensors],
            "tokenizer": self.tokenizer.to_dict() if self.tokenizer else None,
            "template": self.template.to_dict() if self.template else None,
            "config": None if self.config is None else [d.to_dict() for d in self.config],
            "divergence": self.divergence.to_dict() if self.divergence else None,
            "notes": list(self.notes),
        }


@public
def compare(
    a: str | Path,
    b: str | Path,
    *,
    tolerance: float = 0.0,
    only: Iterable[Part] | None = None,
    logits: bool = False,
    revision_a: str | None = None,
    revision_b: str | None = None,
    progress: ProgressCallback | None = None,
    cancel: CancelToken | None = None,
) -> Comparison:
    """Say whether two artifacts of one model are the same: weights as numbers, token ids, chat template, settings.

    Weights are compared in float32 as their formats define them, so MLX's 4-bit codes and a GGUF's Q4_1 blocks can be
    identical. Memory is bounded by some rows of a tensor.

    Args:
        a, b: a Hugging Face or MLX directory, a `.gguf` file, or a Hub id `org/name`.
        tolerance: relative RMSE of a tensor that is accepted; 0 asks for the same numbers.
        only: what to compare, of `PARTS`; default all.
        logits: also run both over a short text and measure the divergence of their predictions.
        revision_a, revision_b: branch, tag or commit of a Hub id.
        progress: called with stage `compare` (and `download`, and `verify` for `logits`).
        cancel: checked between chunks of rows.

    Returns:
        A result with `passed` False when the two differ. That is no exception.

    Raises:
        CheckpointError: one of them cannot be read.
        UsageError: a tolerance that is negative or not finite, or an unknown part.
        Cancelled: through `cancel`.
    """
    began = time.perf_counter()
    parts = _checked_parts(only)
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise UsageError(f"the tolerance is a relative RMSE of 0 or more, such as 0.001, got {tolerance}")
    cancel = cancel or CancelToken()
    with open_checkpoint(a, revision_a, progress) as first, open_checkpoint(b, revision_b, progress) as second:
        found = _compare(first, second, parts, progress, cancel, logits)
        return Comparison(
            a=str(a),
            b=str(b),
            kind_a=first.kind,
            kind_b=second.kind,
            architecture=str(first.config.get("model_type")),
            tolerance=tolerance,
            seconds=time.perf_counter() - began,
            **found,
        )


def _checked_parts(only: Iterable[Part] | None) -> tuple[Part, ...]:
    if only is None:
        return PARTS
    asked = [only] if isinstance(only, str) else list(only)
    for part in asked:
        if part not in PARTS:
            near = difflib.get_close_matches(str(part), PARTS, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UsageError(f"{part!r} is nothing that is compared{hint}; choose of {', '.join(PARTS)}")
    if not asked:
        raise UsageError(f"nothing is to be compared; choose of {', '.join(PARTS)}")
    return tuple(p for p in PARTS if p in asked)


def _compare(
    a: Checkpoint,
    b: Checkpoint,
    parts: tuple[Part, ...],
    progress: ProgressCallback | None,
    cancel: CancelToken,
    logits: bool,
) -> dict[str, Any]:
    """The fields of a `Comparison` that come from the two checkpoints. What fails soonest comes first."""
    unlike = different_architecture(a, b)
    if unlike:
        return {"unlike": unlike}
    found: dict[str, Any] = {}
    maps = []
    if "tensors" in parts or logits:
        maps = [ParameterMap(c) for c in (a, b)]
        if unlike := _unlike(*maps):
            return {"unlike": unlike}
    notes = [
        f"{len(m.dropped)} tensors of {m.checkpoint.path} are unused by the architecture" for m in maps if m.dropped
    ]
    if "config" in parts:
        found["config"] = compare_configs(a.config, b.config)
    if "tokenizer" in parts or "template" in parts:
        found |= compare_texts(a, b, parts, notes, cancel)
    if "tensors" in parts:
        found["tensors"] = tuple(compare_tensors(*maps, progress, cancel))
    if logits:
        found["divergence"] = verify(maps[0], b.path, always_run=True, progress=progress, cancel=cancel)
    return found | {"notes": tuple(notes)}


def _unlike(a: ParameterMap, b: ParameterMap) -> str:
    """Why two sets of tensors are not those of one model, in one line; empty when they may be."""
    names = list(dict.fromkeys([*a.tensors, *b.tensors]))
    shapes = {n: tuple(m.tensors[n].shape if n in m.tensors else None for m in (a, b)) for n in names}
    wrong = [n for n in names if shapes[n][0] != shapes[n][1]]
    if len(wrong) <= _UNLIKE * len(names):
        return ""
    settings = [d for d in compare_configs(a.checkpoint.config, b.checkpoint.config) if isinstance(d.a, (int, float))]
    because = f"{', '.join(map(str, settings))}; " if settings else ""
    sizes = (" x ".join(map(str, s)) if s else "absent" for s in shapes[wrong[0]])
    return f"not the same model: {because}{len(wrong)} of {len(names)} tensors, such as {wrong[0]}: {' / '.join(sizes)}"
