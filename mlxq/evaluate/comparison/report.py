"""A comparison as a person reads it: one line that says what differs, and tables that fit a terminal."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlxq.evaluate.comparison.tensors import SAME, TensorComparison

if TYPE_CHECKING:
    from mlxq.evaluate.comparison.compare import Comparison

#: Tensors that are listed when they differ.
LISTED = 10
#: Columns of a terminal that leave room for the formats beside each tensor.
_WIDE = 110
_KINDS = {"huggingface": "Hugging Face", "gguf": "GGUF", "mlx": "MLX"}
_STATUSES = {
    "identical": "identical",
    "equal": "same numbers",
    "rounded": "as mx.dequantize rounds",
    "different": "different",
    "shape": "other shape",
    "only_a": "only in A",
    "only_b": "only in B",
}


def severity(t: TensorComparison) -> tuple[int, float]:
    """Sort key: what has no counterpart is worse than another shape, that than an error, NaN than any number."""
    kind = {"only_a": 3, "only_b": 3, "shape": 2}.get(t.status, 0)
    return kind + (kind == 0 and math.isnan(t.rmse)), 0.0 if math.isnan(t.rmse) else t.rmse


def tensors_failure(outside: list[TensorComparison], n: int) -> str:
    """What differs among `n` tensors, given those beyond the tolerance, the worst first; empty when none is."""
    alone = [t for t in outside if t.status in ("only_a", "only_b")]
    shapes = [t for t in outside if t.status == "shape"]
    values = [t for t in outside if t.status == "different"]
    found = []
    if alone:
        side = "A" if alone[0].status == "only_a" else "B"
        found.append(f"{len(alone)} of {n} tensors are on one side only ({side}: {alone[0].name})")
    if shapes:
        sizes = " / ".join(" x ".join(map(str, s or ())) for s in (shapes[0].shape_a, shapes[0].shape_b))
        found.append(f"{len(shapes)} of {n} tensors differ in shape ({shapes[0].name}: {sizes})")
    if values:
        worst = f"{values[0].rmse:.2g}" if math.isfinite(values[0].rmse) else "not finite"
        found.append(f"{len(values)} of {n} tensors differ (relative RMSE up to {worst}, {values[0].name})")
    return "; ".join(found)


def verdict(comparison: Comparison) -> str:
    """The last line of a report."""
    if not comparison.passed:
        return f"different: {comparison.summary}{_accepted(comparison)}"
    compared = [f"{len(comparison.tensors)} tensors"] if comparison.tensors is not None else []
    names = {"tokenizer": "token ids", "template": "chat template", "config": "settings"}
    compared += [text for part, text in names.items() if getattr(comparison, part) is not None]
    if comparison.template is not None and not comparison.template.present_a:
        compared.remove(names["template"])
    listed = " and ".join(filter(None, (", ".join(compared[:-1]), *compared[-1:])))
    if comparison.identical:
        return f"identical: {listed}" if listed else "identical"
    return f"the same within a relative RMSE of {comparison.tolerance:g}: {listed}"


def _accepted(comparison: Comparison) -> str:
    """The tolerance with which it would pass, to two digits, where rounding of weights is all that differs."""
    if not (comparison.tensors and dataclasses.replace(comparison, tensors=()).passed):
        return ""
    errors = [t.rmse if t.status == "different" else math.inf for t in comparison.outside]
    if not math.isfinite(sum(errors)) or max(errors) >= 1:
        return ""
    unit = 10.0 ** (math.floor(math.log10(max(errors))) - 1)
    return f"; --tolerance {math.ceil(max(errors) / unit) * unit:.2g} accepts that"


def print_comparison(comparison: Comparison, console: Any, *, every: bool = False) -> None:
    """Print a report to a `rich.console.Console`.

    Args:
        every: list every tensor instead of the `LISTED` worst.
    """
    _Report(comparison, console).show(every)


class _Report:
    def __init__(self, comparison: Comparison, console: Any):
        self._comparison, self._console = comparison, console

    def _line(self, label: str, text: str, style: str = "") -> None:
        from rich.table import Table
        from rich.text import Text

        # Wrapped at words, and indented, on a terminal; not at all in a file.
        name, body = Text(f"{label:<9}", style="bold"), Text(text, style=style, overflow="fold")
        if self._console.is_terminal:
            line = Table.grid(padding=(0, 2, 0, 0))
            line.add_row(name, body)
            self._console.print(line)
        else:
            self._console.print(Text.assemble(name, "  ", body), soft_wrap=True)

    def show(self, every: bool) -> None:
        c = self._comparison
        self._line("A", f"{c.a} ({_KINDS[c.kind_a]})")
        self._line("B", f"{c.b} ({_KINDS[c.kind_b]})")
        if not c.unlike:
            self._tensors(every)
            self._texts()
        for note in c.notes:
            self._line("Note", note)
        self._line("Verdict", verdict(c), "green" if c.passed else "red")

    def _tensors(self, every: bool) -> None:
        tensors = self._comparison.tensors
        if tensors is None:
            return
        self._console.print()
        self._console.print(_totals(tensors))
        differing = sorted((t for t in tensors if t.status not in SAME), key=severity, reverse=True)
        listed: Sequence[TensorComparison] = tensors if every else differing[:LISTED]
        if listed:
            self._console.print()
            self._console.print(_listing(listed, self._console.width >= _WIDE))
        if len(differing) > LISTED and not every:
            self._console.print(f"and {len(differing) - LISTED} more that differ (--all lists every tensor)")
        self._console.print()

    def _texts(self) -> None:
        c = self._comparison
        if c.missing_tokenizer:
            self._line("Tokenizer", c.missing_tokenizer, "red")
        if c.tokenizer is not None:
            sizes = dict.fromkeys(f"{n:,}" for n in (c.tokenizer.vocabulary_a, c.tokenizer.vocabulary_b))
            how = "the same files" if c.tokenizer.same_files else f"same ids for {c.tokenizer.n_texts:,} texts"
            same = f"{how}, {' / '.join(sizes)} tokens; same special ids"
            self._line("Tokenizer", c.tokenizer.failure or same, "red" if c.tokenizer.failure else "")
        if c.template is not None:
            self._line("Template", c.template.failure or _template(c.template), "red" if c.template.failure else "")
        if c.config is not None:
            self._line("Settings", ", ".join(map(str, c.config)) or "the same", "red" if c.config else "")
        if c.divergence is not None:
            d = c.divergence
            error = f" ± {d.kl_se:.2g}" if d.kl_se is not None else ""
            text = f"KL {d.kl:.3g}{error} nats per token, same first choice for {100 * d.agreement:.1f} %"
            self._line("Logits", f"{text} of {d.n_tokens:,} tokens")


def _template(template: Any) -> str:
    if not template.present_a:
        return "neither has one"
    refused = f", {template.n_refused} of them refused by both" if template.n_refused else ""
    return f"same text for {template.n_probes} renderings{refused}"


def _table(*columns: str) -> Any:
    """A table without lines; columns whose name begins with `<` are aligned to the left, others to the right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        left = name.startswith("<")
        table.add_column(name.lstrip("<"), justify="left" if left else "right", overflow="fold", no_wrap=not left)
    return table


def _totals(tensors: Sequence[TensorComparison]) -> Any:
    """Counts by pair of formats and status, the most weights first."""
    statuses = [s for s in _STATUSES if any(t.status == s for t in tensors)]
    groups: dict[tuple[str | None, str | None], list[TensorComparison]] = {}
    for t in tensors:
        groups.setdefault((t.format_a, t.format_b), []).append(t)
    largest = any(s not in SAME for s in statuses)
    headings = [_STATUSES[s] for s in statuses] + (["relative RMSE"] if largest else [])
    table = _table("<formats (A / B)", "tensors", *headings)
    for (a, b), group in sorted(groups.items(), key=lambda g: -sum(t.size for t in g[1])):
        counts = [str(sum(t.status == s for t in group) or "-") for s in statuses]
        values = [t.rmse for t in group if t.status == "different"]
        worst = (
            [("up to " + _number(max(values)) if not any(map(math.isnan, values)) else "not finite")]
            if values
            else [""]
        )
        table.add_row(f"{a or 'absent'} / {b or 'absent'}", str(len(group)), *counts, *(worst if largest else []))
    return table


def _listing(tensors: Sequence[TensorComparison], wide: bool) -> Any:
    """One line a tensor; the name comes last, since it is longest."""
    table = _table("relative RMSE", "max error", "differ", *(["<formats (A / B)"] if wide else []), "<tensor")
    for t in tensors:
        formats = [f"{t.format_a or 'absent'} / {t.format_b or 'absent'}"] if wide else []
        if t.status == "different":
            numbers = [_number(t.rmse), _number(t.max_error), _share(t)]
        else:
            numbers = [_STATUSES[t.status], "", ""]
        name = t.name
        if t.status == "shape":
            name += f" ({' / '.join(' x '.join(map(str, s or ())) for s in (t.shape_a, t.shape_b))})"
        table.add_row(*numbers, *formats, name)
    return table


def _number(x: float) -> str:
    return f"{x:.3g}" if math.isfinite(x) else "not finite"


def _share(t: TensorComparison) -> str:
    """Weights that differ: their number while few, else their part."""
    share = t.n_different / t.size
    return f"{t.n_different:,}" if share < 0.001 else f"{100 * share:.1f} %"
