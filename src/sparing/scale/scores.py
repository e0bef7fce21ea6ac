"""Measuring heads with workers: the batches of a mean are spread over them, any other measurement is one task.

The result is the same wherever the batches were observed: their rows are averaged in their order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from sparing.adapters.lens import ModelLens
from sparing.core.head_scorer import HeadScorer, MeanScorer, Measured, Run, finish
from sparing.core.scores import ModelIdentity, Scores
from sparing.loading import ModelSpec
from sparing.scale.pool import Cluster, Pool
from sparing.scoring import Settings, environment, prepare
from sparing.tasks.probe_files import load_samples

Progress = Callable[[int, int, str], None]
# Items that are no batch.
MEET, WHOLE = "meet", "whole"


@dataclass(frozen=True)
class Measurement:
    """What is measured.

    Attributes:
        file: samples of the user's own; None for samples made offline. settings: see `scoring.score`; of a file, the
            first `settings.samples` are taken if `cut` is True.
    """

    spec: ModelSpec
    scorer: HeadScorer
    settings: Settings = field(default_factory=Settings)
    file: Path | None = None
    cut: bool = False


@dataclass(frozen=True)
class Met:
    """The model and the run as a worker sees them."""

    identity: ModelIdentity
    run: Run
    described: dict[str, Any]


def measure(
    measurement: Measurement,
    cluster: Cluster | None = None,
    check: Callable[[ModelIdentity], None] = lambda identity: None,
    progress: Progress = Run.progress,
) -> Scores:
    """Measure heads, layers or positions of a model; by default in this process.

    Args:
        check: told what the model is before anything is measured; what it raises ends the measurement.
        progress: told (done, total, what) now and then.

    Raises:
        SparingError: see `scoring.score`, `ModelSpec.load` and `Pool`.
    """
    is_here = cluster is None or cluster.ray is None
    scorer = measurement.scorer
    make_worker = functools.partial(_Worker, measurement, progress if is_here else Run.progress)
    with Pool[str | int, Any](make_worker, cluster) as pool:
        ((_, met),) = pool.run([MEET])
        met = cast(Met, met)
        check(met.identity)
        if isinstance(scorer, MeanScorer):
            run = replace(met.run, progress=progress)
            batches = -(-len(run.samples) // run.batch_size)
            found = scorer.average(run, _in_order(pool.run(range(batches))))
        else:
            ((_, whole),) = pool.run([WHOLE])
            found = cast(Measured, whole)
    return finish(scorer, met.identity, found, met.described, environment=environment())


def _in_order(results: Iterable[tuple[Any, Any]]) -> Iterator[Tensor]:
    """The results of items 0, 1, 2, ... in that order; those that come early wait."""
    early: dict[int, Tensor] = {}
    wanted = 0
    for item, rows in results:
        early[item] = rows
        while wanted in early:
            yield early.pop(wanted)
            wanted += 1


class _Worker:
    """A loaded model with the samples of a measurement."""

    def __init__(self, measurement: Measurement, progress: Progress) -> None:
        loaded = measurement.spec.load()
        self._lens = ModelLens(loaded.model, loaded.tokenizer, measurement.spec.name)
        self._scorer, settings = measurement.scorer, measurement.settings
        data = None
        if measurement.file is not None:
            data = load_samples(self._scorer.info.data, measurement.file, loaded.tokenizer)
            data = data[: settings.samples] if measurement.cut else data
        self._run, self._described = prepare(self._scorer, self._lens, data, settings, progress)

    def __call__(self, item: str | int) -> Met | Measured | Tensor:
        """Say what is measured, measure all of it, or observe one batch."""
        if item == MEET:
            return Met(self._lens.identity, self._run, self._described)
        if item == WHOLE:
            return self._scorer.measure(self._lens, self._run)
        assert isinstance(self._scorer, MeanScorer)
        start = int(item) * self._run.batch_size
        return self._scorer.observe(self._lens, self._run.samples[start : start + self._run.batch_size])
