"""An evaluation as one HTML page that needs nothing else: charts, a table, and the places where predictions changed.

Texts of a tokenizer may hold anything, tags too. In the markup all text is escaped; the flips are JSON with `<` written
as an escape, and the page's script puts them in as text, never as markup. The page also forbids itself to load
anything (Content-Security-Policy).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path

import mlxq
from mlxq.errors import OutputError
from mlxq.evaluate.quality.chart import Point, block_chart, divergence_chart, legend, marks
from mlxq.evaluate.quality.results import Evaluation, ModelQuality
from mlxq.evaluate.quality.statistics import Estimate
from mlxq.evaluate.quality.table import estimate, heading, percent, short_names
from mlxq.writers.files import sync, writing

_ENDINGS = (".html", ".htm")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def check_place(path: str | Path) -> Path:
    """Where a page can be written, before anything is measured.

    Raises:
        OutputError: not the name of a page, a directory, or no directory to write it into.
    """
    place = Path(path).expanduser()
    if place.suffix.lower() not in _ENDINGS:
        raise OutputError(f"{place}: a report is an HTML page; give it a name that ends in .html")
    if place.is_dir():
        raise OutputError(f"{place} is a directory; name a file in it")
    if not place.absolute().parent.is_dir():
        raise OutputError(f"{place}: there is no directory {place.absolute().parent}; make it first")
    if not os.access(place.absolute().parent, os.W_OK):
        raise OutputError(f"{place}: the directory {place.absolute().parent} is not writable; choose another place")
    return place


def write_page(evaluation: Evaluation, path: str | Path) -> None:
    """Write the page, whole or not at all; one that was there is replaced.

    Raises:
        OutputError: it cannot be written.
    """
    place = check_place(path)
    content = page(evaluation).encode("utf-8", "replace")
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    with writing(place):
        try:
            temporary.write_bytes(content)
            sync(temporary)
            temporary.replace(place)
        finally:
            temporary.unlink(missing_ok=True)


def page(evaluation: Evaluation) -> str:
    """The page's text."""
    names = short_names([m.model for m in evaluation.models])
    sections = [
        f"<header><h1>{escape(_title(evaluation))}</h1><p>{escape(heading(evaluation))}</p></header>",
        _table(evaluation, names),
    ]
    if evaluation.reference is not None:
        sections += [_charts(evaluation, names), _explorer()]
    sections += [_notes(evaluation), f"<footer>mlxq {escape(mlxq.__version__)}</footer>"]
    style, script = (_resource(name) for name in ("page.css", "page.js"))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(_title(evaluation))}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + f'\n</main>\n<script type="application/json" id="data">{_data(evaluation, names)}</script>\n'
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _title(evaluation: Evaluation) -> str:
    if evaluation.reference is None:
        return "Models measured on a text"
    return f"Divergence from {Path(evaluation.reference.model).name}"


def _table(evaluation: Evaluation, names: Sequence[str]) -> str:
    against = evaluation.reference is not None
    columns = ["model", "MB", "bpw", "perplexity"]
    if against:
        columns += ["KL, mean", "KL, median", "KL, 99 %", "top-1 agreement", "flips"]
    rows = [_row(m, name, against) for m, name in zip(evaluation.models, names, strict=True)]
    if evaluation.reference is not None:
        rows.insert(0, _row(evaluation.reference, f"{Path(evaluation.reference.model).name} (reference)", against))
    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    caption = (
        "Divergence is KL(reference || model) in nats per token; ± is one standard error, with the sequences as the"
        " sample."
        if against
        else "± is one standard error, with the sequences as the sample."
    )
    return (
        f'<section><h2>Results</h2><div class="scroll"><table class="results"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div><p class='muted'>{caption}</p></section>"
    )


def _row(m: ModelQuality, name: str, against: bool) -> str:
    def cell(e: Estimate | None) -> str:
        return "" if e is None else estimate(e)

    cells = [f"{m.nbytes / 1e6:,.1f}", f"{m.bpw:.3f}", cell(m.perplexity)]
    if against:
        cells += [cell(m.kl_mean), cell(m.kl_median), cell(m.kl_p99)]
        cells += ["", ""] if m.agreement is None else [percent(m.agreement), f"{m.n_flips:,}"]
    values = "".join(f"<td>{escape(c)}</td>" for c in cells)
    return f'<tr><th scope="row" title="{escape(m.model)}">{escape(name)}</th>{values}</tr>'


def _charts(evaluation: Evaluation, names: Sequence[str]) -> str:
    models = list(zip(evaluation.models, names, strict=True))
    shown = marks(names)
    points = [
        Point(name, mark, m.nbytes / 1e6, m.kl_mean.value, m.kl_mean.se)
        for (m, name), mark in zip(models, shown, strict=True)
    ]
    lines = [(name, m.block_errors or ()) for m, name in models]
    return (
        f"<section><h2>Divergence against size</h2>"
        f"{'' if shown == list(names) else legend(names)}{divergence_chart(points)}</section>"
        f"<section><h2>Error of each block</h2>{legend(names)}{block_chart(lines)}"
        "<p class='muted'>How far the hidden states after each block are from the reference's, relative to these:"
        " |h − h<sub>ref</sub>| / |h<sub>ref</sub>| over a sample of tokens.</p></section>"
    )


def _explorer() -> str:
    """The frame that the script fills."""
    return """<section id="explorer"><h2>Where predictions changed</h2>
<noscript><p>The list needs JavaScript, of this page alone.</p></noscript>
<form class="controls">
<label>Model <select id="model"></select></label>
<label>Text contains <input id="query" type="search"></label>
<label>KL at least <input id="least" type="number" min="0" step="0.1" value="0"></label>
<label>Order <select id="order"><option value="kl">largest divergence</option><option value="kl-up">smallest
divergence</option><option value="position">place in the text</option><option value="p_reference">surest
reference</option><option value="p_model">surest model</option></select></label>
</form>
<p id="count" class="muted" aria-live="polite"></p>
<div class="scroll"><table class="flips"><thead><tr><th>KL</th><th>text, the token to predict marked</th>
<th>reference's choice</th><th>model's choice</th></tr></thead><tbody id="flips"></tbody></table></div>
<p><button id="more" type="button">Show more</button></p>
<p class="muted">A choice is the token that is most probable; beside it its probability under the reference, and under
the model.</p></section>"""


def _notes(evaluation: Evaluation) -> str:
    notes = [*evaluation.notes, *(f"{m.model}: {note}" for m in evaluation.models for note in m.notes)]
    items = "".join(f"<li>{escape(n)}</li>" for n in notes)
    return f"<section><h2>Notes</h2><ul>{items}</ul></section>" if items else ""


def _data(evaluation: Evaluation, names: Sequence[str]) -> str:
    """The flips, as JSON that cannot end the element it stands in."""
    models = [
        {"name": name, "n_flips": m.n_flips, "flips": [f.to_dict() for f in m.flips]}
        for m, name in zip(evaluation.models, names, strict=True)
    ]
    return json.dumps(models, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e")


def _resource(name: str) -> str:
    return resources.files("mlxq.evaluate.quality").joinpath(name).read_text(encoding="utf-8")
