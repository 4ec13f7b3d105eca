"""Results of the proof and of an inspection as lines of plain text."""

from __future__ import annotations

import math

from mlxq.evaluate.inspect import Inspection
from mlxq.evaluate.verify import VerificationResult


def render(result: VerificationResult) -> str:
    """What the proof measured, with the yardstick beside each number."""
    if result.n_identical:
        return (
            f"Proof: each of {result.n_identical:,} weights is the source's own number, so both models are one"
            f" ({'passed' if result.passed else 'FAILED'}, {result.seconds:.1f} s)"
        )
    error = f" ± {result.kl_se:.2g}" if result.kl_se is not None else ""
    bounded = math.isfinite(result.kl_bound)
    limit = f"at most {result.kl_bound:.2g} is accepted" if bounded else "without bound"
    before, after = result.perplexity_source, result.perplexity_result
    lines = [
        f"Proof over {result.n_tokens:,} tokens of {result.n_sequences} texts, source against result"
        f" ({'passed' if result.passed else 'FAILED'}):",
        f"  KL divergence    {result.kl:.4g}{error} nats per token ({limit})",
        f"  top-1 agreement  {100 * result.agreement:.1f} %",
        f"  perplexity       {_perplexity(before)} -> {_perplexity(after)} ({_change(before, after)})",
        f"  took {result.seconds:.1f} s, peak memory {result.peak_memory / 1e6:,.0f} MB",
    ]
    lines += [f"  note: {note}" for note in result.notes]
    if result.failure:
        lines.append(f"  {result.failure}")
    return "\n".join(lines)


def render_inspection(inspection: Inspection, *, tensors: bool = True) -> str:
    """An inspection: totals by format, memory, and (unless `tensors` is False) one line a tensor."""
    lines = []
    if tensors:
        width = max((len(t.name) for t in inspection.tensors), default=0)
        for t in inspection.tensors:
            shape = " x ".join(map(str, t.shape))
            lines.append(f"{t.name:<{width}}  {shape:>16}  {t.format:<34} {t.bpw:>7.3f} bpw  {t.nbytes:>14,} bytes")
        lines.append("")
    lines += [
        f"{inspection.source}: {inspection.architecture} ({inspection.kind}),"
        f" {inspection.n_weights / 1e6:,.1f}M weights",
        *(
            f"  {f.format:<34} {f.n_tensors:>5} tensors  {f.n_weights / 1e6:>10,.1f}M weights  {f.nbytes:>15,} bytes"
            for f in inspection.formats
        ),
        f"  {inspection.bpw:.3f} bits per weight over all, {_bpw(inspection.quantized_bpw)} over quantized tensors,"
        " scales and biases counted",
        f"  memory to run at {inspection.memory.context:,} tokens: {inspection.memory}",
    ]
    return "\n".join(lines)


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1e4 else f"{value:.3g}"


def _change(before: float, after: float) -> str:
    if not (math.isfinite(before) and math.isfinite(after)):
        return "not finite"
    return f"{100 * (after / before - 1):+.1f} %" if after < 10 * before else f"{after / before:.3g} times"


def _bpw(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
