"""How long a sweep will take on so many workers, and what that costs: a small simulation from measured seconds.

Tasks are given to workers in their order, each to the first one that is free, as `scale.pool` does it. Every worker
first takes the time that it takes to be ready (to load its model). What is not simulated: lost workers, and that
machines that are shared get slower.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Forecast:
    """What a sweep will take.

    Attributes:
        workers: how many, of those asked for, have something to do.
        seconds: from the start to the last result. busy: the sum over workers of the time until each has finished.
        idle: the share of `workers` x `seconds` in which nothing is done.
    """

    tasks: int
    workers: int
    seconds: float
    busy: float
    idle: float

    def cost(self, price: float) -> float:
        """What it costs if every worker is paid until the last result; `price`: of one worker for an hour."""
        return self.workers * self.seconds / 3600 * price


def simulate(seconds: Sequence[float], workers: int, ready: float) -> Forecast:
    """Run tasks of known length on workers.

    Args:
        seconds: of each task, in the order in which they are given out. workers: how many there are.
        ready: seconds until a worker takes its first task.
    """
    count = min(workers, len(seconds))
    free = [ready] * count
    for each in seconds:
        heapq.heapreplace(free, free[0] + each)
    end = max(free, default=0.0)
    busy = sum(seconds) + ready * count
    return Forecast(len(seconds), count, end, busy, 1 - busy / (count * end) if count and end else 0.0)
