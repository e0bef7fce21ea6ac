"""Every KV method on the bundled model: score against bytes held, average and worst task, both modes, several seeds.

Runs `sparing compare` once per seed into one folder (it goes on where it was interrupted), and reads the rows with the
library's own summary, so gates and averages are those of the report. Needs matplotlib for the picture.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from common import command, hardware, header_text, table, versions, write
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sparing.compare.report.summary import Entry, Section, summary
from sparing.core.method import methods

ROOT = Path(__file__).parent.parent
NAMED = 7  # methods of a mode that the picture names
TASKS = "needle_single,needle_multikey,kv_retrieval,perplexity"


def main() -> None:
    options = _options()
    named = ",".join(_measured(name, options.out) for name in options.methods.split(","))
    for seed in range(options.seeds):
        arguments = ["--model", "bundled", "--methods", named, "--keep", options.keep, "--tasks", TASKS]
        arguments += ["--samples", str(options.samples), "--seed", str(seed), "--out", str(options.out)]
        subprocess.run(
            [sys.executable, "-c", "from sparing.cli import main; main()", "compare", *arguments], check=True
        )
    rows = [json.loads(line) for line in (options.out / "results.jsonl").read_text("utf-8").splitlines()]
    sections = summary(rows)
    result = {
        "command": command(), "hardware": hardware(), "versions": versions("sparing", "torch", "transformers"),
        "seed": f"0 to {options.seeds - 1}", "date": date.today().isoformat(),
        "entries": [_row(section, entry) for section in sections for entry in section.entries],
    }  # fmt: skip
    parts = [header_text("KV methods: score against bytes held", result), *map(_markdown, sections)]
    write("kv_frontier", result, "\n\n".join(parts))
    _picture(sections).savefig(ROOT / "docs" / "kv_frontier.svg", metadata={"Date": None})


def _measured(name: str, folder: Path) -> str:
    """The method as text; one that needs measurements of the model gets them, made on synthetic data."""
    if not methods()[name.partition("(")[0]].needs:
        return name
    file = folder / f"{name}.safetensors"
    if not file.exists():
        _sparing("calibrate", "--model", "bundled", "--method", name, "--out", str(file))
    return f"{name}(scores={file})"


def _sparing(*words: str) -> None:
    subprocess.run([sys.executable, "-c", "from sparing.cli import main; main()", *words], check=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    # SpecKV needs a draft model, which the bundled model does not have.
    names = [*(name for name, info in methods().items() if not info.python_only), "adakv(bits=4)", "kvzip(bits=4)"]
    parser.add_argument("--methods", default=",".join(names))
    parser.add_argument("--keep", default="0.1,0.25,0.5")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "kv_frontier")
    return parser.parse_args()


# -- the table ------------------------------------------------------------------------------------------------------


def _markdown(section: Section) -> str:
    """The methods of a mode, best average at 25 % first, with the worst task beside the average at every budget."""
    labels = [budget.label for budget in section.budgets]
    head = ["method", *(f"{label}: bytes, average (worst)" for label in labels)]
    best = {
        name: max((e.average.score for e in section.of(name) if e.average), default=-1.0) for name in _names(section)
    }
    lines = []
    for name in sorted(best, key=lambda name: (-_at(section, name, "25 %"), -best[name], name)):
        by_label = {entry.label: entry for entry in section.of(name)}
        lines.append([short(name), *(_cell(by_label.get(label)) for label in labels)])
    full = section.full
    intact = "" if full is None or full.average is None else f", full cache {full.average.score:.2f}"
    counted = ", ".join(cell.label for cell in section.counted)
    return f"## {section.mode}{intact}\n\n{counted}; n = {section.contexts} contexts a task\n\n{table(head, lines)}"


def short(name: str) -> str:
    """A method without the file of its measurement."""
    return re.sub(r"\(scores=[^,)]*\)", "", name)


def _names(section: Section) -> list[str]:
    return [name for name in section.methods if section.of(name)]


def _at(section: Section, name: str, label: str) -> float:
    entry = next((entry for entry in section.of(name) if entry.label == label), None)
    return entry.average.score if entry is not None and entry.average is not None else -1.0


def _cell(entry: Entry | None) -> str:
    if entry is None or entry.average is None or entry.worst is None or entry.share is None:
        return "–"
    return f"{entry.share:.0%}, {entry.average.score:.2f} ({entry.worst[1].estimate.score:.2f})"


def _row(section: Section, entry: Entry) -> dict[str, Any]:
    average, worst = entry.average, entry.worst
    return {
        "mode": section.mode, "method": short(entry.method), "keep": entry.label, "bytes_share": entry.share,
        "average": None if average is None else [average.score, average.low, average.high],
        "worst": None if worst is None else [worst[0].label, worst[1].estimate.score],
        "prefill_s": entry.prefill_s, "decode_s_per_token": entry.decode_s,
    }  # fmt: skip


# -- the picture ----------------------------------------------------------------------------------------------------


def _picture(sections: Sequence[Section]) -> Figure:
    """Average above, worst task below, a column per mode; the best methods by name, the others in grey."""
    figure = Figure(figsize=(5.4 * len(sections), 9.0), layout="constrained")
    plots = figure.subplots(2, len(sections), squeeze=False, sharey=True)
    best = [name for section in sections for name in _best(section)]
    colours = {name: f"C{at % 10}" for at, name in enumerate(dict.fromkeys(best))}
    for column, section in enumerate(sections):
        for row, kind in enumerate(("average", "worst task")):
            _panel(plots[row][column], section, kind, colours)
    handles = {short(name): line for name, line in zip(colours, _samples(colours), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=8)
    return figure


def _best(section: Section) -> list[str]:
    """The methods with the best averages at 25 %, of those that free memory."""
    freeing = [name for name in _names(section) if max(entry.share or 0 for entry in section.of(name)) < 0.95]
    return sorted(freeing, key=lambda name: -_at(section, name, "25 %"))[:NAMED]


def _samples(colours: dict[str, str]) -> list[Line2D]:
    return [Line2D([], [], color=colour, marker="o", markersize=4) for colour in colours.values()]


def _panel(axes: Any, section: Section, kind: str, colours: dict[str, str]) -> None:
    for name in _names(section):
        shown = name in colours
        style = {"color": colours.get(name, "0.8"), "zorder": 3 if shown else 1, "linewidth": 1.4 if shown else 0.7}
        line = _points(section, name, kind)
        axes.plot(*zip(*line, strict=True), marker="o", markersize=4 if shown else 2.5, **style)
    axes.set_xscale("log")
    axes.set_xticks([0.05, 0.1, 0.25, 0.5, 1.0], ["5 %", "10 %", "25 %", "50 %", "100 %"])
    axes.minorticks_off()
    axes.set(title=f"{section.mode}: {kind}", xlabel="share of cache bytes held", ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)


def _points(section: Section, name: str, kind: str) -> list[tuple[float, float]]:
    found = []
    for entry in section.of(name):
        if entry.share is None or entry.average is None or entry.worst is None:
            continue
        found.append((entry.share, entry.average.score if kind == "average" else entry.worst[1].estimate.score))
    return sorted(found) or [(float("nan"), float("nan"))]


if __name__ == "__main__":
    main()
