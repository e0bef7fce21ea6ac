"""The results as text: one table per mode, and under each the answer in plain words.

`summary` does the counting (see `sparing.compare.report.summary` for its rules); this file only lays it
out. Scores of every task stand in the same table when they fit the width of the console; otherwise they
follow in tables of their own, tasks down and methods across. `rich` is imported on first use.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from sparing.compare.report import words
from sparing.compare.report.summary import Cell, Entry, Estimate, Row, Section, summary

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["render_table", "summary"]

NOISE_MARK = "†"
UNIT_MARK = "‡"
SCORE_WIDTH = 12
MAX_DETAIL_LINES = 80


def render_table(rows: Iterable[Row], console: Console, *, detail: bool | None = None) -> None:
    """Print the results.

    Args:
        rows: rows of `results.jsonl`.
        console: where to print; its width decides the layout (made for 80 columns and more).
        detail: True prints every task's score however long that gets, False never; None prints them
            when it takes at most `MAX_DETAIL_LINES` lines.
    """
    sections = summary(rows)
    if not sections:
        console.print("No results yet.")
    several_models = len({section.model for section in sections}) > 1
    for section in sections:
        _print_section(section, console, detail, several_models)


def _print_section(section: Section, console: Console, detail: bool | None, name_model: bool) -> None:
    from rich.text import Text

    title = section.mode + (f", {section.model}" if name_model else "")
    console.print(Text.assemble((title, "bold"), (f"   {_subtitle(section)}", "dim")))
    table, has_scores, has_times = _widest_that_fits(section, console, detail is not False)
    console.print(table)
    for budget in section.budgets:
        console.print(_bullet(words.recommend(section, budget)))
    for note in words.gate_notes(section):
        console.print(_bullet(note, NOISE_MARK if "left out" in note else UNIT_MARK, "yellow"))
    for note in words.other_notes(section):
        console.print(_bullet(note, "!", "yellow"))
    if not has_times:
        console.print(_bullet("Prefill and decode times don't fit this width; the report has them.", style="dim"))
    console.print()
    if not has_scores and detail is not False and section.budgets:
        _print_scores(section, console, always=detail is True)


def _subtitle(section: Section) -> str:
    unit = "context" if section.contexts == 1 else "contexts"
    return f"n={section.contexts} {unit} a task, with 95 % intervals"


def _bullet(sentence: str, mark: str = "•", style: str = "") -> Table:
    """A sentence with a hanging indent."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=1)
    grid.add_column()
    grid.add_row(Text(mark, style=style), Text(sentence))
    return grid


def _widest_that_fits(section: Section, console: Console, scores: bool) -> tuple[Table, bool, bool]:
    """The table with as much as the width allows; whether it has each task's score; whether it has times."""
    every = scores and len(section.cells) * (SCORE_WIDTH + 2) < console.width
    for cells, times in ([(section.cells, True)] if every else []) + [([], True)]:
        table = _main_table(section, cells, times=times)
        if table.__rich_measure__(console, console.options.update(max_width=10_000)).maximum <= console.width:
            return table, bool(cells), times
    return _main_table(section, [], times=False), False, False


def _main_table(section: Section, cells: Sequence[Cell], *, times: bool) -> Table:
    """Budgets and methods down, best average first; scores, average, worst task, bytes and times across."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="bold")
    table.add_column("keep", no_wrap=True)
    table.add_column("method", overflow="fold")
    for cell in cells:
        table.add_column(_heading(cell), justify="right", overflow="fold")
    table.add_column("average", justify="right", no_wrap=True)
    table.add_column("worst", justify="right", no_wrap=True)
    table.add_column("on", overflow="fold")
    table.add_column("bytes\nkept", justify="right", no_wrap=True)
    for part in section.parts:
        table.add_column("\n".join(words.PARTS[part].rsplit(" ", 1)), justify="right", no_wrap=True)
    if times:
        table.add_column("prefill\ns", justify="right", no_wrap=True)
        table.add_column("decode\nms/token", justify="right", no_wrap=True)
    count = len(table.columns)
    if section.full is not None:
        table.add_row(*_values("", section.full, cells, section.parts)[:count], style="bold", end_section=True)
    for budget in section.budgets:
        for number, entry in enumerate(budget.entries):
            label = budget.label if number == 0 else ""
            last = number == len(budget.entries) - 1
            table.add_row(*_values(label, entry, cells, section.parts)[:count], end_section=last)
    return table


def _values(label: str, entry: Entry, cells: Sequence[Cell], parts: Sequence[str]) -> list[str]:
    """One row; the times come last, since a narrow table drops them."""
    scores = [_score(entry.points[cell].estimate) if cell in entry.points else words.NO_VALUE for cell in cells]
    average, worst, task = words.NO_VALUE, words.NO_VALUE, ""
    if entry.average is not None and entry.worst is not None:
        average = _score(entry.average)
        worst, task = _number(entry.worst[1].estimate), entry.worst[0].label
    times = [words.number(entry.prefill_s), words.milliseconds(entry.decode_s)]
    kept = [words.percent(entry.share), *(words.read(getattr(entry, part)) for part in parts)]
    texts = [label, entry.method, *scores, average, worst, task, *kept, *times]
    return [_plain(text) for text in texts]


def _score(estimate: Estimate) -> str:
    """ "0.97 .88–1.0": always as wide as this, and four digits for scores below 0.1."""
    if 0 < estimate.high < 0.1:
        return f"{estimate.score:.4f} {estimate.low:.4f}–{estimate.high:.4f}".replace("0.", ".")
    bounds = [f"{bound:.2f}".removeprefix("0") if bound < 0.995 else "1.0" for bound in (estimate.low, estimate.high)]
    return f"{estimate.score:.2f} {bounds[0]}–{bounds[1]}"


def _number(estimate: Estimate) -> str:
    return f"{estimate.score:.4f}"[1:] if 0 < estimate.high < 0.1 else f"{estimate.score:.2f}"


def _heading(cell: Cell) -> str:
    mark = NOISE_MARK if words.is_excluded(cell) else UNIT_MARK if cell.gate == "none" else ""
    length = "" if cell.length is None else f"\n@{cell.length}"
    return _plain(cell.task + length + mark)


def _print_scores(section: Section, console: Console, *, always: bool) -> None:
    """The score of every task: tasks down, methods across, in as many tables as the width asks for."""
    task = max(len(cell.label) for cell in section.cells)
    across = max(1, (console.width - task - 24) // (SCORE_WIDTH + 2))
    across = max(across, (console.width - task - 24) // (max(map(len, section.methods)) + 2))
    first = [entry.method for entry in section.budgets[0].entries]
    methods = first + [method for method in section.methods if method not in first]
    blocks = [methods[start : start + across] for start in range(0, len(methods), across)]
    if len(blocks) * len(section.budgets) * (len(section.cells) + 1) > MAX_DETAIL_LINES and not always:
        console.print(f"Scores of each of the {len(section.cells)} tasks: in report.html.\n", highlight=False)
        return
    for block in blocks:
        console.print(_score_table(section, block))


def _score_table(section: Section, methods: Sequence[str]) -> Table:
    """Scores alone, and in the last column the widest interval of the line."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="bold")
    table.add_column("keep", no_wrap=True)
    table.add_column("task", overflow="fold")
    for name in ["full", *methods, "widest ±"]:
        table.add_column(_plain(name), justify="right", max_width=SCORE_WIDTH, overflow="fold")
    for budget in section.budgets:
        by_method = {entry.method: entry for entry in budget.entries}
        shown = [section.full, *(by_method.get(method) for method in methods)]
        for number, cell in enumerate(section.cells):
            found = [entry.points.get(cell) if entry is not None else None for entry in shown]
            table.add_row(
                _plain(budget.label) if number == 0 else "",
                _heading(cell).replace("\n", ""),
                *(_number(point.estimate) if point else words.NO_VALUE for point in found),
                words.number(max((_half_width(point.estimate) for point in found if point), default=None)),
                style="dim" if words.is_excluded(cell) else "",
                end_section=cell is section.cells[-1],
            )
    return table


def _half_width(estimate: Estimate) -> float:
    return max(estimate.score - estimate.low, estimate.high - estimate.score)


def _plain(text: str) -> str:
    """Text that rich doesn't read as markup."""
    from rich.markup import escape

    return escape(text)
