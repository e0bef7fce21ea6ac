"""What the rows say, and that the table says no more than that. All rows here are made up."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from sample_rows import MANY_METHODS, METHODS, TASKS, perplexity_rows, sample_rows

from sparing.compare.report import words
from sparing.compare.report.summary import Section
from sparing.compare.table import render_table, summary
from sparing.errors import InvalidInputError


def row(method: str, task: str, score: float, **more: Any) -> dict[str, Any]:
    """One hand-made row with an interval of ±0.02."""
    keep = 1.0 if method == "full" else 0.25
    made = {
        "key": f"{method}/{task}/{more}",
        "model": "m",
        "method": method,
        "keep": keep,
        "keep_label": "full" if method == "full" else "25 %",
        "task": task,
        "mode": "query-agnostic",
        "length": 512,
        "n": 10,
        "questions": 10,
        "score": score,
        "low": score - 0.02,
        "high": score + 0.02,
        "metric": "exact match",
        "bytes_full": 1000,
        "bytes_kept": int(1000 * keep),
        "worse_than_full": round(10 * (1 - score)),
    }
    return made | more


def table(rows: list[dict[str, Any]], width: int = 100, detail: bool | None = None) -> str:
    stream = io.StringIO()
    render_table(rows, Console(file=stream, width=width, color_system=None), detail=detail)
    return stream.getvalue()


def one(rows: list[dict[str, Any]]) -> Section:
    sections = summary(rows)
    assert len(sections) == 1
    return sections[0]


def said(rows: list[dict[str, Any]]) -> str:
    section = one(rows)
    assert len(section.budgets) == 1
    return words.recommend(section, section.budgets[0])


BASE = [row("full", "a", 1.0), row("full", "b", 0.98), row("full", "c", 0.5)]


def test_average_and_worst_by_hand() -> None:
    section = one([*BASE, row("x", "a", 0.9), row("x", "b", 0.7), row("x", "c", 0.1)])
    entry = section.budgets[0].entries[0]
    assert entry.average is not None
    assert entry.worst is not None
    assert entry.average.score == pytest.approx(0.8)
    assert entry.average.high - entry.average.score == pytest.approx(0.02 / 2**0.5)
    assert entry.worst[0].label == "b@512"
    assert (entry.lost, entry.questions, entry.share) == (4, 20, 0.25)
    assert [cell.gate for cell in section.cells] == ["passed", "passed", "failed"]


def test_a_cell_that_fails_the_gate_counts_nowhere_and_is_named() -> None:
    low, high = ([*BASE, row("x", "a", 0.9), row("x", "b", 0.7), row("x", "c", score)] for score in (0.0, 1.0))
    assert said(low) == said(high)
    text = table(low)
    assert "c@512: the full cache itself scores only 0.50 (gate: 0.95)" in text
    assert "left out of average" in text
    assert "@512†" in text


def test_no_gate_passed_means_nothing_can_be_said() -> None:
    rows = [row("full", "c", 0.5), row("x", "c", 0.4)]
    assert "nothing can be said" in said(rows)
    assert one(rows).budgets[0].entries[0].average is None


def test_a_missing_full_row_is_not_a_passed_gate() -> None:
    rows = [row("full", "a", 1.0), row("x", "a", 0.9), row("x", "b", 0.2)]
    section = one(rows)
    assert [cell.gate for cell in section.cells] == ["passed", "missing"]
    assert "b@512: the full cache has not run yet" in table(rows)


def test_a_method_that_lacks_a_task_gets_no_average() -> None:
    rows = [*BASE, row("x", "a", 0.9), row("x", "b", 0.7), row("lucky", "a", 1.0)]
    text = said(rows)
    assert "x has no rival here (average 0.80, worst 0.70 on b@512; full cache 0.99)" in text
    assert "lucky did not run on every counted task" in " ".join(words.other_notes(one(rows)))


def test_modes_and_models_are_never_mixed() -> None:
    rows = sample_rows(METHODS[:2], (0.25,), TASKS[:1], (512,))
    sections = summary(rows)
    assert [section.mode for section in sections] == ["query-agnostic", "query-aware"]
    for section in sections:
        alone = summary([item for item in rows if item["mode"] == section.mode])
        assert alone == [section]
    other = [item | {"model": "other"} for item in rows]
    assert len(summary(rows + other)) == 4
    assert "query-aware, other" in table(rows + other)


def test_overlap_is_said_and_so_is_its_absence() -> None:
    close = [*BASE[:2], *(row("x", t, 0.90) for t in "ab"), *(row("y", t, 0.89) for t in "ab")]
    assert "n=10 can't tell it apart from y (the intervals overlap)" in said(close)
    apart = [*BASE[:2], *(row("x", t, 0.90) for t in "ab"), *(row("y", t, 0.5) for t in "ab")]
    assert "no other method's interval reaches it" in said(apart)
    assert "loses least, and even it loses clearly" in said(apart)


def test_a_safer_worst_task_and_unequal_bytes_are_said() -> None:
    rows = [
        *BASE[:2],
        *(row("x", t, s, bytes_kept=310) for t, s in (("a", 1.0), ("b", 0.7))),
        *(row("y", t, 0.8) for t in "ab"),
    ]
    text = said(rows)
    assert text.startswith("At 25 % of the cache: x loses least")
    assert "the best worst task is y's (0.80 on a@512)" in text
    assert "not an even comparison: x kept 31 % of the bytes, y 25 %" in text


def test_no_loss_is_said_plainly() -> None:
    rows = [*BASE[:2], row("x", "a", 1.0), row("x", "b", 0.98)]
    assert "x scores no lower than the full cache" in said(rows)


def test_perplexity_has_no_gate_and_is_not_averaged_with_accuracies() -> None:
    mixed = [*BASE[:2], row("x", "a", 0.9), row("x", "b", 0.7)]
    book = [row(m, "book", s, metric="1/perplexity", low=s, high=s) for m, s in (("full", 0.08), ("x", 0.07))]
    assert said(mixed + book) == said(mixed)
    assert "book: measured in 1/perplexity, another unit" in table(mixed + book)
    alone = said(book)
    assert "(0.0700 on book@512; full cache 0.0800)" in alone
    assert ".0640 .0621–.0659" in table(perplexity_rows())


def test_seeds_are_pooled_by_their_questions() -> None:
    rows = [*BASE[:1], row("x", "a", 1.0, seed=0, questions=30), row("x", "a", 0.6, seed=1, questions=10)]
    point = next(iter(one(rows).budgets[0].entries[0].points.values()))
    assert point.estimate.score == pytest.approx(0.9)
    assert point.questions == 40


def test_budgets_of_every_kind() -> None:
    rows = sample_rows(METHODS[:2], (0.5, 64, "256KiB"), TASKS[:2], (512, 1024))
    section = summary(rows)[0]
    assert [budget.label for budget in section.budgets] == ["64 tokens", "256KiB", "50 %"]
    starts = [words.recommend(section, budget).split(":")[0] for budget in section.budgets]
    assert starts == ["At 64 tokens", "At 256KiB", "At 50 % of the cache"]


def test_an_unknown_interval_is_not_a_narrow_one() -> None:
    rows = [*BASE[:1], row("x", "a", 0.9, low=None, high=None), row("y", "a", 0.2)]
    assert "can't tell it apart from y" in said(rows)


def test_near_budgets_stay_apart_and_mixed_settings_are_said() -> None:
    near = [row("full", "a", 1.0), *(row("x", "a", 0.9, keep=keep, keep_label="12%") for keep in (0.12, 0.125))]
    assert [budget.label for budget in one(near).budgets] == ["12 %", "12.5 %"]
    mixed = [row("full", "a", 1.0), *(row("x", "a", 0.9, parameters=window) for window in (16, 32))]
    assert "x at 25 %: rows of different settings are averaged" in table(mixed)


def test_a_row_without_a_field_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="lacks score"):
        summary([{"key": "k", "method": "full", "keep": 1.0, "task": "a", "mode": "query-aware"}])


CASES = {
    "small": sample_rows(METHODS[:3], (0.25,), TASKS[:2], (512,)),
    "usual": sample_rows(),
    "many": sample_rows(MANY_METHODS, (0.05, 0.1, 0.25, 0.5), tuple(f"task_{i}" for i in range(10)), (512, 1024, 2048)),
    "full only": [item for item in sample_rows() if item["method"] == "full"],
    "perplexity": perplexity_rows(),
    "no length": sample_rows(METHODS[:1], (0.25,), ("file",), (None,)),
    "none": [],
}


@pytest.mark.parametrize("width", [80, 100, 200])
@pytest.mark.parametrize("name", list(CASES))
def test_no_line_is_wider_than_the_console(name: str, width: int) -> None:
    text = table(CASES[name], width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    if name == "none":
        assert text == "No results yet.\n"


def test_the_layout_follows_the_width() -> None:
    wide, usual, narrow = (table(CASES["usual"], width, detail=True) for width in (240, 100, 80))
    assert "widest ±" not in wide  # every score stands in the one table
    for text in (usual, narrow):
        assert "widest ±" in text
        assert "needle_multikey@1024" in text
    assert "ms/token" in usual
    assert "ms/token" not in narrow
    assert "times don't fit this width" in narrow
    assert "in report.html" in table(CASES["many"])
    assert "widest ±" not in table(CASES["usual"], 100, detail=False)


def test_full_comes_first_and_the_best_average_next() -> None:
    lines = [line for line in table(CASES["small"], 140).splitlines() if ".8" in line or ".9" in line]
    assert [line.replace("25 %", "", 1).split()[0] for line in lines[:4]] == ["full", "snapkv", "adakv", "pyramidkv"]


def test_names_are_not_read_as_markup() -> None:
    rows = [row("full", "[red]a[/red]", 1.0), row("[bold]x", "[red]a[/red]", 0.9)]
    text = table(rows, 120)
    assert "[red]a[/red]" in text
    assert "[bold]x" in text


def readers(*methods: tuple[str, float | None], keep: float = 0.25) -> list[dict[str, Any]]:
    """Methods that hold everything and read a share (None: one that frees memory instead)."""
    rows = BASE[:2]
    for name, share in methods:
        more: dict[str, Any] = {} if share is None else {"bytes_kept": 1000, "read_share": share}
        rows = [*rows, *(row(name, task, 0.9, keep=keep, **more) for task in "ab")]
    return rows


def test_what_is_read_has_a_column_of_its_own_and_bytes_stay_what_they_are() -> None:
    rows = readers(("quest", 0.255), ("x", None))
    ends = [line.split("@512")[-1].split() for line in table(rows, 140).splitlines() if "@512 " in line]
    assert ["100", "%", "26", "%"] in [end[:4] for end in ends]  # quest
    assert ["25", "%", "all"] in [end[:3] for end in ends]  # x
    assert ["100", "%", "all"] in [end[:3] for end in ends]  # full
    assert "of it" in table(rows, 140)
    assert "of it" not in table([*BASE, row("x", "a", 0.9)], 140)
    entry = one(rows).of("quest")[0]
    assert (entry.share, entry.read) == (1.0, 0.255)


def test_a_method_that_frees_nothing_is_said_not_to_be_even() -> None:
    text = said(readers(("quest", 0.25), ("x", None)))
    assert "not an even comparison: quest frees no memory and only reads less" in text
    assert "not an even" not in said(readers(("quest", 0.25), ("refreshkv", 0.4)))
    assert "quest and refreshkv free no memory and only read less" in said(
        readers(("quest", 0.25), ("refreshkv", 0.4), ("x", None))
    )
    rows = [*readers(("quest", 0.25), ("x", None)), *(row("y", t, 0.9, bytes_kept=400) for t in "ab")]
    assert "quest kept 100 % of the bytes, x 25 %" in said(rows)  # and the others are not even, either
