"""The tables of the report, as HTML text."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from sparing.compare.report import charts, words
from sparing.compare.report.summary import Cell, Entry, Estimate, Section

LEFT = ("on task",)


def standing(section: Section, order: Sequence[str]) -> str:
    """Average and worst task of every method and budget."""
    names = ["keep", "method", "average, 95 % interval", "", "worst", "on task", "answers lost", "bytes kept"]
    head = _head(*names, *(words.PARTS[part] for part in section.parts))
    body = []
    if section.full is not None:
        body.append(f"<tbody><tr>{_group('full', 1)}{_standing_cells(section.full, order, section.parts)}</tr></tbody>")
    for budget in section.budgets:
        rows = []
        for number, entry in enumerate(budget.entries):
            group = _group(budget.label, len(budget.entries)) if number == 0 else ""
            rows.append(f"<tr>{group}{_standing_cells(entry, order, section.parts)}</tr>")
        body.append(f"<tbody>{''.join(rows)}</tbody>")
    caption = (
        "Best average first within each budget. The dot is the average, the band its 95 % interval, the "
        "upright stroke the worst task. “Answers lost” counts questions that the full cache answered right and "
        "the method wrong."
    )
    return _table(caption, head, body, "standing")


def _standing_cells(entry: Entry, order: Sequence[str], parts: Sequence[str]) -> str:
    name = _method(entry.method, order)
    lost = f"{entry.lost} of {entry.questions}" if entry.questions else words.NO_VALUE
    share = f'<td class="n">{words.percent(entry.share)}</td>'
    share += "".join(f'<td class="n">{words.read(getattr(entry, part))}</td>' for part in parts)
    if entry.average is None or entry.worst is None:
        empty = '<td class="quiet" colspan="4">no average: no task counts, or not all have run</td>'
        return f'{name}{empty}<td class="n">{lost}</td>{share}'
    cell, point = entry.worst
    index = order.index(entry.method) if entry.method in order else -1
    bar = charts.interval_bar(entry.average, point.estimate.score, index)
    return (
        f'{name}<td class="n">{_score(entry.average)}</td><td class="nopad">{bar}</td>'
        f'<td class="n"><b>{words.number(point.estimate.score, _digits(point.estimate))}</b></td>'
        f"<td>{escape(cell.label)}</td>"
        f'<td class="n">{lost}</td>{share}'
    )


def scores(section: Section, order: Sequence[str]) -> str:
    """Every score: budgets and methods down, tasks across; the best of a budget in bold."""
    head = _head("keep", "method", *(_cell_name(cell) for cell in section.cells))
    body = []
    if section.full is not None:
        cells = "".join(_score_cell(section.full, cell, None) for cell in section.cells)
        body.append(f"<tbody><tr>{_group('full', 1)}{_method('full', order)}{cells}</tr></tbody>")
    for budget in section.budgets:
        best = {cell: _best(budget.entries, cell) for cell in section.cells}
        rows = []
        for number, entry in enumerate(budget.entries):
            group = _group(budget.label, len(budget.entries)) if number == 0 else ""
            cells = "".join(_score_cell(entry, cell, best[cell]) for cell in section.cells)
            rows.append(f"<tr>{group}{_method(entry.method, order)}{cells}</tr>")
        body.append(f"<tbody>{''.join(rows)}</tbody>")
    caption = "Score and 95 % interval. Bold: the best of its budget. Grey columns failed the gate and are noise."
    return _table(caption, head, body)


def _best(entries: Sequence[Entry], cell: Cell) -> float | None:
    found = [entry.points[cell].estimate.score for entry in entries if cell in entry.points]
    return max(found) if len(found) > 1 and not words.is_excluded(cell) else None


def _score_cell(entry: Entry, cell: Cell, best: float | None) -> str:
    grey = " quiet" if words.is_excluded(cell) else ""
    point = entry.points.get(cell)
    if point is None:
        return f'<td class="n{grey}">{words.NO_VALUE}</td>'
    text = _score(point.estimate, bold=best is not None and point.estimate.score >= best)
    return f'<td class="n{grey}">{text}</td>'


def _score(estimate: Estimate, *, bold: bool = False) -> str:
    digits = _digits(estimate)
    score = f"{estimate.score:.{digits}f}"
    return (
        f"{f'<b>{score}</b>' if bold else score} "
        f'<span class="ci">{estimate.low:.{digits}f}–{estimate.high:.{digits}f}</span>'
    )


def _digits(estimate: Estimate) -> int:
    return 4 if 0 < estimate.high < 0.1 else 2


def _cell_name(cell: Cell) -> str:
    mark = {"failed": "gate failed", "missing": "full missing", "none": cell.metric}.get(cell.gate)
    length = "" if cell.length is None else f"@{cell.length}"
    return cell.task + length + (f" ({mark})" if mark else "")


def costs(section: Section, order: Sequence[str]) -> str:
    """Time and memory, at the longest length."""
    full = section.full
    head = _head(
        "keep",
        "method",
        "prefill, s",
        "decode, ms/token",
        "decode, × full",
        "cache",
        "of full",
        "peak memory",
    )
    body = []
    if full is not None:
        body.append(f"<tbody><tr>{_group('full', 1)}{_cost_cells(full, full, order)}</tr></tbody>")
    for budget in section.budgets:
        rows = []
        entries = sorted(budget.entries, key=lambda entry: entry.method)
        for number, entry in enumerate(entries):
            group = _group(budget.label, len(entries)) if number == 0 else ""
            rows.append(f"<tr>{group}{_cost_cells(entry, full, order)}</tr>")
        body.append(f"<tbody>{''.join(rows)}</tbody>")
    length = "all tasks" if section.timed_length is None else f"the tasks at length {section.timed_length}, the longest"
    caption = (
        f"Means over {length}; peak memory is the largest of the process. Times on a shared machine are "
        "noisy: trust the ratio to the full cache, measured in the same run, more than the milliseconds."
    )
    return _table(caption, head, body)


def _cost_cells(entry: Entry, full: Entry | None, order: Sequence[str]) -> str:
    ratio = words.NO_VALUE
    if full is not None and full.decode_s and entry.decode_s is not None:
        ratio = f"{entry.decode_s / full.decode_s:.2f}"
    share = entry.bytes_kept / entry.bytes_full if entry.bytes_full and entry.bytes_kept is not None else None
    values = (
        words.number(entry.prefill_s), words.milliseconds(entry.decode_s), ratio,
        words.byte_size(entry.bytes_kept), words.percent(share), words.byte_size(entry.peak_rss),
    )  # fmt: skip
    return _method(entry.method, order) + "".join(f'<td class="n">{value}</td>' for value in values)


def _method(name: str, order: Sequence[str]) -> str:
    key = charts.key(order.index(name)) if name in order else '<span class="nokey"></span>'
    text = "full cache" if name == "full" else name
    return f'<th scope="row" class="method">{key}{escape(text)}</th>'


def _group(label: str, rows: int) -> str:
    text = "" if label == "full" else label
    return f'<th scope="rowgroup" rowspan="{rows}" class="keep">{escape(text) or "100 %"}</th>'


def _head(*names: str) -> str:
    cells = "".join(
        f'<th scope="col"{"" if number < 2 or name in LEFT else " class=n"}>{escape(name)}</th>'
        if name
        else "<td></td>"
        for number, name in enumerate(names)
    )
    return f"<thead><tr>{cells}</tr></thead>"


def _table(caption: str, head: str, body: Sequence[str], name: str = "") -> str:
    """A table in a box of its own that scrolls sideways when the page is too narrow, also by keyboard."""
    label = escape(caption.split(".")[0])
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
        f'<table class="{name}">{head}{"".join(body)}</table></div>'
        f'<p class="caption">{escape(caption)}</p>'
    )
