"""The driver of all measuring: which contexts are still to be read by whom, done by a pool, and kept on disk.

What came of a context is stored the moment it is there, in `contexts/` beside the results: work that was interrupted
goes on at the first context that is missing, whoever asks for it next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import cast

from sparing.compare.cells import GATE, Cell, Contestant, Observation
from sparing.compare.store import ResultStore, Row, row_key
from sparing.compare.worker import ContextWorker, Done, Facts, Introduction, Job
from sparing.errors import MethodRefusedError
from sparing.loading import ModelSpec
from sparing.scale.pool import Cluster, Pool

FOLDER = "contexts"
EXAMPLES = "examples.json"
Wanted = tuple[int, int, Sequence[Contestant]]


class Observer:
    """Observations of contestants on contexts, each made once.

    Args:
        spec: the model. cells: what is read. seed: of the tasks.
        folder: observations are kept in its folder `contexts`, and the example in its `examples.json`.
        cluster: where the work is done; by default in this process.
        progress: called with each cell when one of its contexts is done.

    Attributes:
        ready: seconds until the first contestants were introduced: a worker had loaded the model and met them.
        seconds: of each cell, that the context took which was read last.
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
        self.ready = 0.0
        self.seconds: dict[int, float] = {}
        self._facts: Facts | None = None
        self._parameters: dict[Contestant, str] = {}
        self._refused: dict[Contestant, MethodRefusedError] = {}
        self._pool: Pool[Job | Introduction, Done | Facts] = Pool(
            partial(ContextWorker, spec, tuple(cells), seed), cluster
        )
        self._folder = folder

    def __enter__(self) -> Observer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.__exit__(kind, error, trace)
        if "_store" in vars(self):
            self._store.close()

    @cached_property
    def _store(self) -> ResultStore:
        """Opened when it is first asked for, so that what can't begin leaves no folder."""
        return ResultStore(self._folder / FOLDER)

    @cached_property
    def _known(self) -> dict[str, Observation]:
        return {row["key"]: Observation(**row["observation"]) for row in self._store.rows()}

    @property
    def facts(self) -> Facts:
        """What a worker says of its model. Somebody must have been introduced."""
        assert self._facts is not None, "nobody was introduced"
        return self._facts

    def introduce(self, contestants: Iterable[Contestant]) -> dict[Contestant, MethodRefusedError]:
        """Have a worker meet contestants, each once: those that can't work on the model, and why. Nothing is written.

        Raises:
            SparingError: the model can't be loaded, or a contestant's text is no method.
        """
        everybody = tuple(dict.fromkeys((GATE, *contestants)))
        new = tuple(each for each in everybody if each not in self._parameters)
        if new:
            began = time.perf_counter()
            ((_, facts),) = self._pool.run([Introduction(new)])
            self._facts = cast(Facts, facts)
            self._parameters.update(zip(new, self._facts.parameters, strict=True))
            refused = zip(new, self._facts.refused, strict=True)
            self._refused.update((contestant, error) for contestant, error in refused if error is not None)
            self.ready = self.ready or time.perf_counter() - began
        return {each: self._refused[each] for each in everybody if each in self._refused}

    def parameters(self, contestant: Contestant) -> str:
        """A contestant's method with all its values, as text. It must have been introduced."""
        return self._parameters[contestant]

    def observe(self, wanted: Iterable[Wanted], show: tuple[int, int] | None = None) -> None:
        """Have contestants read contexts, unless they did already.

        Args:
            wanted: (number of the cell, number of the context, contestants).
            show: of which context, as (cell, context), to keep an example.

        Raises:
            SparingError: a task does not fit the model, a method refuses it, or the folder can't be written; what was
                done before is kept.
        """
        for job, done in self._pool.run(self._jobs(wanted, show)):
            job, done = cast(Job, job), cast(Done, done)
            if done.example is not None:  # first: a context that is known is not read again for it
                done.example.save(self._folder / EXAMPLES)
            for contestant, observation in zip(job.readers, done.observations, strict=True):
                key = self.key(contestant, job.cell, context=job.index)
                if key not in self._known:
                    self._store.append({"key": key, "observation": asdict(observation)})
                    self._known[key] = observation
            self.seconds[job.cell] = done.seconds
            self.progress(self.cells[job.cell])

    def _jobs(self, wanted: Iterable[Wanted], show: tuple[int, int] | None) -> Iterable[Job]:
        for cell, index, contestants in wanted:
            missing = tuple(c for c in contestants if not self.has(c, cell, index))
            if missing:
                yield Job(cell, index, missing, (cell, index) == show)

    def left(self, contestants: Sequence[Contestant]) -> list[list[int]]:
        """Of each cell, the contexts that not all of these contestants have read."""
        return [
            [index for index in cell.contexts if not all(self.has(c, number, index) for c in contestants)]
            for number, cell in enumerate(self.cells)
        ]

    def has(self, contestant: Contestant, cell: int, index: int) -> bool:
        """True if that was observed."""
        return self.key(contestant, cell, context=index) in self._known

    def get(self, contestant: Contestant, cell: int, index: int) -> Observation:
        """What was observed."""
        return self._known[self.key(contestant, cell, context=index)]

    def key(self, contestant: Contestant, cell: int, **contexts: object) -> str:
        """The hash of what makes an observation or a row what it is; `contexts`: of which contexts of the cell."""
        return row_key(self.identity(contestant, cell) | {"method": self.parameters(contestant)} | contexts)

    def identity(self, contestant: Contestant, cell: int) -> Row:
        """Who on what, as rows say it."""
        where = self.cells[cell]
        return {
            "model": self.spec.name,
            "fingerprint": self.facts.fingerprint,
            "method": contestant.name,
            "task": where.task.label,
            "mode": where.mode,
            "length": where.length,
            "seed": self.seed,
        }
