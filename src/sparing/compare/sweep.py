"""The sweep: every method at every budget on every cell, and a row for each.

The full cache runs in every cell. Rows are written when a cell is done; a sweep that was interrupted goes on at the
first context that is missing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from sparing.compare.cells import GATE, Cell, Contestant, Observation, mean_shares, shown
from sparing.compare.observer import Observer
from sparing.compare.store import ResultStore, Row
from sparing.tasks import bootstrap, context_means, wilson


class Sweep:
    """Runs cells and writes their rows.

    Args:
        observer: of the cells. contestants: methods at budgets, the full cache not among them (it always runs).
        store: where rows go.
    """

    def __init__(self, observer: Observer, contestants: Sequence[Contestant], store: ResultStore) -> None:
        self.observer, self.store = observer, store
        self.contestants = [GATE, *contestants]

    def missing(self) -> list[int]:
        """The numbers of the cells of which a row is missing."""
        done = self.store.done()
        cells = range(len(self.observer.cells))
        return [n for n in cells if any(self.key(c, n) not in done for c in self.contestants)]

    def run(self) -> None:
        """Run all cells whose rows are not all there.

        Raises:
            SparingError: a task does not fit the model, or a method refuses it; what was done before stays.
        """
        done = self.store.done()
        for number in self.missing():
            contexts = self.observer.cells[number].contexts
            self.observer.observe(((number, index, self.contestants) for index in contexts), shown(self.observer.cells))
            for row in self.rows(number):
                if row["key"] not in done:
                    self.store.append(row)
                    done.add(row["key"])  # two texts may mean one method

    def rows(self, number: int) -> list[Row]:
        """The rows of a cell, all of whose contexts have been read."""
        cell = self.observer.cells[number]
        seen = {c: [self.observer.get(c, number, index) for index in cell.contexts] for c in self.contestants}
        return [self._facts(c, number) | measured(cell, seen[c], seen[GATE]) for c in seen]

    def key(self, contestant: Contestant, number: int) -> str:
        """Of the row of a contestant on a cell."""
        return self.observer.key(contestant, number, contexts=self.observer.cells[number].contexts)

    def _facts(self, contestant: Contestant, number: int) -> Row:
        return {
            "key": self.key(contestant, number),
            **self.observer.identity(contestant, number),
            "parameters": self.observer.parameters(contestant),
            "keep": contestant.keep,
            "keep_label": contestant.keep_label,
        }


def measured(cell: Cell, mine: Sequence[Observation], full: Sequence[Observation]) -> dict[str, Any]:
    """The part of a row that observations on the contexts of a cell make; `full`: those of the full cache."""
    is_likelihood = cell.task.kind == "likelihood"
    scores = [seen.scores for seen in mine]
    interval = (bootstrap if is_likelihood else wilson)(context_means(scores))
    steps = sum(seen.decode_steps for seen in mine)
    read, density = _all(mine, "read"), _all(mine, "density")
    return {
        "n": interval.n,
        "questions": sum(len(each) for each in scores),
        "metric": "1/perplexity" if is_likelihood else cell.task.metric,
        "score": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "bytes_full": round(statistics.mean(_all(mine, "bytes_full"))),
        "bytes_kept": round(statistics.mean(_all(mine, "bytes_kept"))),
        "read_share": statistics.mean(read) if read else None,
        "density": statistics.mean(density) if density else None,
        "prefill_s": statistics.median(_all(mine, "prefill")),
        "decode_s_per_token": sum(seen.decode_seconds for seen in mine) / steps if steps else None,
        "peak_rss_bytes": max(seen.peak for seen in mine) or None,
        "kept_share": mean_shares([seen.shares for seen in mine]),
        "worse_than_full": _worse(scores, [seen.scores for seen in full]),
        "warning": None,
    }


def _all(observations: Sequence[Observation], name: str) -> list[float]:
    """The values of all contexts in one list."""
    return [value for seen in observations for value in getattr(seen, name)]


def _worse(scores: Sequence[Sequence[float]], full: Sequence[Sequence[float]]) -> int:
    """Questions that the full cache answered better."""
    pairs = ((a, b) for mine, theirs in zip(scores, full, strict=True) for a, b in zip(mine, theirs, strict=True))
    return sum(mine < theirs and not math.isclose(mine, theirs) for mine, theirs in pairs)
