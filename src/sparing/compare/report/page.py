"""The whole report as one page: what it says in words, charts, tables, maps, one example, how it was made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from sparing.compare.html import document, facts
from sparing.compare.report import charts, maps, tables, words
from sparing.compare.report.summary import Row, Section, summary

Json = dict[str, Any]

PACKAGES = ("sparing", "torch", "transformers")
SHOWN_AT_FIRST = 6
CROWDED = 8
MODES = {
    "query-agnostic": "the cache is compressed before the question is known, so it must serve any question",
    "query-aware": "the question is part of the prompt when the cache is compressed; the easier setting",
}
KNOWN_FACTS = (
    ("command", "Command"), ("model", "Model"), ("model_description", "Description"),
    ("seed", "Seed"), ("started", "Started"),
    ("finished", "Finished"), ("sparing", "sparing"), ("torch", "torch"), ("transformers", "transformers"),
    ("python", "Python"), ("commit", "Commit"), ("hardware", "Hardware"), ("threads", "Threads"),
)  # fmt: skip


def render_report(run: Json, rows: Iterable[Row], examples: Json | None = None) -> str:
    """The report as HTML text; the same input gives the same text.

    Args:
        run: the content of run.json; any key may be missing, unknown keys are shown too.
        rows: rows of results.jsonl.
        examples: the content of examples.json, or None.
    """
    sections = summary(rows)
    order = sorted({name for section in sections for name in section.methods}, key=lambda name: _rank(sections, name))
    several_models = len({section.model for section in sections}) > 1
    names = [section.mode + (f" · {section.model}" if several_models else "") for section in sections]
    example = maps.example_data(examples) if examples and examples.get("methods") else None
    share_maps = [maps.share_maps(section) for section in sections]
    body = [
        charts.marker_defs(),
        _header(run, sections),
        _switch(names),
        *(
            _section(section, names[number], number, order, share_maps[number])
            for number, section in enumerate(sections)
        ),
        "" if sections else '<section class="wide"><p>No results yet.</p></section>',
        _example(examples, example),
        _provenance(run),
    ]
    model = str(run.get("model", ""))
    return document(
        f"sparing compare{': ' + model if model else ''}",
        "\n".join(part for part in body if part),
        {"maps": share_maps, "example": example},
        files("sparing.compare.report").joinpath("script.js").read_text(encoding="utf-8"),
        "Skip to the results",
    )


def _header(run: Json, sections: Sequence[Section]) -> str:
    methods = {name for section in sections for name in section.methods}
    budgets = {budget.label for section in sections for budget in section.budgets}
    tasks = {cell.task for section in sections for cell in section.cells}
    lengths = {cell.length for section in sections for cell in section.cells if cell.length is not None}
    contexts = min((section.contexts for section in sections), default=0)
    counts = [
        _count(len(methods), "method"), _count(len(budgets), "budget"), _count(len(tasks), "task"),
        _count(len(lengths), "length") if lengths else "", f"n = {contexts} contexts a task",
    ]  # fmt: skip
    model = escape(str(run.get("model") or (sections[0].model if sections else "")))
    description = escape(str(run.get("model_description") or ""))
    computes_less = any("density" in section.parts for section in sections)
    change = "it keeps or computes less" if computes_less else "its KV cache shrinks"
    where = f"<h1>What {model or 'the model'} loses when {change}</h1>"
    about = escape(", ".join(part for part in counts if part)) + "." + (f" {description}." if description else "")
    return f'<header><p class="brand">sparing compare</p>{where}<p class="lede">{about}</p></header>'


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _switch(names: Sequence[str]) -> str:
    if len(names) < 2:
        return ""
    radios = "".join(
        f'<label><input type="radio" name="mode" value="{number}"{" checked" if number == 0 else ""}>'
        f"<span>{escape(name)}</span></label>"
        for number, name in enumerate(names)
    )
    return f'<form class="switch"><fieldset><legend>Mode</legend>{radios}</fieldset></form>'


def _section(section: Section, name: str, number: int, order: Sequence[str], map_data: Json) -> str:
    explained = MODES.get(section.mode)
    parts = [
        f'<h2>In plain words <span class="mode">{escape(name)}</span></h2>',
        f'<p class="quiet">{escape(section.mode)}: {explained}.</p>' if explained else "",
        _answers(section),
        _notes(section),
    ]
    if section.budgets:
        parts += [
            '<h2>Score against what is spent</h2>',
            _legend(section, order),
            _overviews(section, order),
            '<h3 class="sub">Task by task</h3>' if len(section.counted) != 1 else "",
            _task_charts(section, order),
            f"<details><summary>All scores as a table</summary>{tables.scores(section, order)}</details>",
            '<h2>Average and worst task</h2>', tables.standing(section, order),
            '<h2>Where the cache is kept</h2>',
            '<p class="quiet">Share of the tokens that stay, per layer and KV head, averaged over tasks.</p>',
            maps.share_map_html(section, map_data, number),
        ]  # fmt: skip
    else:
        parts += ["<h2>Scores</h2>", tables.scores(section, order)]
    parts += ["<h2>Time and memory</h2>", tables.costs(section, order)]
    return f'<section data-section="{number}" aria-label="{escape(name)}">{"".join(parts)}</section>'


def _overviews(section: Section, order: Sequence[str]) -> str:
    """The large charts, where they say more than the chart of a single task."""
    if not section.counted:
        return "<p>No task counts (see the notes), so there is no average to draw.</p>"
    if len(section.counted) == 1:
        return ""
    average = _figure("Average of the tasks that count", charts.overview(section, order, "average"))
    worst = _figure("Worst of these tasks", charts.overview(section, order, "worst"))
    return f'<div class="pair">{average}{worst}</div>'


def _answers(section: Section) -> str:
    if not section.budgets:
        return "<p>Only the full cache has run, so there is nothing to compare yet.</p>"
    items = []
    for budget in section.budgets:
        start, _, rest = words.recommend(section, budget).partition(": ")
        items.append(f"<li><b>{escape(start)}</b> {escape(rest)}</li>")
    return f'<ul class="answers">{"".join(items)}</ul>'


def _notes(section: Section) -> str:
    gate, other = words.gate_notes(section), words.other_notes(section)
    if not gate and not other:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in gate + other)
    return f'<aside class="notes" aria-label="notes"><h3>Read with care</h3><ul>{items}</ul></aside>'


def _legend(section: Section, order: Sequence[str]) -> str:
    """The methods as check boxes; of many, only the best few are drawn at first."""
    shown = set(section.methods)
    note = ""
    if len(section.methods) > CROWDED:
        shown = set(sorted(section.methods, key=lambda name: _rank([section], name))[:SHOWN_AT_FIRST])
        note = f" The best {SHOWN_AT_FIRST} of {len(section.methods)} are drawn; tick others to add them."
    boxes = "".join(
        f'<label><input type="checkbox" data-m="{order.index(name)}"{" checked" if name in shown else ""}>'
        f"{charts.key(order.index(name))}<span>{escape(name)}</span></label>"
        for name in sorted(section.methods, key=order.index)
    )
    return (
        f'<fieldset class="legend"><legend>Methods</legend>{boxes}</fieldset>'
        '<p class="caption">Upright lines are 95 % intervals; points of one budget are moved apart a little. '
        f"In a chart, the arrow keys go from point to point.{note}</p>"
    )


def _rank(sections: Sequence[Section], name: str) -> tuple[float, str]:
    """Best average over everything first: the best methods get colours of their own."""
    entries = [entry for section in sections for entry in section.of(name)]
    scores = [entry.average.score for entry in entries if entry.average is not None]
    return (-sum(scores) / len(scores) if scores else 1.0, name)


def _task_charts(section: Section, order: Sequence[str]) -> str:
    figures = []
    for cell in section.cells:
        remark = {
            "failed": "noise: gate failed",
            "missing": "full cache has not run",
        }.get(cell.gate, cell.metric)
        figures.append(_figure(cell.label, charts.task_chart(section, cell, order), remark))
    return f'<div class="grid">{"".join(figures)}</div>'


def _figure(title: str, chart: str, remark: str = "") -> str:
    small = f" <small>{escape(remark)}</small>" if remark else ""
    return f"<figure><figcaption>{escape(title)}{small}</figcaption>{chart}</figure>"


def _example(examples: Json | None, data: Json | None) -> str:
    if not examples or data is None or not data["methods"]:
        return ""
    body = maps.example_html(examples, data)
    return f'<section class="wide"><h2>Which tokens survive: one example</h2>{body}</section>'


def _provenance(run: Json) -> str:
    """What made these numbers; unknown keys of run.json come last."""
    known = {name for name, _ in KNOWN_FACTS}
    found = [(label, run[name]) for name, label in KNOWN_FACTS if run.get(name) is not None]
    found += [(name.replace("_", " "), value) for name, value in run.items() if name not in known and value is not None]
    items = [
        (label if label in PACKAGES else label[:1].upper() + label[1:], _plain(value), label in ("Command", "Commit"))
        for label, value in found
    ]
    return f'<section class="wide"><h2>How this was made</h2>{facts(items)}</section>'


def _plain(value: Any) -> str:
    """Nested facts as one line; byte counts as sizes."""
    if isinstance(value, dict):
        parts = []
        for name, part in value.items():
            if part is None:
                continue
            if str(name).endswith("_bytes"):
                parts.append(f"{str(name).removesuffix('_bytes')} {words.byte_size(float(part))}")
            else:
                parts.append(f"{name} {_plain(part)}")
        return ", ".join(parts)
    return ", ".join(_plain(part) for part in value) if isinstance(value, list) else str(value)
