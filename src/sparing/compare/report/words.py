"""Numbers and results in plain words: used by the table of the command line and by the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparing.compare.report.summary import GATE, PERPLEXITY, Budget, Cell, Entry, Section

NAMES_SHOWN = 3
SAME_BUDGET = 0.02  # shares of bytes further apart than this are not the same budget
NO_VALUE = "–"


def number(value: float | None, digits: int = 2) -> str:
    """The number with so many digits after the point; a dash for None."""
    return NO_VALUE if value is None else f"{value:.{digits}f}"


def digits(section: Section) -> int:
    """Digits after the point that tell averages apart: more for 1/perplexity than for accuracy."""
    return 4 if section.counted and all(cell.metric == PERPLEXITY for cell in section.counted) else 2


def percent(share: float | None) -> str:
    """0.25 → "25 %", with one digit after the point below 10 % unless it is whole."""
    if share is None:
        return NO_VALUE
    value = share * 100
    short = value >= 10 or abs(value - round(value)) < 0.05
    return f"{value:.0f} %" if short else f"{value:.1f} %"


# Columns for methods that do less than all, and their headings.
PARTS = {"read": "of it read", "density": "prompt read"}


def read(share: float | None) -> str:
    """What a decoded token reads of what is kept, or what of a prompt's attention is computed."""
    return "all" if share is None else percent(share)


def byte_size(value: float | None) -> str:
    """1536 → "1.5 KiB"."""
    if value is None:
        return NO_VALUE
    power = min(4, max(0, (int(value).bit_length() - 1) // 10))
    size, unit = value / 1024**power, ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{size:.0f} {unit}" if power == 0 or size >= 100 else f"{size:.1f} {unit}"


def milliseconds(seconds: float | None) -> str:
    """Seconds as milliseconds, one digit after the point."""
    return NO_VALUE if seconds is None else f"{seconds * 1000:.1f}"


def keep_words(keep: Any, label: str, computes_less: Sequence[bool] = ()) -> str:
    """How a sentence begins: "At 25 % of the cache", "At 512 tokens", "At 64MiB".

    Args:
        computes_less: of every method, True if it keeps the whole cache and computes less of the prompt's attention.
    """
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        return f"At {label}"
    if isinstance(keep, int):
        return f"At {keep} tokens"
    if not any(computes_less):
        return f"At {percent(keep)} of the cache"
    whole = "the prompt's attention" if all(computes_less) else "the cache or of the prompt's attention"
    return f"At {percent(keep)} of {whole}"


def names(items: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and 3 more"."""
    if len(items) <= NAMES_SHOWN:
        return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
    return f"{', '.join(items[: NAMES_SHOWN - 1])} and {len(items) - NAMES_SHOWN + 1} more"


def recommend(section: Section, budget: Budget) -> str:
    """What the rows say about one budget, and what they can't tell."""
    start = keep_words(budget.keep, budget.label, [only_computes_less(entry) for entry in budget.entries])
    ranked = [entry for entry in budget.entries if entry.average is not None]
    if not section.counted:
        return f"{start}: nothing can be said, because no task passed the gate (see the notes)."
    if not ranked:
        return f"{start}: nothing can be said yet, because no method has run on every task."
    best = ranked[0]
    text = f"{start}: {best.method} {_verb(ranked, section)} ({_figures(best, section)})"
    others = ranked[1:]
    parts = [
        text,
        _rivals(best, others, section),
        _better_worst(best, others, digits(section)),
        _unequal(budget),
    ]
    return "; ".join(part for part in parts if part) + "."


def _verb(ranked: Sequence[Entry], section: Section) -> str:
    best, full = ranked[0], section.full
    if full is not None and full.average is not None and best.average is not None:
        if best.average.score >= full.average.score:
            return "scores no lower than the full cache"
        if not best.average.overlaps(full.average) and len(ranked) > 1:
            return "loses least, and even it loses clearly"
    return "loses least" if len(ranked) > 1 else "has no rival here"


def _figures(entry: Entry, section: Section) -> str:
    if entry.average is None or entry.worst is None:
        return ""
    cell, point = entry.worst
    places = digits(section)
    text = f"{entry.average.score:.{places}f} on {cell.label}"
    if len(section.counted) > 1:
        worst = f"worst {point.estimate.score:.{places}f} on {cell.label}"
        text = f"average {entry.average.score:.{places}f}, {worst}"
    full = section.full.average if section.full is not None else None
    return text + (f"; full cache {full.score:.{places}f}" if full is not None else "")


def _rivals(best: Entry, others: Sequence[Entry], section: Section) -> str:
    """Which methods this run can't tell from the best."""
    if not others or best.average is None:
        return ""
    close = [entry.method for entry in others if entry.average is not None and best.average.overlaps(entry.average)]
    if not close:
        return "no other method's interval reaches it"
    each = "each interval overlaps" if len(close) > 1 else "the intervals overlap"
    return f"n={section.contexts} can't tell it apart from {names(close)} ({each})"


def _better_worst(best: Entry, others: Sequence[Entry], places: int) -> str:
    """Another method may be safer on its worst task than the one with the best average."""
    scored = [(entry.worst[1].estimate.score, entry) for entry in others if entry.worst is not None]
    if not scored or best.worst is None:
        return ""
    score, entry = max(scored, key=lambda item: item[0])
    if round(score, places) <= round(best.worst[1].estimate.score, places) or entry.worst is None:
        return ""
    return f"the best worst task is {entry.method}'s ({score:.{places}f} on {entry.worst[0].label})"


def _unequal(budget: Budget) -> str:
    """Methods at one nominal budget may keep different bytes; then the comparison isn't even."""
    known = [(entry.share, entry.method) for entry in budget.entries if entry.share is not None]
    if not known:
        return ""
    (least, thrifty), (most, greedy) = min(known), max(known)
    if most - least <= SAME_BUDGET:
        return ""
    readers = [entry.method for entry in budget.entries if entry.read is not None or only_computes_less(entry)]
    if readers:
        verb = "free" if len(readers) > 1 else "frees"
        reading = f"{names(readers)} {verb} no memory and only read{'' if len(readers) > 1 else 's'} less"
        rest = [pair for pair in known if pair[1] not in readers]
        if not rest or max(rest)[0] - min(rest)[0] <= SAME_BUDGET:
            return f"not an even comparison: {reading}"
    return f"not an even comparison: {greedy} kept {percent(most)} of the bytes, {thrifty} {percent(least)}"


def only_computes_less(entry: Entry) -> bool:
    """Whether a method frees no memory and leaves out attention."""
    return entry.density is not None and entry.share is not None and entry.share > 1 - SAME_BUDGET


def spent(section: Section) -> str:
    """What the horizontal axis of the charts is."""
    savers = {only_computes_less(entry) for budget in section.budgets for entry in budget.entries}
    names_of = {False: "share of cache bytes kept", True: "share of the prompt's attention computed"}
    return " or ".join(names_of[saver] for saver in sorted(savers)) or names_of[False]


def gate_notes(section: Section) -> list[str]:
    """One sentence per cell that is left out of average and worst, and why."""
    notes = []
    for cell in section.cells:
        if cell.gate == "failed" and cell.full is not None:
            notes.append(
                f"{cell.label}: the full cache itself scores only {cell.full:.2f} (gate: {GATE}). "
                "Differences between methods on it are noise; it is left out of average and worst."
            )
        elif cell.gate == "missing":
            notes.append(f"{cell.label}: the full cache has not run yet; it is left out of average and worst.")
    if any(cell.metric == PERPLEXITY and cell not in section.counted for cell in section.cells):
        tasks = list(dict.fromkeys(cell.task for cell in section.cells if cell.metric == PERPLEXITY))
        notes.append(f"{names(tasks)}: measured in {PERPLEXITY}, another unit; shown, but not in average and worst.")
    return notes


def other_notes(section: Section) -> list[str]:
    """Methods without an average, and the warnings of the rows."""
    notes = []
    for budget in section.budgets:
        short = [entry.method for entry in budget.entries if entry.average is None]
        if short and section.counted:
            notes.append(f"{budget.label}: {names(short)} did not run on every counted task, so there is no average.")
    for text, count in section.warnings:
        notes.append(f"Warning in {count} row{'s' if count > 1 else ''}: {text}")
    return notes


def is_excluded(cell: Cell) -> bool:
    """Whether a cell is marked in tables and charts as noise."""
    return cell.gate in ("failed", "missing")
