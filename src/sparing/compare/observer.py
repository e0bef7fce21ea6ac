"""The driver of all measuring: which contexts are still to be read by whom, done by a pool, and kept on disk.

What came of a context is stored the moment it is there, in `contexts/` beside the results: work that was interrupted
goes on at the first context that is missing, whoever asks for it next.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import cast

from sparing.compare.cells import GATE, Cell, Contestant, Observation
from sparing.compare.example import Example
from sparing.compare.store import ResultStore, row_key
from sparing.compare.worker import ContextWorker, Done, Facts, Introduction, Job
from sparing.errors import MethodRefusedError
from sparing.loading import ModelSpec
from sparing.scale.pool import Cluster, Pool

FOLDER = "contexts"
Wanted = tuple[int, int, Sequence[Contestant]]


class Observer:
    """Observations of contestants on contexts, each made once.

    Args:
        spec: the model. cells: what is read. seed: of the tasks.
        folder: observations are kept in its folder `contexts`.
        cluster: where the work is done; by default in this process.
        progress: called with each cell when one of its contexts is done.

    Attributes:
        facts: what a worker says of its model; None before anybody was introduced.
        example: what was kept of the context that was to be shown.
        seconds: that each job took which was done now.
    """

    def __init__(
        self,
        spec: ModelSpec,
        cells: Sequence[Cell],
        seed: int,
        folder: Path,
        cluster: Cluster | None = None,
        progress: Callable[[Cell], None] = lambda cell: None,
    ) -> None:
        self.spec, self.cells, self.seed, self.progress = spec, list(cells), seed, progress
        self.facts: Facts | None = None
        self._parameters: dict[Contestant, str] = {}
        self.example: Example | None = None
        self.seconds: dict[Job, float] = {}
        self._pool: Pool[Job | Introduction, Done | Facts] = Pool(
            functools.partial(ContextWorker, spec, tuple(cells), seed), cluster
        )
        self._folder = folder / FOLDER
        self._store: ResultStore | None = None
        self._known: dict[str, Observation] = {}

    def __enter__(self) -> Observer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.__exit__(kind, error, trace)
        if self._store is not None:
            self._store.close()

    @property
    def size(self) -> int:
        """How many contexts are read at a time."""
        return self._pool.size

    def introduce(self, contestants: Iterable[Contestant]) -> dict[Contestant, MethodRefusedError]:
        """Have a worker meet contestants: those that can't work on the model, and why.

        Nothing is written before the first time that this has gone well.

        Raises:
            SparingError: the model can't be loaded, a contestant's text is no method, or the folder can't be written.
        """
        new = (GATE, *contestants)
        ((_, facts),) = self._pool.run([Introduction(new)])
        self.facts = cast(Facts, facts)
        self._parameters.update(zip(new, self.facts.parameters, strict=True))
        if self._store is None:
            self._store = ResultStore(self._folder)
            self._known = {row["key"]: Observation(**row["observation"]) for row in self._store.rows()}
        refused = zip(new, self.facts.refused, strict=True)
        return {contestant: error for contestant, error in refused if error is not None}

    def parameters(self, contestant: Contestant) -> str:
        """A contestant's method with all its values, as text. It must have been introduced."""
        return self._parameters[contestant]

    def observe(self, wanted: Iterable[Wanted], show: tuple[int, int] | None = None) -> None:
        """Have contestants read contexts, unless they did already.

        Args:
            wanted: (number of the cell, number of the context, contestants).
            show: of which context, as (cell, context), to keep an example.

        Raises:
            SparingError: a task does not fit the model, or a method refuses it; what was done before is kept.
        """
        assert self._store is not None, "nobody was introduced"
        for job, done in self._pool.run(self._jobs(wanted, show)):
            job, done = cast(Job, job), cast(Done, done)
            for contestant, observation in zip(job.readers, done.observations, strict=True):
                key = self._key(contestant, job.cell, job.index)
                if key not in self._known:
                    self._store.append({"key": key, "observation": asdict(observation)})
                    self._known[key] = observation
            self.example = done.example or self.example
            self.seconds[job] = done.seconds
            self.progress(self.cells[job.cell])

    def _jobs(self, wanted: Iterable[Wanted], show: tuple[int, int] | None) -> Iterable[Job]:
        for cell, index, contestants in wanted:
            missing = tuple(c for c in contestants if not self.has(c, cell, index))
            if missing:
                yield Job(cell, index, missing, (cell, index) == show)

    def has(self, contestant: Contestant, cell: int, index: int) -> bool:
        """True if that was observed."""
        return self._key(contestant, cell, index) in self._known

    def get(self, contestant: Contestant, cell: int, index: int) -> Observation:
        """What was observed."""
        return self._known[self._key(contestant, cell, index)]

    def _key(self, contestant: Contestant, number: int, index: int) -> str:
        assert self.facts is not None, "nobody was introduced"
        cell = self.cells[number]
        return row_key(
            {
                "model": self.spec.name,
                "fingerprint": self.facts.fingerprint,
                "method": self.parameters(contestant),
                "task": cell.task.label,
                "mode": cell.mode,
                "length": cell.length,
                "context": index,
                "seed": self.seed,
            }
        )
