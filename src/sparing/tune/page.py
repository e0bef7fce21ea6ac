"""The page of a tuning: what to run, the Pareto picture with the finalists' intervals, and every candidate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from sparing.compare.html import document, facts
from sparing.tune.standing import Standing
from sparing.tune.tuner import Outcome
from sparing.tune.words import figures, milliseconds, percent, verdict

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760.0, 400.0, 56.0, 20.0, 24.0, 44.0
TICKS = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0)


def pareto(standings: Sequence[Standing]) -> list[Standing]:
    """Those that no other beats in both bytes and loss, fewest bytes first."""
    front: list[Standing] = []
    for each in sorted(standings, key=lambda each: (each.share, each.loss.mean)):
        if not front or each.loss.mean < front[-1].loss.mean:
            front.append(each)
    return front


def render_tuning(outcome: Outcome, command: str, run: dict[str, str]) -> str:
    """The page as HTML text, self-contained; the same input gives the same text.

    Args:
        command: what made it. run: further facts to be shown.
    """
    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in verdict(outcome))
    title = outcome.finalists[0][1].label if outcome.recipe is not None else "nothing meets the request"
    body = "\n".join(
        [
            f'<header><p class="brand">sparing tune</p><h1>{escape(title)}</h1>'
            f'<p class="lede">Asked for: {escape(str(outcome.request))}.</p></header><ul class="answers">{said}</ul>',
            _figure(outcome),
            _finalists(outcome),
            _candidates(outcome),
            f'<section class="wide"><h2>How this was made</h2>'
            f"{facts([('Command', command, True), *((name, value, False) for name, value in run.items())])}</section>",
        ]
    )
    return document("sparing tune", body)


class _Axes:
    """Bytes (logarithmic) across, loss up."""

    def __init__(self, standings: Sequence[Standing]) -> None:
        shares = [each.share for each in standings]
        self.low, self.high = math.log(min([*shares, 0.1]) * 0.9), math.log(max([*shares, 1.0]) * 1.1)
        ends = [end for each in standings for end in (each.loss.low, each.loss.high)]
        self.bottom, self.top = max(min([*ends, 0.0]), -0.3), min(max([*ends, 0.05]), 1.0)

    def x(self, share: float) -> float:
        return LEFT + (math.log(share) - self.low) / (self.high - self.low) * (WIDTH - LEFT - RIGHT)

    def y(self, loss: float) -> float:
        within = min(max(loss, self.bottom), self.top)
        return HEIGHT - BOTTOM - (within - self.bottom) / (self.top - self.bottom) * (HEIGHT - TOP - BOTTOM)


def _figure(outcome: Outcome) -> str:
    final = [held for _, held in outcome.finalists]
    everyone = [*outcome.searched, *final]
    if not everyone:
        return ""
    axes = _Axes(everyone)
    caption = (
        "Small dots: candidates on the contexts they were chosen by, the line joins those that no other beats. Large "
        "dots: the finalists on held-out contexts, with 95 % intervals."
    )
    parts = [_grid(axes), _limits(outcome, axes)]
    front = pareto(outcome.searched)
    path = "L".join(f"{axes.x(each.share):.1f} {axes.y(each.loss.mean):.1f}" for each in front)
    dots = "".join(_dot(axes, each, 3.2, "") for each in outcome.searched)
    parts.append(f'<g class="m c6"><path class="line" d="M{path}"/>{dots}</g>')
    for at, each in enumerate(final):
        x = axes.x(each.share)
        bar = f'<path class="ci" d="M{x:.1f} {axes.y(each.loss.low):.1f}V{axes.y(each.loss.high):.1f}"/>'
        parts.append(f'<g class="m c{at}">{bar}{_dot(axes, each, 6.5, "held out: ")}</g>')
    keys = "".join(
        f'<span class="c{at}"><i class="dot"></i>{escape(each.label)}</span>' for at, each in enumerate(final)
    )
    return (
        '<section class="view"><h2>What is lost, against what is held</h2><figure>'
        f'<svg class="chart large" role="group" aria-label="loss against bytes" viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}">'
        f'{"".join(parts)}</svg><p class="keys">{keys}</p><p class="caption">{caption}</p></figure></section>'
    )


def _dot(axes: _Axes, each: Standing, radius: float, what: str) -> str:
    said = escape(f"{what}{each.label}: {figures(each)}")
    return (
        f'<circle class="p dot" r="{radius}" cx="{axes.x(each.share):.1f}" cy="{axes.y(each.loss.mean):.1f}" '
        f'tabindex="-1" role="img" aria-label="{said}"/>'
    )


def _grid(axes: _Axes) -> str:
    base, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    step = next(size for size in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if (axes.top - axes.bottom) / size <= 7)
    for number in range(math.ceil(axes.bottom / step), math.floor(axes.top / step) + 1):
        y = axes.y(number * step)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>'
                     f'<text class="ty" x="{LEFT - 7}" y="{y + 4:.1f}">{percent(number * step)}</text>')  # fmt: skip
    for share in TICKS:
        if axes.low <= math.log(share) <= axes.high:
            x = axes.x(share)
            parts.append(f'<path class="mark" d="M{x:.1f} {base}v4"/>'
                         f'<text class="tx" x="{x:.1f}" y="{base + 16}">{100 * share:g} %</text>')  # fmt: skip
    parts.append(
        f'<text class="name" x="{(LEFT + right) / 2:.0f}" y="{HEIGHT - 6}">bytes held, of the full cache</text>'
    )
    parts.append(f'<text class="yname" x="{LEFT - 40}" y="{TOP - 10}">loss, of the full cache\'s score</text>')
    return "".join(parts)


def _limits(outcome: Outcome, axes: _Axes) -> str:
    """The limits that have a place in the picture, as dotted lines."""
    parts, request = [], outcome.request
    right = WIDTH - RIGHT
    if request.max_loss is not None:
        y, said = axes.y(request.max_loss), f"at most {percent(request.max_loss)}"
        parts.append(f'<path class="full" d="M{LEFT} {y:.1f}H{right}"/>')
        parts.append(f'<text class="fullname" x="{right}" y="{y - 5:.1f}">{said}</text>')
    if request.memory is not None:
        x, said = axes.x(request.memory), f"at most {100 * request.memory:g} %"
        parts.append(f'<path class="full" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="fullname" x="{x - 5:.1f}" y="{TOP + 10}">{said}</text>')
    return "".join(parts)


def _finalists(outcome: Outcome) -> str:
    """Each finalist on the contexts it was chosen by, and on those held out."""
    rows = []
    for at, (searched, held) in enumerate(outcome.finalists):
        broken = "; ".join(outcome.request.broken(held)) or "meets the request"
        rows.append(
            f'<tr class="c{at}"><th scope="row">{escape(held.label)}</th>'
            f'<td class="n"><b>{percent(held.loss.mean)}</b> '
            f'<span class="ci">{percent(held.loss.low)} to {percent(held.loss.high)}</span></td>'
            f'<td class="n">{percent(searched.loss.mean)}</td><td class="n">{percent(held.worst[0])}</td>'
            f'<td>{escape(held.worst[1])}</td><td class="n">{held.share:.1%}</td>'
            f'<td class="n">{held.prefill_s:.3g}</td><td class="n">{milliseconds(held.decode_s)}</td>'
            f"<td>{escape(broken)}</td></tr>"
        )
    heads = ("finalist", "loss, held out", "loss, searched", "worst loss", "on", "bytes", "prefill s", "ms/token", "")
    return f"<section><h2>The finalists</h2>{_table(heads, rows)}</section>" if rows else ""


def _candidates(outcome: Outcome) -> str:
    """Every candidate: how far it got, and why not further."""
    everyone = [(each, "read every context of the search") for each in sorted(outcome.searched, key=lambda e: e.share)]
    rows = [
        f'<tr><th scope="row">{escape(each.label)}</th><td class="n">{each.n}</td>'
        f'<td class="n">{percent(each.loss.mean)}</td><td class="n">{each.share:.1%}</td><td>{escape(reason)}</td></tr>'
        for each, reason in [*everyone, *outcome.dropped]
    ]
    heads = ("candidate", "contexts", "loss", "bytes", "")
    return f"<details><summary>All {len(rows)} candidates</summary>{_table(heads, rows)}</details>"


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{escape(each)}</th>' for each in heads)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
