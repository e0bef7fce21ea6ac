"""The charts, as SVG text: score against bytes kept, one curve per method, and the small interval bars.

The horizontal axis is logarithmic, since budgets are (10 %, 25 %, 50 %). Points of one budget are moved
apart by a few pixels so that their intervals don't hide each other. A method has a colour, a marker and
a dash pattern; any one of them is enough to find it in the legend.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from sparing.compare.report import words
from sparing.compare.report.summary import PERPLEXITY, Cell, Entry, Estimate, Section

COLOURS = 8
MARKERS = (
    '<circle r="4"/>',
    '<path d="M-3.7-3.7h7.4v7.4h-7.4z"/>',
    '<path d="M0-5 4.6 3.4h-9.2z"/>',
    '<path d="M0-5.2 4.4 0 0 5.2-4.4 0z"/>',
    '<path d="M0 5 4.6-3.4h-9.2z"/>',
    '<path d="M-1.5-4.6h3v3.1h3.1v3h-3.1v3.1h-3v-3.1h-3.1v-3h3.1z"/>',
    '<path d="M0-5.2 1.5-1.7 5-1.6 2.3.8 3.2 4.3 0 2.3-3.2 4.3-2.3.8-5-1.6-1.5-1.7z"/>',
)
DASHES = ("", "6 3", "2 3")
SHARE_TICKS = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
DIRECT_LABELS = 8
LABEL_HEIGHT = 14.0
LONGEST_LABEL = 24


@dataclass(frozen=True)
class Curve:
    """One method's points: (share of bytes, estimate, what to read aloud)."""

    index: int
    name: str
    points: list[tuple[float, Estimate, str]]


@dataclass(frozen=True)
class Frame:
    """The plot area in pixels and the range of both axes."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    least: float
    most: float

    def x(self, share: float) -> float:
        """Pixels from the left, for a share of the bytes or of the attention (logarithmic)."""
        span = math.log(1 / self.least)
        place = math.log(max(share, self.least) / self.least) / span
        return self.left + place * (self.width - self.left - self.right)

    def y(self, score: float) -> float:
        """Pixels from the top, for a score."""
        place = min(max(score / self.most, 0.0), 1.0)
        return self.height - self.bottom - place * (self.height - self.top - self.bottom)


def marker_defs() -> str:
    """The marker shapes, once per page; charts refer to them."""
    shapes = "".join(f'<g id="m{number}">{shape}</g>' for number, shape in enumerate(MARKERS))
    hatch = (
        '<pattern id="hatch" width="7" height="7" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)">'
        '<path d="M0 0V7" class="hatch"/></pattern>'
    )
    return f'<svg class="defs" width="0" height="0" aria-hidden="true"><defs>{shapes}{hatch}</defs></svg>'


def key(index: int) -> str:
    """The piece of curve with its marker that stands for a method in legends and tables."""
    return (
        f'<svg class="key c{index % COLOURS}" viewBox="0 0 26 12" width="26" height="12" aria-hidden="true">'
        f'<path class="line" {_dash(index)}d="M1 6H25"/>'
        f'<use href="#m{index % len(MARKERS)}" x="13" y="6"/></svg>'
    )


def overview(section: Section, order: Sequence[str], kind: str) -> str:
    """The large chart of a section: `kind` is "average" or "worst"."""
    curves = []
    for name in sorted(section.methods, key=order.index):
        points = []
        for entry in section.of(name):
            estimate = entry.average if kind == "average" else entry.worst[1].estimate if entry.worst else None
            if estimate is None or entry.share is None:
                continue
            task = f" on {entry.worst[0].label}" if kind == "worst" and entry.worst else ""
            points.append((_spent(entry, entry.share), estimate, _spoken(entry, estimate, entry.share, task)))
        curves.append(Curve(order.index(name), name, sorted(points, key=lambda point: point[0])))
    full = section.full
    line = None
    if full is not None and full.average is not None and full.worst is not None:
        line = full.average.score if kind == "average" else full.worst[1].estimate.score
    most = 1.0 if any(cell.metric != PERPLEXITY for cell in section.counted) else _ceiling(curves, line)
    name = "Average" if kind == "average" else "Worst task"
    title = f"{name}: score against {words.spent(section)}, {section.mode}"
    return _chart(title, curves, line, most, section, large=True)


def task_chart(section: Section, cell: Cell, order: Sequence[str]) -> str:
    """The chart of one task at one length."""
    curves = []
    for name in sorted(section.methods, key=order.index):
        points = []
        for entry in section.of(name):
            point = entry.points.get(cell)
            if point is not None and point.share is not None:
                spoken = _spoken(entry, point.estimate, point.share, "")
                points.append((_spent(entry, point.share), point.estimate, spoken))
        curves.append(Curve(order.index(name), name, sorted(points, key=lambda point: point[0])))
    most = _ceiling(curves, cell.full) if cell.metric == PERPLEXITY else 1.0
    title = f"{cell.label}: {cell.metric} against {words.spent(section)}, {section.mode}"
    return _chart(title, curves, cell.full, most, section, noise=words.is_excluded(cell))


def interval_bar(average: Estimate, worst: float, index: int) -> str:
    """A small bar from 0 to 1: the interval, a dot at the average, an upright stroke at the worst task."""
    colour = f" c{index % COLOURS}" if index >= 0 else ""  # the full cache has no colour
    low, high, middle, tick = (
        round(150 * min(max(v, 0), 1), 1) for v in (average.low, average.high, average.score, worst)
    )
    return (
        f'<svg class="bar{colour}" viewBox="-4 0 158 14" width="158" height="14" aria-hidden="true">'
        f'<path class="track" d="M0 7H150"/><path class="range" d="M{low} 7H{high}"/>'
        f'<path class="tick" d="M{tick} 2V12"/><circle cx="{middle}" cy="7" r="2.8"/></svg>'
    )


def _spoken(entry: Entry, estimate: Estimate, share: float, task: str) -> str:
    what = "of the prompt's attention" if words.only_computes_less(entry) else "of the bytes"
    return f"{entry.method}, keep {entry.label}: {_exact(estimate)}{task}; {words.percent(_spent(entry, share))} {what}"


def _spent(entry: Entry, share: float) -> float:
    """What a method saves on: bytes, or where it frees none, a prompt's attention."""
    return entry.density if words.only_computes_less(entry) and entry.density is not None else share


def _exact(estimate: Estimate) -> str:
    digits = 2 if estimate.high >= 0.1 else 4
    return f"{estimate.score:.{digits}f} ({estimate.low:.{digits}f}–{estimate.high:.{digits}f})"


def _least_spent(section: Section) -> float:
    """Where the horizontal axis begins: below the smallest share of any point in the section."""
    shares = [_spent(entry, point.share) for entry in section.entries for point in entry.points.values() if point.share]
    return max(0.002, min([0.5, *shares]) * 0.8)


def _ceiling(curves: Sequence[Curve], full: float | None) -> float:
    """The top of the axis for scores in no natural range: 1, 2 or 5 times a power of ten."""
    values = [estimate.high for curve in curves for _, estimate, _ in curve.points] + ([full] if full else [])
    top = max(values, default=1.0) or 1.0
    power = 10.0 ** math.floor(math.log10(top))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= top * 0.999)


def _chart(
    title: str,
    curves: Sequence[Curve],
    full: float | None,
    most: float,
    section: Section,
    *,
    large: bool = False,
    noise: bool = False,
) -> str:
    curves = [curve for curve in curves if curve.points]
    longest = max((len(curve.name) for curve in curves), default=0)
    labels = large and 0 < len(curves) <= DIRECT_LABELS and longest <= LONGEST_LABEL
    room = 6.4 * longest + 14 if labels else 12.0
    width, height = (430.0, 290.0) if large else (330.0, 216.0)
    frame = Frame(width, height, 38 + room, 16, 18, 40, _least_spent(section), most)
    shift = _shifts(len(curves), 40 if large else 24)
    parts = [
        f'<svg class="chart{" large" if large else ""}{" noise" if noise else ""}" role="group" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" '
        f'aria-label="{escape(title)}">',
        _axes(frame, words.spent(section)),
        _full_line(frame, full),
    ]
    first = True
    for curve, offset in zip(curves, shift, strict=True):
        parts.append(_curve(frame, curve, offset, first))
        first = False
    if labels:
        parts.append(_direct_labels(frame, curves, shift))
    if noise:
        left, bottom = 38.0, height - 40
        parts.append(
            f'<rect class="veil" x="{left}" y="18" width="{width - 16 - left}" height="{bottom - 18}" '
            'fill="url(#hatch)"/>'
        )
    if not curves:
        parts.append(f'<text class="empty" x="{width / 2:.0f}" y="{height / 2:.0f}">nothing to draw</text>')
    return "".join(parts) + "</svg>"


def _shifts(count: int, room: float) -> list[float]:
    """Sideways moves in pixels that keep points of one budget apart."""
    step = min(4.5, room / max(count, 1))
    return [(number - (count - 1) / 2) * step for number in range(count)]


def _axes(frame: Frame, name: str) -> str:
    right, base = frame.width - frame.right, frame.height - frame.bottom
    parts = []
    for part in range(5):
        value = frame.most * part / 4
        y = frame.y(value)
        text = f"{value:.2f}" if frame.most >= 0.5 else f"{value:.3g}"
        parts.append(
            f'<path class="grid" d="M38 {y:.1f}H{right:.1f}"/><text class="ty" x="32" y="{y + 3.5:.1f}">{text}</text>'
        )
    for share in SHARE_TICKS:
        if share >= frame.least:
            x = frame.x(share)
            parts.append(
                f'<path class="mark" d="M{x:.1f} {base:.1f}v4"/>'
                f'<text class="tx" x="{x:.1f}" y="{base + 16:.1f}">{words.percent(share)}</text>'
            )
    middle = (38 + right) / 2
    parts.append(f'<text class="name" x="{middle:.1f}" y="{frame.height - 6:.1f}">{name}</text>')
    return "".join(parts)


def _full_line(frame: Frame, full: float | None) -> str:
    if full is None:
        return ""
    y, right = frame.y(full), frame.width - frame.right
    text = f"full cache {full:.2f}" if frame.most >= 0.5 else f"full cache {full:.3g}"
    return (
        f'<path class="full" d="M38 {y:.1f}H{right:.1f}"/>'
        f'<text class="fullname" x="{right:.1f}" y="{y - 5:.1f}">{text}</text>'
    )


def _curve(frame: Frame, curve: Curve, offset: float, first: bool) -> str:
    """The line, and a group per point: Tab reaches the first of the chart, arrow keys the rest."""
    places = [(frame.x(share) + offset, frame.y(estimate.score)) for share, estimate, _ in curve.points]
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts = [
        f'<g class="m c{curve.index % COLOURS}" data-m="{curve.index}">'
        f'<path class="line" {_dash(curve.index)}d="M{line}"/>'
    ]
    for number, ((x, y), (_, estimate, spoken)) in enumerate(zip(places, curve.points, strict=True)):
        stop = 0 if first and number == 0 else -1
        low, high = frame.y(estimate.low), frame.y(estimate.high)
        parts.append(
            f'<g class="p" tabindex="{stop}" role="img" aria-label="{escape(spoken)}">'
            f'<path class="ci" d="M{x:.1f} {low:.1f}V{high:.1f}"/>'
            f'<use href="#m{curve.index % len(MARKERS)}" x="{x:.1f}" y="{y:.1f}"/></g>'
        )
    return "".join(parts) + "</g>"


def _direct_labels(frame: Frame, curves: Sequence[Curve], shifts: Sequence[float]) -> str:
    """The method's name left of its first point, moved up or down until no two names touch."""
    wanted = sorted((frame.y(curve.points[0][1].score), number) for number, curve in enumerate(curves))
    places = [y for y, _ in wanted]
    for number in range(1, len(places)):
        places[number] = max(places[number], places[number - 1] + LABEL_HEIGHT)
    floor = frame.height - frame.bottom - 4
    for number in range(len(places) - 1, -1, -1):
        places[number] = min(places[number], floor)
        floor = places[number] - LABEL_HEIGHT
    parts = []
    for place, (y, number) in zip(places, wanted, strict=True):
        curve = curves[number]
        start = min(frame.x(other.points[0][0]) + move for other, move in zip(curves, shifts, strict=True)) - 9
        x = frame.x(curve.points[0][0]) + shifts[number] - 6
        parts.append(
            f'<g class="m direct c{curve.index % COLOURS}" data-m="{curve.index}" aria-hidden="true">'
            f'<path class="lead" d="M{start + 2:.1f} {place:.1f}L{x:.1f} {y:.1f}"/>'
            f'<text x="{start:.1f}" y="{place + 3.8:.1f}">{escape(curve.name)}</text></g>'
        )
    return "".join(parts)


def _dash(index: int) -> str:
    dash = DASHES[(index // COLOURS) % len(DASHES)]
    return f'stroke-dasharray="{dash}" ' if dash else ""
