"""Charts as inline SVG: text and numbers in, a string out. Colours are the page's CSS variables (`page.css`).

All text goes through `html.escape`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

#: Colours that `page.css` defines, `--c0` and so on.
N_COLOURS = 8
_WIDTH, _HEIGHT = 760, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 16, 48
#: Height of a label, and the width of a character in it, in pixels.
_LINE, _CHARACTER = 16, 7.0
#: Names that stand in a chart: so many, of so many characters.
_NAMED, _LONGEST_NAME = 8, 28


@dataclass(frozen=True)
class Point:
    """One model in the chart of divergence against size: megabytes, mean KL and its standard error in nats.

    `mark` is what stands beside the point: the name, or where names are too long its number in the legend.
    """

    name: str
    mark: str
    x: float
    y: float
    se: float | None


@dataclass(frozen=True)
class _Axis:
    """A scale from numbers to pixels, linear or logarithmic, with its ticks."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def divergence_chart(points: Sequence[Point]) -> str:
    """Mean KL (logarithmic) against size, with error bars of one standard error. A divergence of 0, which has no place
    on the scale, stands on its lower edge."""
    shown = [p.y for p in points if p.y > 0 and math.isfinite(p.y)]
    if not shown:
        return '<p class="muted">Nothing to draw: no model diverges measurably.</p>'
    x = _linear([p.x for p in points], _LEFT, _WIDTH - _RIGHT, room=0.12)
    y = _logarithmic(shown, _HEIGHT - _BOTTOM, _TOP)
    parts = [_frame(x, y, "size, MB", "mean KL, nats per token")]
    places = []
    for i, p in enumerate(points):
        value = min(max(p.y, y.low), y.high) if math.isfinite(p.y) else y.high
        px, py = x(p.x), y(value)
        colour = f"var(--c{i % N_COLOURS})"
        if p.se and p.y > 0 and math.isfinite(p.y):
            top, bottom = y(min(p.y + p.se, y.high)), y(max(p.y - p.se, y.low))
            parts.append(f'<path d="M{px:.1f} {top:.1f}V{bottom:.1f}" stroke="{colour}" stroke-width="1.5"/>')
        title = f"{p.name}: {p.x:,.1f} MB, KL {p.y:.4g}" + (f" ± {p.se:.2g}" if p.se else "")
        parts.append(
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5" fill="{colour}"><title>{escape(title)}</title></circle>'
        )
        places.append((px, py, p.mark))
    parts += _labels(places)
    return _svg(parts, "Divergence against size")


def block_chart(lines: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Relative error of the hidden states after each block, a line a model."""
    values = [v for _, line in lines for v in line if math.isfinite(v)]
    n = max((len(line) for _, line in lines), default=0)
    if n < 2 or not values:
        return '<p class="muted">Nothing to draw: the blocks were not compared.</p>'
    x = _linear([1, n], _LEFT, _WIDTH - _RIGHT, room=0.0, whole=True)
    y = _linear([0, max([*values, 1e-6])], _HEIGHT - _BOTTOM, _TOP, room=0.0)
    parts = [_frame(x, y, "block", "relative error of hidden states")]
    for i, (name, line) in enumerate(lines):
        pairs = [(x(j + 1), y(v)) for j, v in enumerate(line) if math.isfinite(v)]
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in pairs)
        dash = ' stroke-dasharray="6 4"' if i >= N_COLOURS else ""
        parts.append(
            f'<path d="{path}" fill="none" stroke="var(--c{i % N_COLOURS})" stroke-width="2"{dash}>'
            f"<title>{escape(name)}</title></path>"
        )
    return _svg(parts, "Error of each block")


def marks(names: Sequence[str]) -> list[str]:
    """What stands for each name in a chart: itself, or its number where the names would not fit."""
    if len(names) <= _NAMED and max(map(len, names), default=0) <= _LONGEST_NAME:
        return list(names)
    return [str(i + 1) for i in range(len(names))]


def legend(names: Sequence[str]) -> str:
    """Names with the colours and numbers that the charts give them, in their order."""
    numbers = [f"{m} " if m != name else "" for m, name in zip(marks(names), names, strict=True)]
    items = (
        f'<li><span class="dot" style="background:var(--c{i % N_COLOURS})"></span>{number}{escape(name)}</li>'
        for i, (number, name) in enumerate(zip(numbers, names, strict=True))
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _svg(parts: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}"'
        f' xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def _frame(x: _Axis, y: _Axis, x_name: str, y_name: str) -> str:
    """Grid, ticks and names of the axes."""
    parts = []
    for tick in x.ticks:
        parts.append(f'<text x="{x(tick):.1f}" y="{y.start + 18:.1f}" text-anchor="middle">{_number(tick)}</text>')
    for tick in y.ticks:
        at = y(tick)
        parts.append(f'<path class="grid" d="M{x.start} {at:.1f}H{x.end}"/>')
        parts.append(f'<text x="{x.start - 8}" y="{at + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    parts.append(f'<path class="axis" d="M{x.start} {y.start}H{x.end}"/>')
    middle = (x.start + x.end) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_name)}</text>')
    height = (y.start + y.end) / 2
    parts.append(f'<text transform="translate(14 {height}) rotate(-90)" text-anchor="middle">{escape(y_name)}</text>')
    return "".join(parts)


def _labels(places: Sequence[tuple[float, float, str]]) -> list[str]:
    """Names beside their points, moved down where they would stand on each other."""
    parts = []
    taken: list[tuple[float, float, float]] = []
    for px, py, name in sorted(places, key=lambda p: p[1]):
        width = len(name) * _CHARACTER
        left = px + 10 + width > _WIDTH - 4
        begin = px - 10 - width if left else px + 10
        at = py + 4
        while any(abs(at - t) < _LINE and begin < b and a < begin + width for a, b, t in taken):
            at += _LINE / 4
        taken.append((begin, begin + width, at))
        anchor, x = ("end", px - 10) if left else ("start", px + 10)
        parts.append(f'<text class="name" x="{x:.1f}" y="{at:.1f}" text-anchor="{anchor}">{escape(name)}</text>')
    return parts


def _linear(values: Sequence[float], start: float, end: float, *, room: float, whole: bool = False) -> _Axis:
    """An axis over `values`, `room` of their range added at both ends (not below 0)."""
    low, high = min(values), max(values)
    spread = (high - low) or abs(high) or 1.0
    low, high = max(low - room * spread, 0.0) if low >= 0 else low - room * spread, high + room * spread
    if high <= low:
        high = low + 1.0
    step = _step((high - low) / 6)
    if whole:
        step = max(1.0, float(round(step)))
    first = math.ceil(low / step - 1e-9)
    ticks = tuple(i * step for i in range(first, math.floor(high / step + 1e-9) + 1))
    return _Axis(low, high, start, end, ticks)


def _logarithmic(values: Sequence[float], start: float, end: float) -> _Axis:
    """An axis over positive `values`, with ticks at 1, 2 and 5 times powers of ten."""
    low, high = min(values) / 1.6, max(values) * 1.6
    # A decade at least, so that there are ticks to read a value by.
    room = max(math.sqrt(10 * low / high), 1.0)
    low, high = low / room, high * room
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 3 else (1,)
    ticks = tuple(f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high)
    return _Axis(low, high, start, end, ticks, log=True)


def _step(rough: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(f * power for f in (1, 2, 5, 10) if f * power >= rough * (1 - 1e-9))


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"
