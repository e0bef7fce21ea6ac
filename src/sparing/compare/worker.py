"""One context of one cell: read once for all contestants that read it alike, compressed and asked by each.

This is the unit of work of every comparison, in this process and on a cluster: contestants on one context share its
prefill and see the same tokens, and nothing that they do depends on any other context.

In mode "query-agnostic" the context is compressed before any question is seen, and all questions are asked on that
one compressed context. In mode "query-aware" the question is part of the prompt that is compressed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from sparing.compare.cells import GATE, Cell, Contestant, Mode, Observation, Shares, mean_shares
from sparing.compare.engine import FULL, Compressed, Engine, Reading
from sparing.compare.environment import environment, peak_memory_bytes, reset_peak_memory
from sparing.compare.example import Example
from sparing.core.cascade import Cascade
from sparing.core.method import Method
from sparing.core.parsing import parse_method
from sparing.core.plan import Plan
from sparing.core.prefill import SparsePrefill, as_said
from sparing.core.prompt import PromptDropper
from sparing.errors import InvalidInputError, MethodRefusedError
from sparing.loading import Drafts, ModelSpec
from sparing.session import check_measurements, use
from sparing.tasks import Question, Sample, Task


@dataclass(frozen=True)
class Job:
    """A context of a cell, and who is to read it. `example`: show what is kept of it."""

    cell: int
    index: int
    contestants: tuple[Contestant, ...]
    example: bool = False

    @property
    def readers(self) -> list[Contestant]:
        """The full cache comes first: its answers are the reference of questions that have none."""
        return [GATE, *(contestant for contestant in self.contestants if not contestant.is_full)]

    def __str__(self) -> str:
        return f"context {self.index} of cell {self.cell}"


@dataclass(frozen=True)
class Introduction:
    """A question to any worker: what is the model, and which of these can work on it?"""

    contestants: tuple[Contestant, ...]


@dataclass(frozen=True)
class Done:
    """What came of a job: an observation of each of its readers, in their order. `seconds`: that all of it took."""

    observations: list[Observation]
    seconds: float
    example: Example | None


@dataclass(frozen=True)
class Facts:
    """What a worker says of its model.

    Attributes:
        fingerprint, description: see `LoadedModel`. element_bits: of a number in its own cache.
        parameters: of each contestant in its order, its method with all its values.
        refused: why those that can't work here can't; None for the others.
        environment: versions and hardware of the worker.
    """

    fingerprint: str
    description: str
    element_bits: int
    parameters: list[str]
    refused: list[MethodRefusedError | None]
    environment: dict[str, Any] = field(default_factory=dict)


class ContextWorker:
    """A loaded model that does jobs.

    Args:
        spec: the model. cells: what jobs refer to by number. seed: of the tasks.

    Raises:
        SparingError: the model can't be loaded.
    """

    def __init__(self, spec: ModelSpec, cells: Sequence[Cell], seed: int) -> None:
        self.loaded, self.cells, self.seed = spec.load(), cells, seed
        self._drafts = Drafts(spec)
        self._made: dict[Contestant, Method] = {}
        self._methods: dict[Contestant, Method] = {}

    def __call__(self, item: Job | Introduction) -> Done | Facts:
        """Do a job, or answer an introduction.

        Raises:
            SparingError: a task does not fit the model, or a method refuses it.
        """
        return self._introduce(item) if isinstance(item, Introduction) else self._run(item)

    def method(self, contestant: Contestant) -> Method:
        """The contestant's method, reading every prompt as it says: also where dense attention would be faster."""
        if contestant not in self._methods:
            made = contestant.method or parse_method(contestant.name, contestant.keep, self._drafts)
            self._drafts.check(self.loaded)
            self._made[contestant] = made
            self._methods[contestant] = as_said(made)
        return self._methods[contestant]

    def _introduce(self, item: Introduction) -> Facts:
        """Try every method on the first few tokens of the first cell."""
        methods = [self.method(contestant) for contestant in item.contestants]
        check_measurements(self.loaded.model, methods)
        lengths = [self._length(cell) for cell in self.cells]
        ids = self.cells[0].task.sample(self.loaded.tokenizer, lengths[0], self.seed, 0).context_ids
        refused: list[MethodRefusedError | None] = []
        with use(self.loaded.model, FULL) as session:
            engine = Engine(self.loaded, session)
            for method in methods:
                try:
                    engine.answer(engine.compress(engine.read(ids[:16], [method]), method), ids[:2], 2)
                except MethodRefusedError as error:
                    refused.append(error)
                else:
                    refused.append(None)
        model, parameters = self.loaded, [repr(self._made[contestant]) for contestant in item.contestants]
        bits = 8 * model.model.dtype.itemsize
        return Facts(model.fingerprint, model.description, bits, parameters, refused, self._environment)

    @cached_property
    def _environment(self) -> dict[str, Any]:
        return environment()

    def _run(self, job: Job) -> Done:
        began = time.perf_counter()
        cell = self.cells[job.cell]
        sample = cell.task.sample(self.loaded.tokenizer, self._length(cell), self.seed, job.index)
        self._check_fits(sample)
        notes = {contestant: _Notes() for contestant in job.readers}
        example = Example.of(cell, sample, self.loaded) if job.example else None
        full: dict[int, str] = {}
        with use(self.loaded.model, FULL) as session:
            engine = Engine(self.loaded, session)
            for prompt, questions in _prompts(cell.mode, sample):
                for alike in self._read_alike(job.readers):
                    reading = engine.read(prompt, [self.method(c) for c in alike])
                    for contestant in alike:
                        reset_peak_memory()
                        compressed = engine.compress(reading, self.method(contestant))
                        mine = notes[contestant]
                        observed = mine.observed
                        mine.account(compressed)
                        for number, question in questions:
                            output = _ask(engine, cell, question, reading, compressed, observed)
                            if contestant.is_full:
                                full[number] = output
                            observed.scores.append(_score(cell.task, question, output, full[number]))
                            if example is not None and number == 0:
                                example.add(contestant, compressed.cache, output, self._layers)
                        observed.read += compressed.read
                        observed.peak = max(observed.peak, peak_memory_bytes() or 0)
        observations = [mine.observation(self._layers) for mine in notes.values()]
        return Done(observations, time.perf_counter() - began, example)

    @property
    def _layers(self) -> int:
        layers: int = self.loaded.model.config.get_text_config(decoder=True).num_hidden_layers
        return layers

    def _read_alike(self, contestants: Sequence[Contestant]) -> list[list[Contestant]]:
        """The contestants by how they read the prompt: those that read it alike share it. Full comes first."""
        groups: dict[tuple[SparsePrefill | Cascade | None, PromptDropper | None], list[Contestant]] = {}
        for contestant in contestants:
            method = self.method(contestant)
            groups.setdefault((method.reading, method.shortening), []).append(contestant)
        return list(groups.values())

    def _length(self, cell: Cell) -> int | None:
        limit = self.loaded.max_length
        if cell.length is not None and limit is not None and cell.length > limit:
            fix = "ask for shorter samples or another model"
            allowed = f"at most {limit}, what {self.loaded.name} was made for"
            raise InvalidInputError("length", cell.length, allowed, fix)
        return cell.length

    def _check_fits(self, sample: Sample) -> None:
        limit = self.loaded.max_length
        if limit is not None and sample.length > limit:
            allowed = f"at most {limit} tokens, what {self.loaded.name} was made for"
            raise InvalidInputError(f"length of {sample.name}", sample.length, allowed, "shorten the context")


@dataclass
class _Notes:
    """An observation in the making, and the plans of its prompts so far."""

    observed: Observation = field(default_factory=Observation)
    plans: list[Plan] = field(default_factory=list)

    def account(self, compressed: Compressed) -> None:
        """Note what a compressed prompt takes."""
        cache = compressed.cache
        self.observed.bytes_full.append(cache.bytes_full)
        self.observed.bytes_kept.append(cache.bytes_kept)
        self.observed.prefill.append(compressed.seconds)
        if cache.plan is not None:
            self.plans.append(cache.plan)
        if cache.density is not None:
            self.observed.density.append(cache.density)

    def observation(self, layers: int) -> Observation:
        """All of it."""
        return replace(self.observed, shares=mean_shares([_shares(plan, layers) for plan in self.plans]))


def _ask(
    engine: Engine, cell: Cell, question: Question, reading: Reading, compressed: Compressed, observed: Observation
) -> str:
    """The answer as text; for likelihood tasks the mean loss, written as a number."""
    aware = cell.mode == "query-aware"
    fed: tuple[int, ...] = () if aware else question.token_ids
    first = reading.next_logits if aware else None
    if cell.task.kind == "likelihood":
        return repr(engine.mean_loss(compressed, fed, question.target_ids, first))
    output = engine.answer(compressed, fed, question.max_new_tokens, first, one_line=question.one_line)
    observed.decode_seconds += output.decode_seconds
    observed.decode_steps += output.decode_steps
    return engine.text(output)


def _score(task: Task, question: Question, output: str, full_output: str) -> float:
    if task.kind == "likelihood":
        return task.score_likelihood(float(output))
    if question.reference == "full":
        question = replace(question, answers=(full_output,))
    return task.score(question, output)


def _prompts(mode: Mode, sample: Sample) -> Iterator[tuple[list[int], list[tuple[int, Question]]]]:
    """The prompts to compress, each with the questions to ask on it."""
    if mode == "query-agnostic":
        yield list(sample.context_ids), list(enumerate(sample.questions))
        return
    for number, question in enumerate(sample.questions):
        yield [*sample.context_ids, *question.token_ids], [(number, question)]


def _shares(plan: Plan, layers: int) -> Shares:
    """[layer][kv_head] share of seen tokens kept; None for layers that are not compressed."""
    kept = {layer.layer: layer.share() for layer in plan.layers}
    return [kept.get(layer) for layer in range(layers)]
