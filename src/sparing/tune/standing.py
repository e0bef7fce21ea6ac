"""What is known of a candidate after some contexts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparing.compare.cells import GATE, Contestant, Observation
from sparing.compare.observer import Observer
from sparing.compare.sweep import measured
from sparing.tasks import Interval, context_means
from sparing.tune.loss import mean_loss, paired_loss

FINALISTS = 3
# Number of a cell → the numbers of its contexts.
Contexts = Mapping[int, Sequence[int]]


@dataclass(frozen=True)
class Standing:
    """A candidate on the contexts that it has read.

    Attributes:
        loss: mean over cells, see `tune.loss`. worst: the largest loss on a cell, and the cell.
        score, full: mean score over cells, its own and the full cache's. n: contexts of a cell.
        share: bytes held of the full cache's. bytes_kept: most that a prompt held.
        decode_s: seconds per decoded token; None if nothing was decoded. prefill_s: median until the first token.
        rows: what each cell's row would be.
    """

    contestant: Contestant
    loss: Interval
    worst: tuple[float, str]
    score: float
    full: float
    share: float
    bytes_kept: int
    decode_s: float | None
    prefill_s: float
    rows: list[dict[str, Any]]

    @property
    def n(self) -> int:
        """Contexts of a cell."""
        return self.loss.n

    @property
    def label(self) -> str:
        """The method and its budget, for people."""
        keep = self.contestant.keep
        return (
            f"{self.contestant.name} at keep {keep:.3g}"
            if isinstance(keep, float)
            else f"{self.contestant.name} at {keep}"
        )


def standing(observer: Observer, contestant: Contestant, contexts: Contexts) -> Standing:
    """How a contestant stands, who has read these contexts, as the full cache has."""
    losses, rows, mine_all = [], [], []
    for number, indices in contexts.items():
        cell = observer.cells[number]
        full = [observer.get(GATE, number, index) for index in indices]
        mine = [observer.get(contestant, number, index) for index in indices]
        theirs, own = (context_means([seen.scores for seen in each]) for each in (full, mine))
        losses.append(paired_loss(theirs, own, likelihood=cell.task.kind == "likelihood"))
        facts = {"task": cell.task.label, "mode": cell.mode, "length": cell.length, "full": statistics.mean(theirs)}
        rows.append(facts | measured(cell, mine, full))
        mine_all += mine
    worst = max(zip((each.mean for each in losses), contexts, strict=True))
    steps = sum(seen.decode_steps for seen in mine_all)
    return Standing(
        contestant=contestant,
        loss=mean_loss(losses),
        worst=(worst[0], observer.cells[worst[1]].label),
        score=statistics.mean(row["score"] for row in rows),
        full=statistics.mean(row["full"] for row in rows),
        share=_sum(mine_all, "bytes_kept") / _sum(mine_all, "bytes_full"),
        bytes_kept=max(held for seen in mine_all for held in seen.bytes_kept),
        decode_s=sum(seen.decode_seconds for seen in mine_all) / steps if steps else None,
        prefill_s=statistics.median(seconds for seen in mine_all for seconds in seen.prefill),
        rows=rows,
    )


def best_of_each(standings: Iterable[Standing], value: Callable[[Standing], float]) -> list[Standing]:
    """The best of each text, of the best `FINALISTS` texts; the least value first."""
    best: dict[str, Standing] = {}
    for each in sorted(standings, key=value):
        best.setdefault(each.contestant.name, each)
    return list(best.values())[:FINALISTS]


def _sum(observations: Sequence[Observation], name: str) -> int:
    return sum(value for seen in observations for value in getattr(seen, name))
