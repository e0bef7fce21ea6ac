"""The views of a measurement as HTML and SVG text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from sparing.compare.measurement.views import LineView, MapView, ScatterView, TextView, shown, ticks

DARK = 0.55  # share of full colour above which text turns light
NOTHING = 0.005  # share of full colour that a cell calls 0; its label has the number
NUMBERED = 16  # columns up to which the numbers are written into the cells
LEFT, TOP = 52.0, 20.0


@dataclass(frozen=True)
class Frame:
    """The plot area in pixels, and the range of both axes."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    width: float = 520.0
    height: float = 290.0
    right: float = 16.0
    bottom: float = 42.0

    def x(self, value: float) -> float:
        """Pixels from the left."""
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (self.width - LEFT - self.right)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        low, high = self.y_range
        return self.height - self.bottom - (value - low) / (high - low) * (self.height - TOP - self.bottom)


def map_svg(view: MapView) -> str:
    """A matrix in colours around 0, in a box that scrolls if it is wide; arrow keys walk its cells."""
    rows, columns = view.values.shape
    numbered = columns <= NUMBERED
    wide, high = (46.0, 26.0) if numbered else (18.0, 18.0) if columns <= 80 else (11.0, 18.0)
    left = 12 + 6.4 * max(map(len, [view.row_name, *view.rows]))
    is_text = any(not label.isdigit() for label in view.columns)
    head = 14 + 6.2 * min(14, max(map(len, view.columns))) if is_text else 22.0
    width, height = left + columns * wide + 8, head + rows * high + 24
    cells = "".join(
        _cell(view, row, column, left + column * wide, head + row * high, wide, high, numbered)
        for row in range(rows) for column in range(columns)
    )  # fmt: skip
    rows_text = "".join(
        f'<text class="ty" x="{left - 7:.1f}" y="{head + (row + 0.5) * high + 4:.1f}">{escape(label)}</text>'
        for row, label in enumerate(view.rows)
    )
    return (
        f'<div class="scroll"><svg class="chart map" role="group" aria-label="{escape(view.title)}" '
        f'data-columns="{columns}" viewBox="0 0 {width:.0f} {height:.0f}" style="width:{width:.0f}px">'
        f"{_hatch()}{rows_text}{_column_labels(view, left, head, wide, is_text)}"
        f'<text class="ty" x="{left - 7:.1f}" y="{head - 6:.1f}">{escape(view.row_name)}</text>'
        f'<text class="name" x="{left + columns * wide / 2:.1f}" y="{height - 6:.1f}">{escape(view.column_name)}</text>'
        f'<g class="m">{cells}</g></svg></div>{_ramp(view)}'
    )


def lines_svg(view: LineView) -> str:
    """Curves with their bands, and their names at the right end."""
    xs = [x for line in view.lines for x in line.x]
    ys = [y for line in view.lines for y in (*line.y, *line.low, *line.high) if not math.isnan(y)]
    frame = Frame(_spread(min(xs), max(xs)), view.range or _spread(min([0.0, *ys]), max([0.0, *ys])))
    level = ""
    if view.level is not None:
        y = frame.y(view.level[0])
        level = (
            f'<path class="full" d="M{LEFT} {y:.1f}H{frame.width - frame.right}"/><text class="fullname" '
            f'x="{frame.width - frame.right}" y="{y - 5:.1f}">{escape(view.level[1])} {_short(view.level[0])}</text>'
        )
    legend = ""
    if len(view.lines) > 1:
        keys = "".join(f'<span class="c{at}"><i class="dot"></i>{escape(line.name)}</span>'
                       for at, line in enumerate(view.lines))  # fmt: skip
        legend = f'<p class="keys">{keys}</p>'
    drawn = "".join(_line(frame, view, at) for at in range(len(view.lines)))
    return f"{_plot(frame, view.title, view.x_name, view.y_name, level + drawn)}{legend}"


def scatter_svg(view: ScatterView) -> str:
    """A dot per unit, both axes from the smallest to the largest value."""
    xs, ys = [x for x, _, _ in view.points], [y for _, y, _ in view.points]
    frame = Frame(_spread(min(xs), max(xs)), _spread(min(ys), max(ys)), width=420.0, height=380.0)
    dots = "".join(
        f'<circle class="p dot" r="4" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" tabindex="{0 if at == 0 else -1}" '
        f'role="img" aria-label="{escape(f"{name}: {_short(y)} against {_short(x)}")}"/>'
        for at, (x, y, name) in enumerate(view.points)
    )
    plot = _plot(frame, view.title, view.x_name, view.y_name, f'<g class="m c0">{dots}</g>')
    return f'<div class="narrow">{plot}</div><p class="caption">{escape(view.words)}</p>'


def text_html(view: TextView) -> str:
    """The text, every token behind its value's colour."""
    bound = max((abs(v) for v in view.values if not math.isnan(v)), default=1.0) or 1.0
    parts = []
    for at, (token, value) in enumerate(zip(view.tokens, view.values, strict=True)):
        text = escape(shown(token).replace("⏎", "⏎\n"))
        if math.isnan(value):
            parts.append(f'<i class="no" data-say="{at}: no value">{text}</i>')
            continue
        depth = abs(value) / bound
        kind = f"{'cold ' if value < 0 else ''}{'hi' if depth > DARK else ''}".strip()
        parts.append(f'<i class="{kind}" style="--v:{depth:.0%}" data-say="{at}: {_short(value)}">{text}</i>')
    return (
        f'<div class="tokens" tabindex="0" role="region" aria-label="{escape(view.title)}">{"".join(parts)}</div>'
        f'<p class="ramp"><span>0</span><i aria-hidden="true"></i><span>{_short(bound)}</span></p>'
    )


def _cell(view: MapView, row: int, column: int, x: float, y: float, wide: float, high: float, numbered: bool) -> str:
    value = float(view.values[row, column])
    name = f"{view.row_name} {view.rows[row]}" + (
        f", {view.column_name} {column}" + (f" “{view.columns[column]}”" if view.columns[column] != str(column) else "")
        if view.column_name else "")  # fmt: skip
    missing = math.isnan(value)
    error = f" ± {_short(float(view.errors[row, column]))}" if view.errors is not None and not missing else ""
    said = escape(f"{name}: {'no value' if missing else _short(value)}{error}")
    depth = 0.0 if missing else abs(value) / view.bound
    fill = 'fill="url(#none)"' if missing else f'fill-opacity="{depth:.3f}"'
    sign = "none" if missing else "cold" if value < 0 else "warm"
    text = ""
    if numbered and not missing:
        shade = " hi" if depth > DARK else ""
        number = _short(value) if depth > NOTHING else "0"
        text = f'<text class="v{shade}" x="{x + wide / 2:.1f}" y="{y + high / 2 + 4:.1f}">{number}</text>'
    first = 0 if row == column == 0 else -1
    return (
        f'<g class="p" tabindex="{first}" role="img" aria-label="{said}"><rect class="{sign}" x="{x + 0.5:.1f}" '
        f'y="{y + 0.5:.1f}" width="{wide - 1:.1f}" height="{high - 1:.1f}" {fill}/>{text}</g>'
    )


def _column_labels(view: MapView, left: float, head: float, wide: float, is_text: bool) -> str:
    if not view.column_name:
        return ""
    if is_text:
        places = [f"translate({left + (at + 0.5) * wide + 4:.1f} {head - 5:.1f})" for at in range(len(view.columns))]
        return "".join(
            f'<text class="turned" transform="{place} rotate(-90)">{escape(label[:14])}</text>'
            for place, label in zip(places, view.columns, strict=True)
        )
    every = 1 if wide >= 18 and len(view.columns) <= 40 else 4
    return "".join(
        f'<text class="tx" x="{left + (at + 0.5) * wide:.1f}" y="{head - 6:.1f}">{escape(label)}</text>'
        for at, label in enumerate(view.columns) if at % every == 0
    )  # fmt: skip


def _ramp(view: MapView) -> str:
    """The scale: from the most negative colour, if there is any, through none at 0."""
    low = f'<span>{_short(-view.bound)}</span><i class="cold" aria-hidden="true"></i>'
    has_negative = bool((view.values < 0).any())
    return (
        f'<p class="ramp">{low if has_negative else ""}<span>0</span><i aria-hidden="true"></i>'
        f"<span>{_short(view.bound)}</span></p>"
    )


def _hatch() -> str:
    return (
        '<defs><pattern id="none" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<path d="M0 0V6" class="hatch"/></pattern></defs>'
    )


def _plot(frame: Frame, title: str, x_name: str, y_name: str, body: str) -> str:
    right, base = frame.width - frame.right, frame.height - frame.bottom
    parts = []
    for value in ticks(*frame.y_range):
        y = frame.y(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>'
                     f'<text class="ty" x="{LEFT - 7}" y="{y + 4:.1f}">{_short(value)}</text>')  # fmt: skip
    for value in ticks(*frame.x_range):
        x = frame.x(value)
        parts.append(f'<path class="mark" d="M{x:.1f} {base}v4"/>'
                     f'<text class="tx" x="{x:.1f}" y="{base + 16}">{_short(value)}</text>')  # fmt: skip
    parts.append(f'<text class="name" x="{(LEFT + right) / 2:.1f}" y="{frame.height - 6}">{escape(x_name)}</text>')
    parts.append(f'<text class="yname" x="{LEFT - 7}" y="{TOP - 8}">{escape(y_name)}</text>')
    return (
        f'<svg class="chart" role="group" viewBox="0 0 {frame.width:.0f} {frame.height:.0f}" '
        f'aria-label="{escape(title)}">{"".join(parts)}{body}</svg>'
    )


def _line(frame: Frame, view: LineView, at: int) -> str:
    """One curve: its band, the pieces between missing values, and its points if they are to be walked."""
    line = view.lines[at]
    parts = [f'<g class="m c{at}">']
    if line.low:
        upper = [f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in zip(line.x, line.high, strict=True)]
        lower = [f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in zip(line.x, line.low, strict=True)]
        parts.append(f'<path class="band" d="M{"L".join([*upper, *reversed(lower)])}Z"/>')
    parts += [f'<path class="line" d="M{piece}"/>' for piece in _pieces(frame, line.x, line.y)]
    if line.points:
        for number, (x, y) in enumerate(zip(line.x, line.y, strict=True)):
            band = f" ({_short(line.low[number])} to {_short(line.high[number])})" if line.low else ""
            said = escape(f"{line.name}, {view.x_name} {_short(x)}: {_short(y)}{band}")
            stop = 0 if at == number == 0 else -1
            parts.append(f'<circle class="p dot" r="3.6" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" '
                         f'tabindex="{stop}" role="img" aria-label="{said}"/>')  # fmt: skip
    return "".join(parts) + "</g>"


def _pieces(frame: Frame, x: Sequence[float], y: Sequence[float]) -> list[str]:
    pieces: list[list[str]] = [[]]
    for at, value in zip(x, y, strict=True):
        if math.isnan(value):
            pieces.append([])
        else:
            pieces[-1].append(f"{frame.x(at):.1f} {frame.y(value):.1f}")
    return ["L".join(piece) for piece in pieces if len(piece) > 1]


def _spread(low: float, high: float) -> tuple[float, float]:
    """A range with some air above, that is never empty."""
    return (low, high + 0.05 * (high - low)) if high > low else (low - 0.5, low + 0.5)


def _short(value: float) -> str:
    """Two digits below 1, three above, no needless zeros, a real minus sign."""
    text = f"{value:.2g}" if abs(value) < 1 else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return text.replace("e-0", "e-").replace("-", "−")
