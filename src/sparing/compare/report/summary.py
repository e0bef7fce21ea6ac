"""From rows to what can be said: cells, gates, averages, worst tasks, per mode and budget.

Tables and report both read this, so they can't tell different stories. The rules:

* Rows of different modes (or models) never meet in one `Section`.
* A cell is one task at one length. Its gate is the score of the untouched model ("full"): below
  `GATE` the cell is noise and counts in no average and no worst. A cell whose full row is missing
  doesn't count either.
* Tasks measured in 1/perplexity have no gate and another unit: they are shown, and not averaged with
  the others. Only when a section has nothing else are they averaged among themselves.
* The interval of an average treats the cells as independent.
* A method that lacks one of the counted cells gets no average: it would not be comparable.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparing.errors import InvalidInputError

Row = dict[str, Any]
ShareMap = list[list[float] | None]

FULL = "full"
GATE = 0.95
PERPLEXITY = "1/perplexity"
REQUIRED = ("method", "keep", "task", "mode", "score")


@dataclass(frozen=True)
class Cell:
    """One task at one length, and whether the untouched model can do it."""

    task: str
    length: int | None
    metric: str
    full: float | None

    @property
    def label(self) -> str:
        """ "needle@1024"; the task alone when it has no length."""
        return self.task if self.length is None else f"{self.task}@{self.length}"

    @property
    def gate(self) -> str:
        """One of "passed", "failed", "none" (no gate for this metric) and "missing" (no full row yet)."""
        if self.full is None:
            return "missing"
        if self.metric == PERPLEXITY:
            return "none"
        return "passed" if self.full >= GATE else "failed"


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    score: float
    low: float
    high: float

    def overlaps(self, other: Estimate) -> bool:
        """Whether the two intervals have a point in common."""
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Point:
    """What one method did in one cell at one budget; `lost`: questions that only the full cache got right."""

    estimate: Estimate
    contexts: int
    questions: int
    lost: int
    bytes_full: float
    bytes_kept: float
    prefill_s: float | None
    decode_s: float | None
    peak_rss: float | None

    @property
    def share(self) -> float | None:
        """The share of the cache's bytes that was kept."""
        return self.bytes_kept / self.bytes_full if self.bytes_full > 0 else None


@dataclass(frozen=True)
class Entry:
    """One method at one budget over all cells of a section.

    `share`: of the bytes, what was kept. `read`: of what was kept, what a decoded token read. `density`: of the
    prompt's attention, what was computed. None for all of it.
    """

    method: str
    keep: Any
    label: str
    points: dict[Cell, Point]
    average: Estimate | None
    worst: tuple[Cell, Point] | None
    share: float | None
    read: float | None
    density: float | None
    lost: int
    questions: int
    prefill_s: float | None
    decode_s: float | None
    peak_rss: float | None
    bytes_full: float | None
    bytes_kept: float | None
    share_map: ShareMap | None


@dataclass(frozen=True)
class Budget:
    """The methods at one budget, best average first; those without an average last."""

    keep: Any
    label: str
    entries: list[Entry]


@dataclass(frozen=True)
class Section:
    """Everything measured for one model in one mode."""

    model: str
    mode: str
    cells: list[Cell]
    counted: list[Cell]
    full: Entry | None
    budgets: list[Budget]
    methods: list[str]
    timed_length: int | None
    warnings: list[tuple[str, int]] = field(default_factory=list)

    @property
    def parts(self) -> list[str]:
        """Which of "read" and "density" are less than all for a method."""
        return [name for name in ("read", "density") if any(getattr(entry, name) is not None for entry in self.entries)]

    @property
    def contexts(self) -> int:
        """The smallest number of contexts behind a score."""
        return min((point.contexts for entry in self.entries for point in entry.points.values()), default=0)

    def of(self, method: str) -> list[Entry]:
        """A method's entries, by budget."""
        return [entry for budget in self.budgets for entry in budget.entries if entry.method == method]

    @property
    def entries(self) -> list[Entry]:
        """The full entry first, then every budget's."""
        rest = [entry for budget in self.budgets for entry in budget.entries]
        return ([self.full] if self.full else []) + rest


def summary(rows: Iterable[Row]) -> list[Section]:
    """The rows as sections, one per model and mode: query-agnostic before query-aware.

    Raises:
        InvalidInputError: a row lacks a field that every row has.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        missing = [name for name in REQUIRED if row.get(name) is None]
        if missing:
            raise InvalidInputError(
                f"row {row.get('key')}",
                sorted(row),
                "rows with " + ", ".join(REQUIRED),
                f"it lacks {missing[0]}",
            )
        groups.setdefault((str(row.get("model", "")), str(row["mode"])), []).append(row)
    return [_section(model, mode, groups[model, mode]) for model, mode in sorted(groups)]


def _section(model: str, mode: str, rows: Sequence[Row]) -> Section:
    cells = _cells(rows)
    gated = [cell for cell in cells.values() if cell.metric != PERPLEXITY]
    counted = [cell for cell in gated if cell.gate == "passed"]
    if not gated:
        counted = [cell for cell in cells.values() if cell.gate == "none"]
    lengths = [cell.length for cell in cells.values() if cell.length is not None]
    timed = max(lengths, default=None)
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        grouped.setdefault((keep_label(row), row["method"]), []).append(row)
    entries = [_entry(group, cells, counted, timed) for group in grouped.values()]
    full = [entry for entry in entries if entry.method == FULL]
    rest = [entry for entry in entries if entry.method != FULL]
    methods = list(dict.fromkeys(str(row["method"]) for row in rows if row["method"] != FULL))
    warnings: dict[str, int] = {}
    for row in rows:
        if row.get("warning"):
            warnings[str(row["warning"])] = warnings.get(str(row["warning"]), 0) + 1
    for name, count in _pooled(rows).items():
        warnings[f"{name}: rows of different settings are averaged; give each setting a folder of its own"] = count
    return Section(
        model=model,
        mode=mode,
        cells=list(cells.values()),
        counted=counted,
        full=full[0] if full else None,
        budgets=_budgets(rest),
        methods=sorted(methods),
        timed_length=timed,
        warnings=sorted(warnings.items()),
    )


def _pooled(rows: Sequence[Row]) -> dict[str, int]:
    """The entries that mix configurations: two rows that differ in something else than the seed."""
    seen: set[tuple[Any, ...]] = set()
    mixed: dict[str, int] = {}
    for row in rows:
        place = (row["method"], keep_label(row), row["task"], row.get("length"), row.get("seed"))
        if place in seen:
            name = f"{row['method']} at {keep_label(row)}"
            mixed[name] = mixed.get(name, 1) + 1
        seen.add(place)
    return mixed


def _cells(rows: Sequence[Row]) -> dict[tuple[str, int | None], Cell]:
    """The cells by task and length: in the order of the rows, a task's lengths together and ascending."""
    order = {task: number for number, task in enumerate(dict.fromkeys(row["task"] for row in rows))}
    found: dict[tuple[str, int | None], list[Row]] = {}
    for row in rows:
        found.setdefault((row["task"], row.get("length")), []).append(row)
    cells: dict[tuple[str, int | None], Cell] = {}
    for task, length in sorted(found, key=lambda name: (order[name[0]], name[1] or 0)):
        group = found[task, length]
        full = [row for row in group if row["method"] == FULL]
        score = _point(full).estimate.score if full else None
        cells[task, length] = Cell(str(task), length, str(group[0].get("metric", "score")), score)
    return cells


def _entry(
    rows: Sequence[Row], cells: dict[tuple[str, int | None], Cell], counted: list[Cell], timed: int | None
) -> Entry:
    by_cell: dict[Cell, list[Row]] = {}
    for row in rows:
        by_cell.setdefault(cells[row["task"], row.get("length")], []).append(row)
    points = {cell: _point(by_cell[cell]) for cell in cells.values() if cell in by_cell}
    complete = bool(counted) and all(cell in points for cell in counted)
    scored = [(cell, points[cell]) for cell in counted if cell in points]
    longest = [point for cell, point in points.items() if cell.length == timed]
    total_full = sum(point.bytes_full for point in points.values())
    return Entry(
        method=str(rows[0]["method"]),
        keep=rows[0]["keep"],
        label=keep_label(rows[0]),
        points=points,
        average=_average([point.estimate for _, point in scored]) if complete else None,
        worst=min(scored, key=lambda item: item[1].estimate.score) if complete else None,
        share=sum(point.bytes_kept for point in points.values()) / total_full if total_full > 0 else None,
        read=_mean(row.get("read_share") for row in rows),
        density=_mean(row.get("density") for row in rows),
        lost=sum(point.lost for cell, point in scored if cell.metric != PERPLEXITY),
        questions=sum(point.questions for cell, point in scored if cell.metric != PERPLEXITY),
        prefill_s=_mean(point.prefill_s for point in longest),
        decode_s=_mean(point.decode_s for point in longest),
        peak_rss=max((point.peak_rss for point in longest if point.peak_rss is not None), default=None),
        bytes_full=_mean(point.bytes_full for point in longest),
        bytes_kept=_mean(point.bytes_kept for point in longest),
        share_map=_share_map(rows),
    )


def _point(rows: Sequence[Row]) -> Point:
    """The rows of one method, budget and cell as one: several only when there are several seeds."""
    weights = [max(int(row.get("questions") or row.get("n") or 1), 1) for row in rows]
    return Point(
        estimate=_average([_estimate(row) for row in rows], weights),
        contexts=sum(int(row.get("n") or 0) for row in rows),
        questions=sum(int(row.get("questions") or 0) for row in rows),
        lost=sum(int(row.get("worse_than_full") or 0) for row in rows),
        bytes_full=_mean(row.get("bytes_full") for row in rows) or 0.0,
        bytes_kept=_mean(row.get("bytes_kept") for row in rows) or 0.0,
        prefill_s=_mean(row.get("prefill_s") for row in rows),
        decode_s=_mean(row.get("decode_s_per_token") for row in rows),
        peak_rss=max((row["peak_rss_bytes"] for row in rows if row.get("peak_rss_bytes") is not None), default=None),
    )


def _estimate(row: Row) -> Estimate:
    """A row without an interval gets the widest one, 0 to 1: not knowing must not look like being sure."""
    low, high = row.get("low"), row.get("high")
    return Estimate(float(row["score"]), 0.0 if low is None else float(low), 1.0 if high is None else float(high))


def _average(parts: Sequence[Estimate], weights: Sequence[float] | None = None) -> Estimate:
    """The weighted mean of independent estimates; each side's width adds in squares."""
    weights = [1.0] * len(parts) if weights is None else list(weights)
    total = sum(weights)
    score = sum(weight * part.score for weight, part in zip(weights, parts, strict=True)) / total
    below = math.hypot(*(w * (part.score - part.low) for w, part in zip(weights, parts, strict=True))) / total
    above = math.hypot(*(w * (part.high - part.score) for w, part in zip(weights, parts, strict=True))) / total
    return Estimate(score, score - below, score + above)


def _budgets(entries: Sequence[Entry]) -> list[Budget]:
    """Largest budget last: one reads from the most severe cut to the mildest, as the charts do."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.label, []).append(entry)
    budgets = [Budget(group[0].keep, label, sorted(group, key=_rank)) for label, group in groups.items()]
    return sorted(budgets, key=lambda budget: (_mean(entry.share for entry in budget.entries) or 0.0, budget.label))


def _rank(entry: Entry) -> tuple[float, float, str]:
    """Best average first, ties by the worst task, then by name; no average comes last."""
    if entry.average is None or entry.worst is None:
        return (1.0, 0.0, entry.method)
    return (-entry.average.score, -entry.worst[1].estimate.score, entry.method)


def _share_map(rows: Sequence[Row]) -> ShareMap | None:
    """The share kept per layer and KV head, averaged over the rows that have the same shape as the first."""
    maps = [row["kept_share"] for row in rows if row.get("kept_share")]
    if not maps:
        return None
    shape = _shape(maps[0])
    same = [item for item in maps if _shape(item) == shape]
    return [
        None if heads is None else [sum(item[layer][head] for item in same) / len(same) for head in range(heads)]
        for layer, heads in enumerate(shape)
    ]


def _shape(share_map: ShareMap) -> list[int | None]:
    return [None if layer is None else len(layer) for layer in share_map]


def keep_label(row: Row) -> str:
    """How a budget is written: "25 %", "512 tokens", or the row's own label for anything else."""
    keep = row["keep"]
    if isinstance(keep, float):
        return f"{100 * keep:.4g} %"
    if isinstance(keep, int):
        return f"{keep} tokens"
    return str(row.get("keep_label") or keep)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None
