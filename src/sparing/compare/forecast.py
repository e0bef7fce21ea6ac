"""What a sweep will take before it starts: one context of every cell is read, and the rest is simulated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparing.compare.cells import GATE, Contestant, shown
from sparing.compare.observer import Observer
from sparing.scale.plan import Forecast, simulate


@dataclass(frozen=True)
class Outlook:
    """What is to come.

    Attributes:
        seconds: of every context that is still to be read, as long as the one that was read of its cell.
        ready: seconds that a worker took to load the model and meet the contestants.
    """

    seconds: list[float]
    ready: float

    def on(self, workers: int) -> Forecast:
        """With so many workers."""
        return simulate(self.seconds, workers, self.ready)

    def choices(self) -> list[Forecast]:
        """With 1, 2, 4, ... workers, as long as more of them have something to do."""
        counts = [1]
        while counts[-1] < len(self.seconds):
            counts.append(min(2 * counts[-1], len(self.seconds)))
        return [self.on(count) for count in counts]


def look_ahead(observer: Observer, contestants: Sequence[Contestant]) -> Outlook:
    """Read one context of every cell that has contexts left. What comes of it is kept like that of any other.

    Raises:
        SparingError: see `Observer.observe`.
    """
    observer.introduce(contestants)
    everybody = [GATE, *contestants]
    left = observer.left(everybody)
    wanted = ((number, contexts[0], everybody) for number, contexts in enumerate(left) if contexts)
    observer.observe(wanted, shown(observer.cells))
    seconds = [observer.seconds[number] for number, contexts in enumerate(left) for _ in contexts[1:]]
    return Outlook(seconds, observer.ready)
