"""What the frontier benchmarks share: `sparing compare` over several seeds; score against cost as table and picture.

The rows are read with the library's own summary, so gates and averages are those of the report. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import conditions, header_text, table, write
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sparing.compare.report.summary import Entry, Section, summary
from sparing.core.method import methods
from sparing.core.parsing import split_methods

ROOT = Path(__file__).parent.parent
NAMED = 7  # methods of a mode that the picture names


@dataclass(frozen=True)
class Cost:
    """What a budget costs.

    Attributes:
        field: of an `Entry`. word: its heading in the table. label: of the picture's axis.
    """

    field: str
    word: str
    label: str

    def of(self, entry: Entry) -> float | None:
        """The cost of an entry."""
        value: float | None = getattr(entry, self.field)
        return value


def options(name: str, names: Iterable[str], document: str | None) -> argparse.Namespace:
    """The arguments of a frontier benchmark."""
    parser = argparse.ArgumentParser(description=document)
    parser.add_argument("--methods", default=",".join(names))
    parser.add_argument("--keep", default="0.1,0.25,0.5")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lengths", default="1024")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / name)
    return parser.parse_args()


def rows(given: argparse.Namespace, tasks: str) -> list[dict[str, Any]]:
    """Compare once per seed, all into one folder; goes on where it was interrupted."""
    named = ",".join(_measured(name, given.out) for name in split_methods(given.methods))
    for seed in range(given.seeds):
        words = ["--model", "bundled", "--methods", named, "--keep", given.keep, "--tasks", tasks]
        words += ["--lengths", given.lengths, "--samples", str(given.samples), "--seed", str(seed)]
        _sparing("compare", *words, "--out", str(given.out))
    return [json.loads(line) for line in (given.out / "results.jsonl").read_text("utf-8").splitlines()]


def _measured(text: str, folder: Path) -> str:
    """The method as text; one that needs measurements of the model gets them, made on synthetic data."""
    name = re.split(r"[(+&]", text)[0]
    if not methods()[name].needs:
        return text
    file = folder / f"{name}.safetensors"
    if not file.exists():
        _sparing("calibrate", "--model", "bundled", "--method", name, "--out", str(file))
    head, bracket, rest = text.partition("(")
    return f"{head}(scores={file}{',' if bracket else ')'}{rest}"


def _sparing(*words: str) -> None:
    subprocess.run([sys.executable, "-c", "from sparing.cli import main; main()", *words], check=True)


def write_down(name: str, title: str, found: list[dict[str, Any]], seeds: int, cost: Cost, more: str = "") -> None:
    """Table, numbers and picture of the rows."""
    sections = summary(found)
    entries = [_row(section, entry, cost) for section in sections for entry in section.entries]
    result = conditions(f"0 to {seeds - 1}") | {"entries": entries}
    parts = [header_text(title, result), *(_markdown(section, cost) for section in sections), *([more] if more else [])]
    write(name, result, "\n\n".join(parts))
    _picture(sections, cost).savefig(ROOT / "docs" / f"{name}.svg", metadata={"Date": None})


# -- the table ------------------------------------------------------------------------------------------------------


def _markdown(section: Section, cost: Cost) -> str:
    """The methods of a mode, best average at 25 % first, with the worst task beside the average at every budget."""
    labels = [budget.label for budget in section.budgets]
    head = ["method", *(f"{label}: {cost.word}, average (worst)" for label in labels)]
    best = {
        name: max((e.average.score for e in section.of(name) if e.average), default=-1.0) for name in _names(section)
    }
    lines = []
    for name in sorted(best, key=lambda name: (-_at(section, name, "25 %"), -best[name], name)):
        by_label = {entry.label: entry for entry in section.of(name)}
        lines.append([short(name), *(_cell(by_label.get(label), cost) for label in labels)])
    full = section.full
    intact = "" if full is None or full.average is None else f", full cache {full.average.score:.2f}"
    counted = ", ".join(cell.label for cell in section.counted)
    return f"## {section.mode}{intact}\n\n{counted}; n = {section.contexts} contexts a task\n\n{table(head, lines)}"


def short(name: str) -> str:
    """A method without the file of its measurement."""
    return re.sub(r"scores=[^,)]*,?", "", name).replace("()", "")


def bare(name: str) -> str:
    """A method without its fields."""
    return re.sub(r"\([^)]*\)", "", name)


def _names(section: Section) -> list[str]:
    return [name for name in section.methods if section.of(name)]


def _at(section: Section, name: str, label: str) -> float:
    entry = next((entry for entry in section.of(name) if entry.label == label), None)
    return entry.average.score if entry is not None and entry.average is not None else -1.0


def _cell(entry: Entry | None, cost: Cost) -> str:
    if entry is None or entry.average is None or entry.worst is None or cost.of(entry) is None:
        return "–"
    return f"{cost.of(entry):.0%}, {entry.average.score:.2f} ({entry.worst[1].estimate.score:.2f})"


def _row(section: Section, entry: Entry, cost: Cost) -> dict[str, Any]:
    average, worst = entry.average, entry.worst
    return {
        "mode": section.mode, "method": short(entry.method), "keep": entry.label, cost.word: cost.of(entry),
        "average": None if average is None else [average.score, average.low, average.high],
        "worst": None if worst is None else [worst[0].label, worst[1].estimate.score],
        "prefill_s": entry.prefill_s, "decode_s_per_token": entry.decode_s,
    }  # fmt: skip


# -- the picture ----------------------------------------------------------------------------------------------------


def _picture(sections: Sequence[Section], cost: Cost) -> Figure:
    """Average above, worst task below, a column per mode; the best methods by name, the others in grey."""
    figure = Figure(figsize=(5.4 * len(sections), 9.0), layout="constrained")
    plots = figure.subplots(2, len(sections), squeeze=False, sharey=True)
    best = [name for section in sections for name in _best(section, cost)]
    palette = colormaps["tab10" if len(set(best)) <= 10 else "tab20"].colors
    colours = dict(zip(dict.fromkeys(best), palette, strict=False))
    for column, section in enumerate(sections):
        for row, kind in enumerate(("average", "worst task")):
            _panel(plots[row][column], section, kind, colours, cost)
    handles = [Line2D([], [], color=colour, marker="o", markersize=4) for colour in colours.values()]
    figure.legend(handles, [bare(name) for name in colours], loc="outside lower center", ncols=5, fontsize=8)
    return figure


def _best(section: Section, cost: Cost) -> list[str]:
    """The methods with the best averages at 25 %, of those that save anything."""
    saving = [name for name in _names(section) if max(cost.of(entry) or 1 for entry in section.of(name)) < 0.95]
    means = {
        name: statistics.mean(entry.average.score if entry.average else 0.0 for entry in section.of(name))
        for name in saving
    }
    return sorted(saving, key=lambda name: (-_at(section, name, "25 %"), -means[name]))[:NAMED]


def _panel(axes: Any, section: Section, kind: str, colours: dict[str, Any], cost: Cost) -> None:
    for name in _names(section):
        shown = name in colours
        style = {"color": colours.get(name, "0.8"), "zorder": 3 if shown else 1, "linewidth": 1.4 if shown else 0.7}
        line = _points(section, name, kind, cost)
        axes.plot(*zip(*line, strict=True), marker="o", markersize=4 if shown else 2.5, **style)
    axes.set_xscale("log")
    axes.set_xticks([0.05, 0.1, 0.25, 0.5, 1.0], ["5 %", "10 %", "25 %", "50 %", "100 %"])
    axes.minorticks_off()
    axes.set(title=f"{section.mode}: {kind}", xlabel=cost.label, ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)


def _points(section: Section, name: str, kind: str, cost: Cost) -> list[tuple[float, float]]:
    found = []
    for entry in section.of(name):
        at = cost.of(entry)
        if at is None or entry.average is None or entry.worst is None:
            continue
        found.append((at, entry.average.score if kind == "average" else entry.worst[1].estimate.score))
    return sorted(found) or [(float("nan"), float("nan"))]
