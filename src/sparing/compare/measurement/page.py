"""The page of one measurement: what it is, its views, all numbers as a table, and how it was made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from sparing.compare.ablation_curve import AblationCurve
from sparing.compare.html import document, facts
from sparing.compare.measurement import svg
from sparing.compare.measurement.views import Seen, unit_name, views
from sparing.core.scores import Scores

LISTED = 200  # units in the table; the file has all


def render_scores(
    scores: Scores, *, compare: Scores | None = None, curve: AblationCurve | None = None, command: str = ""
) -> str:
    """The page as HTML text, self-contained; the same input gives the same text.

    Args:
        compare: another measurement of the same units, to draw this one against. curve: from `ablation_curve`.
        command: what made it, to be shown.

    Raises:
        ScoresMismatchError: `compare` is over other units.
    """
    body = "\n".join([_header(scores), _views(views(scores, compare, curve)), _table(scores), _facts(scores, command)])
    return document(f"sparing score: {scores.scorer} of {scores.model.name}", body)


def _header(scores: Scores) -> str:
    best = scores.ranked()[:3]
    errors = scores.standard_error
    said = "; ".join(
        f"{unit_name(scores, unit)} ({float(scores.values[unit]):.3g}"
        + (f" ± {float(errors[unit]):.2g}" if errors is not None else "") + ")"
        for unit in best
    )  # fmt: skip
    units = " × ".join(str(size) for size in scores.values.shape)
    axes = " × ".join(scores.axes)
    lede = f"{units} values ({axes}), n = {scores.n}. Highest: {said}." if best else f"{units} values ({axes}): none."
    notes = "".join(f"<li>{escape(note)}</li>" for note in scores.notes)
    remarks = f'<aside class="notes" aria-label="notes"><h3>Of this run</h3><ul>{notes}</ul></aside>' if notes else ""
    return (
        f'<header><p class="brand">sparing score</p><h1>{escape(scores.scorer)} of {escape(scores.model.name)}</h1>'
        f'<p class="lede">{escape(lede)}</p></header>{remarks}'
    )


def _views(seen: Seen) -> str:
    parts = [_figure(view.title, svg.map_svg(view)) for view in seen.maps]
    parts += [_figure(view.title, svg.lines_svg(view)) for view in seen.lines]
    parts += [_figure(view.title, svg.scatter_svg(view)) for view in seen.scatters]
    parts += [_figure(view.title, svg.text_html(view)) for view in seen.texts]
    return "".join(f'<section class="view">{part}</section>' for part in parts)


def _figure(title: str, drawing: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{drawing}</figure>"


def _table(scores: Scores) -> str:
    """The best units with their numbers."""
    ranked, errors = scores.ranked(), scores.standard_error
    rows = "".join(
        f'<tr><td class="n">{place}</td><th scope="row">{escape(unit_name(scores, unit))}</th>'
        f'<td class="n">{float(scores.values[unit]):.5g}</td>'
        + (f'<td class="n">{_error(float(errors[unit]))}</td>' if errors is not None else "") + "</tr>"
        for place, unit in enumerate(ranked[:LISTED], start=1)
    )  # fmt: skip
    head = '<th scope="col" class="n">rank</th><th scope="col">unit</th><th scope="col" class="n">score</th>'
    head += '<th scope="col" class="n">standard error</th>' if errors is not None else ""
    some = f" (the best {LISTED} of {len(ranked)})" if len(ranked) > LISTED else ""
    return (
        f'<details><summary>Numbers{some}</summary><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details>"
    )


def _error(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2g}"


def _facts(scores: Scores, command: str) -> str:
    items: list[tuple[str, str, bool]] = [("Command", command, True)] if command else []
    items += [("Model", f"{scores.model.name} ({scores.model.shape})", False)]
    items += [("Weights", scores.model.fingerprint, True)]
    items += [("Parameters", _plain(scores.parameters), False), ("Data", _plain(scores.data), False)]
    items += [(name, value, False) for name, value in scores.environment.items()]
    shown = facts((name[:1].upper() + name[1:] if name == "date" else name, v, code) for name, v, code in items if v)
    return f'<section class="wide"><h2>How this was made</h2>{shown}</section>'


def _plain(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)
