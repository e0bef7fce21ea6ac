"""Scorers of heads, layers and positions: how one is written, registered, and averaged over samples."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from sparing.core.lens import Lens
from sparing.core.recipe_text import build, parse_call
from sparing.core.registry import Registry
from sparing.core.samples import DataKind
from sparing.core.scores import ModelIdentity, Scores, count_of
from sparing.errors import InvalidInputError

Family = Literal["retrieval", "attention", "causal", "learned"]


@dataclass(frozen=True)
class ScorerInfo:
    """What the registry knows of a scorer."""

    name: str
    family: Family
    axes: tuple[str, ...]
    data: DataKind
    paper: str
    summary: str
    scorer: type[HeadScorer]


@dataclass(frozen=True)
class StopRule:
    """When a measurement that averages over samples may stop early.

    Attributes:
        top: the units whose ranking has to be settled: a number, or a share of all units.
        patience: stop once the set of the top units has stayed the same for so many samples; 0 for never.
    """

    top: int | float = 0.1
    patience: int = 0


@dataclass(frozen=True)
class Run:
    """How a measurement is carried out.

    Attributes:
        samples: what to measure on. batch_size: how many at a time. seed: of anything random.
        stop: when to stop early. max_seconds: stop after so long, with what has been measured; inf for never.
        progress: told (done, total, what) now and then.
    """

    samples: Sequence[Any]
    batch_size: int = 8
    seed: int = 0
    stop: StopRule = field(default_factory=StopRule)
    max_seconds: float = math.inf
    progress: Callable[[int, int, str], None] = lambda done, total, what: None

    def batches(self) -> Iterator[Sequence[Any]]:
        """The samples, `batch_size` at a time."""
        for start in range(0, len(self.samples), self.batch_size):
            yield self.samples[start : start + self.batch_size]


@dataclass(frozen=True)
class Measured:
    """What a scorer found: the part of `Scores` that it knows."""

    values: Tensor
    n: int
    standard_error: Tensor | None = None
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class HeadScorer:
    """Base of all scorers: a frozen dataclass whose fields are its paper's parameters. Higher = matters more."""

    info: ClassVar[ScorerInfo]

    def measure(self, lens: Lens, run: Run) -> Measured:
        """Measure a model."""
        raise NotImplementedError


class MeanScorer(HeadScorer):
    """A scorer whose score is a mean over samples."""

    def observe(self, lens: Lens, batch: Sequence[Any]) -> Tensor:
        """(len(batch), *units) float32: each sample's own score; a sample full of nan is not counted."""
        raise NotImplementedError

    def labels(self, run: Run) -> Mapping[str, tuple[str, ...]]:
        """Names along axes that are not just numbers."""
        return {}

    def measure(self, lens: Lens, run: Run) -> Measured:
        """See `HeadScorer.measure`: the mean over samples, with its standard error, until the stop rule holds."""
        return self.average(run, (self.observe(lens, batch) for batch in run.batches()))

    def average(self, run: Run, observed: Iterable[Tensor]) -> Measured:
        """The mean over what was observed of the run's batches, in their order, until the stop rule holds."""
        mean, began, notes = RunningMean(run.stop), time.monotonic(), []
        for rows in observed:
            for row in rows:
                mean.add(row)
            run.progress(mean.seen, len(run.samples), f"{mean.n} counted")
            if mean.is_settled:
                notes.append(f"stopped after {mean.seen} samples: the top {run.stop.top} had not changed "
                             f"for {run.stop.patience}")  # fmt: skip
                break
            if time.monotonic() - began > run.max_seconds:
                notes.append(f"stopped after {mean.seen} samples: {run.max_seconds:g} s had passed")
                break
        if mean.n < mean.seen:
            notes.append(f"{mean.seen - mean.n} of {mean.seen} samples were not counted (see the scorer)")
        if mean.n == 0:
            fix = "the model may be unable to do the task: try easier or shorter samples"
            raise InvalidInputError("data", f"{mean.seen} samples", "samples of which at least one counts", fix)
        return Measured(mean.mean, mean.n, mean.standard_error, self.labels(run), notes=tuple(notes))


class RunningMean:
    """Mean and standard error over samples that come one by one (Welford), and the stop rule."""

    def __init__(self, stop: StopRule) -> None:
        self.stop = stop
        self.seen = self.n = 0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None
        self._top: frozenset[int] = frozenset()
        self._unchanged = 0

    def add(self, row: Tensor) -> None:
        """One sample's scores; not counted if nan throughout. Single nan units make that unit nan in the mean."""
        self.seen += 1
        row = row.detach().double().cpu()
        if bool(row.isnan().all()):
            return
        self.n += 1
        if self._mean is None or self._squares is None:
            self._mean, self._squares = torch.zeros_like(row), torch.zeros_like(row)
        difference = row - self._mean
        self._mean = self._mean + difference / self.n
        self._squares = self._squares + difference * (row - self._mean)
        flat = self._mean.flatten().nan_to_num(-math.inf)
        count = count_of(self.stop.top, flat.numel())
        top = frozenset(torch.sort(flat, descending=True, stable=True).indices[:count].tolist())
        self._unchanged = self._unchanged + 1 if top == self._top else 0
        self._top = top

    @property
    def is_settled(self) -> bool:
        """True if the top units have stayed the same for `patience` samples."""
        return 0 < self.stop.patience <= self._unchanged

    @property
    def mean(self) -> Tensor:
        """float32."""
        assert self._mean is not None, "no sample was counted"
        return self._mean.float()

    @property
    def standard_error(self) -> Tensor | None:
        """s / sqrt(n) with s the sample standard deviation (n - 1); None for one sample."""
        if self._squares is None or self.n < 2:
            return None
        return (self._squares / (self.n - 1) / self.n).sqrt().float()


S = TypeVar("S", bound=HeadScorer)
SCORERS: Registry[ScorerInfo] = Registry("scorer")


def register_scorer(
    name: str, *, family: Family, data: DataKind, paper: str, summary: str, axes: tuple[str, ...] = ("layer", "head")
) -> Callable[[type[S]], type[S]]:
    """Register a scorer: the only place where one is made known.

    Args:
        name: as typed on the command line. data: which kind of samples it needs (see `core.samples`).
        paper: arXiv number or "-". summary: one line, what it measures.
    """

    def add(scorer: type[S]) -> type[S]:
        scorer.info = SCORERS.add(name, ScorerInfo(name, family, axes, data, paper, summary, scorer))
        return scorer

    return add


def scorers() -> dict[str, ScorerInfo]:
    """All registered scorers by name."""
    return SCORERS.all()


def parse_scorer(text: str) -> HeadScorer:
    """Build a scorer from `name` or `name(field=value,...)`.

    Raises:
        UnknownNameError: no such scorer. InvalidInputError: a field or value that it does not take.
    """
    name, given = parse_call(text, "scorer")
    made: HeadScorer = build(SCORERS.find(name).scorer, given, name)
    return made


def finish(
    scorer: HeadScorer, model: ModelIdentity, measured: Measured, data: Mapping[str, Any], **more: Any
) -> Scores:
    """What was measured, with everything that says how."""
    parameters = {f.name: getattr(scorer, f.name) for f in dataclasses.fields(scorer)}  # type: ignore[arg-type]
    return Scores(
        measured.values.float().cpu(), scorer.info.axes, scorer.info.name, model, parameters, data, measured.n,
        measured.standard_error, measured.labels, measured.extras, measured.notes, **more,
    )  # fmt: skip
