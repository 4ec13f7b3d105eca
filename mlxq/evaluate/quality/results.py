"""What measuring models gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mlxq.evaluate.quality.statistics import Estimate, rounded


@dataclass(frozen=True)
class Candidate:
    """A token that one of two models puts first: its text, and its probability under the reference and the model."""

    token: str
    p_reference: float
    p_model: float

    def to_dict(self) -> dict[str, Any]:
        return {"token": self.token, "p_reference": rounded(self.p_reference), "p_model": rounded(self.p_model)}


@dataclass(frozen=True)
class Flip:
    """A place of the text where the model's most probable next token is not the reference's.

    Attributes:
        sequence, position: where, counted from 1; `position` is of the token that is predicted.
        kl: KL(reference || model) there, in nats.
        before, after: text around the token that is predicted; `target` is that token as the text has it.
        reference, model: what each puts first.
    """

    sequence: int
    position: int
    kl: float
    before: str
    target: str
    after: str
    reference: Candidate
    model: Candidate

    def to_dict(self) -> dict[str, Any]:
        return {
            "sequence": self.sequence,
            "position": self.position,
            "kl": rounded(self.kl),
            "before": self.before,
            "target": self.target,
            "after": self.after,
            "reference": self.reference.to_dict(),
            "model": self.model.to_dict(),
        }


@dataclass(frozen=True)
class ModelQuality:
    """One model on the text; every estimate has its standard error, clustered by sequence.

    Attributes:
        model: as it was named; `kind` is `huggingface`, `mlx` or `gguf`.
        nbytes, bpw: of its tensors, and bits per weight over all of them, scales and biases counted.
        perplexity: of the scored tokens.
        kl_mean, kl_median, kl_p99: of KL(reference || model) over the scored tokens, nats; None without a reference.
        agreement: share of tokens for which both put the same token first; None without a reference.
        block_errors: relative error of the hidden states after each block, `|h - h_ref| / |h_ref|` over a sample of
            tokens; None without a reference, or where blocks do not correspond.
        n_flips, flips: how many tokens' predictions changed, and those with the largest divergence.
        notes: what was done otherwise than described.
        seconds, peak_memory: time taken for it, and the process's largest memory so far in bytes.
    """

    model: str
    kind: str
    nbytes: int
    bpw: float
    perplexity: Estimate
    kl_mean: Estimate | None = None
    kl_median: Estimate | None = None
    kl_p99: Estimate | None = None
    agreement: Estimate | None = None
    block_errors: tuple[float, ...] | None = None
    n_flips: int = 0
    flips: tuple[Flip, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = field(default=0.0, compare=False)
    peak_memory: int = field(default=0, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; without the flips themselves. Numbers that are not finite are null."""

        def estimate(e: Estimate | None) -> dict[str, Any] | None:
            return None if e is None else e.to_dict()

        return {
            "model": self.model,
            "kind": self.kind,
            "bytes": self.nbytes,
            "bpw": round(self.bpw, 4),
            "perplexity": estimate(self.perplexity),
            "kl_mean": estimate(self.kl_mean),
            "kl_median": estimate(self.kl_median),
            "kl_p99": estimate(self.kl_p99),
            "top1_agreement": estimate(self.agreement),
            "flips": None if self.agreement is None else self.n_flips,
            "block_errors": None if self.block_errors is None else [rounded(e) for e in self.block_errors],
            "notes": list(self.notes),
            "seconds": round(self.seconds, 2),
            "peak_memory_bytes": self.peak_memory,
        }


@dataclass(frozen=True)
class Evaluation:
    """Some models measured on one text.

    Attributes:
        text: its name; `score` says which tokens of a sequence count.
        n_sequences, n_tokens: sequences, and tokens that were scored.
        length: tokens of the longest sequence.
        reference: the reference, or None.
        models: in the order they were named.
        cached: the reference's predictions came from disk.
        notes: about the text and the reference.
    """

    text: str
    score: str
    n_sequences: int
    n_tokens: int
    length: int
    reference: ModelQuality | None
    models: tuple[ModelQuality, ...]
    cached: bool = field(default=False, compare=False)
    notes: tuple[str, ...] = ()
    seconds: float = field(default=0.0, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "text": self.text,
            "score": self.score,
            "sequences": self.n_sequences,
            "tokens": self.n_tokens,
            "length": self.length,
            "reference": None if self.reference is None else self.reference.to_dict(),
            "reference_from_cache": self.cached,
            "models": [m.to_dict() for m in self.models],
            "notes": list(self.notes),
            "seconds": round(self.seconds, 2),
        }
