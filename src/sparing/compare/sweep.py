"""The sweep: every method at every budget on every task, one prefill for all of them.

A *cell* is a (task, mode, length). Its prompts are read once and forked for every method and budget, so methods
see the same tokens and share the cost. Rows are written when a cell is done; a sweep that was interrupted goes on
at the first cell with a row missing.

In mode "query-agnostic" the context is compressed before any question is seen, and all questions are asked on that
one compressed context. In mode "query-aware" the question is part of the prompt that is compressed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sparing.compare.engine import FULL, Compressed, Engine, Output, Reading
from sparing.compare.environment import peak_memory_bytes, reset_peak_memory
from sparing.compare.store import ResultStore, row_key
from sparing.core.cascade import Cascade
from sparing.core.method import Method
from sparing.core.plan import Plan
from sparing.core.prefill import SparsePrefill
from sparing.core.prompt import PromptDropper
from sparing.errors import InvalidInputError, MethodRefusedError
from sparing.loading import LoadedModel
from sparing.session import check_measurements, use
from sparing.tasks import Question, Sample, Task, bootstrap, context_means, wilson

Mode = Literal["query-agnostic", "query-aware"]
MODES: tuple[Mode, ...] = ("query-agnostic", "query-aware")
# Enough for any example that a person would look at; larger ones are left out of the report.
MAX_EXAMPLE_ENTRIES = 400_000


@dataclass(frozen=True)
class Contestant:
    """A method at a budget. `name`: as the user wrote it; "full" for the gate."""

    name: str
    method: Method

    @property
    def is_full(self) -> bool:
        """True for the cache that drops nothing."""
        return self.method is FULL


@dataclass(frozen=True)
class Cell:
    """One column of the comparison. `length`: tokens; None where the user's own texts have their own lengths."""

    task: Task
    mode: Mode
    length: int | None


@dataclass
class Tally:
    """What one contestant did in one cell.

    Attributes:
        scores: [context][question] in [0, 1]. shares: [context] → the plan's shares, or None if nothing was dropped.
        read: of every answer, the share of the stored tokens that it read, for methods that read a part.
        density: of every prompt, the share of dense attention that was computed, for methods that read less of it.
    """

    scores: list[list[float]] = field(default_factory=list)
    bytes_full: list[int] = field(default_factory=list)
    bytes_kept: list[int] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    decode_seconds: float = 0.0
    decode_steps: int = 0
    peak: int = 0
    plans: list[Plan | None] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    density: list[float] = field(default_factory=list)


class Sweep:
    """Runs cells and writes their rows.

    Args:
        loaded: the model. contestants: methods at budgets, `full` not among them (it always runs).
        samples: contexts per cell. seed: of the tasks.
        store: where rows go. progress: called after each context with (cell, contexts done).
    """

    def __init__(
        self,
        loaded: LoadedModel,
        contestants: Sequence[Contestant],
        samples: int,
        seed: int,
        store: ResultStore,
        progress: Callable[[Cell, int], None] = lambda cell, done: None,
    ) -> None:
        if samples < 1:
            raise InvalidInputError("samples", samples, "a number of contexts >= 1")
        self.loaded, self.samples, self.seed, self.store, self.progress = loaded, samples, seed, store, progress
        check_measurements(loaded.model, [contestant.method for contestant in contestants])
        # What a method computes is compared, also at lengths at which dense attention would be faster.
        self.contestants = [Contestant("full", FULL), *(Contestant(c.name, _always(c.method)) for c in contestants)]
        self.example: dict[str, Any] | None = None

    def refusals(self, cell: Cell) -> dict[Contestant, MethodRefusedError]:
        """Try every method on the first few tokens of a cell: those that cannot work on this model, and why."""
        sample = cell.task.sample(self.loaded.tokenizer, cell.length, self.seed, 0)
        refused = {}
        with use(self.loaded.model, FULL) as session:
            engine = Engine(self.loaded, session)
            for contestant in self.contestants:
                try:
                    reading = engine.read(sample.context_ids[:16], [contestant.method])
                    engine.answer(engine.compress(reading, contestant.method), sample.context_ids[:2], 2)
                except MethodRefusedError as error:
                    refused[contestant] = error
        return refused

    def run(self, cells: Sequence[Cell]) -> None:
        """Run all cells whose rows are not all there.

        Raises:
            SparingError: a task does not fit the model, or a method refuses it; rows written before stay.
        """
        for cell in cells:
            self._check_length(cell)
        with use(self.loaded.model, FULL) as session:
            engine = Engine(self.loaded, session)
            for cell in cells:
                self._run_cell(engine, cell)

    def contexts(self, cell: Cell) -> int:
        """How many contexts the cell has."""
        available = cell.task.num_samples
        return self.samples if available is None else min(self.samples, available)

    def is_done(self, cell: Cell) -> bool:
        """True if every row of the cell is in the store."""
        return all(self._key(c, cell) in self.store.done() for c in self.contestants)

    def _run_cell(self, engine: Engine, cell: Cell) -> None:
        if self.is_done(cell):
            return
        missing = [c for c in self.contestants if c.is_full or self._key(c, cell) not in self.store.done()]
        tallies = {c: Tally() for c in missing}
        full_outputs: dict[tuple[int, int], str] = {}
        for index in range(self.contexts(cell)):
            sample = cell.task.sample(self.loaded.tokenizer, cell.length, self.seed, index)
            self._check_fits(sample)
            for tally in tallies.values():
                tally.scores.append([])
            for prompt, questions in _prompts(cell.mode, sample):
                for alike in _read_alike(missing):
                    reading = engine.read(prompt, [c.method for c in alike])
                    for contestant in alike:
                        reset_peak_memory()
                        compressed = engine.compress(reading, contestant.method)
                        tally = tallies[contestant]
                        _account(tally, compressed)
                        for number, question in questions:
                            output = self._ask(engine, cell, question, reading, compressed, tally)
                            if contestant.is_full:
                                full_outputs[index, number] = output
                            score = self._score(cell.task, question, output, full_outputs[index, number])
                            tally.scores[-1].append(score)
                            self._keep_example(cell, sample, question, contestant, compressed, output)
                        tally.read += compressed.read
                        tally.peak = max(tally.peak, peak_memory_bytes() or 0)
            self.progress(cell, index + 1)
        for contestant, tally in tallies.items():
            key = self._key(contestant, cell)
            if key not in self.store.done():
                self.store.append({"key": key, **self._row(contestant, cell, tally, tallies)})

    def _ask(
        self, engine: Engine, cell: Cell, question: Question, reading: Reading, compressed: Compressed, tally: Tally
    ) -> str:
        """The answer as text; for likelihood tasks the mean loss, written as a number."""
        aware = cell.mode == "query-aware"
        fed: tuple[int, ...] = () if aware else question.token_ids
        first = reading.next_logits if aware else None
        if cell.task.kind == "likelihood":
            return repr(engine.mean_loss(compressed, fed, question.target_ids, first))
        output: Output = engine.answer(compressed, fed, question.max_new_tokens, first, one_line=True)
        tally.decode_seconds += output.decode_seconds
        tally.decode_steps += output.decode_steps
        return engine.text(output)

    @staticmethod
    def _score(task: Task, question: Question, output: str, full_output: str) -> float:
        if task.kind == "likelihood":
            return task.score_likelihood(float(output))
        if question.reference == "full":
            question = Question(
                question.text, question.token_ids, (full_output,), question.max_new_tokens, reference="full"
            )
        return task.score(question, output)

    def _check_length(self, cell: Cell) -> None:
        limit = self.loaded.max_length
        if cell.length is not None and limit is not None and cell.length > limit:
            fix = "ask for shorter samples or another model"
            raise InvalidInputError(
                "length", cell.length, f"at most {limit}, what {self.loaded.name} was made for", fix
            )

    def _check_fits(self, sample: Sample) -> None:
        limit = self.loaded.max_length
        if limit is not None and sample.length > limit:
            allowed = f"at most {limit} tokens, what {self.loaded.name} was made for"
            raise InvalidInputError(f"length of {sample.name}", sample.length, allowed, "shorten the context")

    def _config(self, contestant: Contestant, cell: Cell) -> dict[str, Any]:
        """What makes a row what it is; its key is the hash of this."""
        return {
            "model": self.loaded.name,
            "fingerprint": self.loaded.fingerprint,
            "method": repr(contestant.method),
            "task": cell.task.label,
            "mode": cell.mode,
            "length": cell.length,
            "samples": self.contexts(cell),
            "seed": self.seed,
        }

    def _key(self, contestant: Contestant, cell: Cell) -> str:
        return row_key(self._config(contestant, cell))

    def _row(
        self, contestant: Contestant, cell: Cell, tally: Tally, tallies: dict[Contestant, Tally]
    ) -> dict[str, Any]:
        estimate = bootstrap if cell.task.kind == "likelihood" else wilson
        interval = estimate(context_means(tally.scores))
        full = next(t for c, t in tallies.items() if c.is_full)
        keep = contestant.method.keep
        return {
            "model": self.loaded.name,
            "fingerprint": self.loaded.fingerprint,
            "method": contestant.name,
            "parameters": repr(contestant.method),
            "keep": keep,
            "keep_label": f"{keep:.0%}" if isinstance(keep, float) else str(keep),
            "task": cell.task.label,
            "mode": cell.mode,
            "length": cell.length,
            "n": interval.n,
            "questions": sum(len(scores) for scores in tally.scores),
            "metric": "1/perplexity" if cell.task.kind == "likelihood" else cell.task.metric,
            "score": interval.mean,
            "low": interval.low,
            "high": interval.high,
            "bytes_full": round(statistics.mean(tally.bytes_full)),
            "bytes_kept": round(statistics.mean(tally.bytes_kept)),
            "read_share": statistics.mean(tally.read) if tally.read else None,
            "density": statistics.mean(tally.density) if tally.density else None,
            "prefill_s": statistics.median(tally.prefill),
            "decode_s_per_token": tally.decode_seconds / tally.decode_steps if tally.decode_steps else None,
            "peak_rss_bytes": tally.peak or None,
            "seed": self.seed,
            "kept_share": _mean_shares(tally.plans, len(self._layers())),
            "worse_than_full": _worse(tally.scores, full.scores),
            "warning": None,
        }

    def _layers(self) -> Sequence[int]:
        return range(self.loaded.model.config.get_text_config(decoder=True).num_hidden_layers)

    def _keep_example(
        self,
        cell: Cell,
        sample: Sample,
        question: Question,
        contestant: Contestant,
        compressed: Compressed,
        output: str,
    ) -> None:
        """Remember the first question of the first query-agnostic generation cell, at each method's least budget."""
        if cell.task.kind != "generation" or cell.mode != "query-agnostic":
            return
        if self.example is None:
            tokenizer = self.loaded.tokenizer
            self.example = {
                "sample": sample.name,
                "task": cell.task.label,
                "mode": cell.mode,
                "length": cell.length or sample.length,
                "question": question.text,
                "answer": ", ".join(question.answers),
                "tokens": [tokenizer.decode([token]) for token in sample.context_ids],
                "methods": {},
            }
        plan = compressed.cache.plan
        is_first = self.example["sample"] == sample.name and self.example["question"] == question.text
        if not is_first or plan is None or plan.tokens_kept > MAX_EXAMPLE_ENTRIES:
            return
        kept: list[Any] = [None] * len(self._layers())
        short = compressed.cache.shortening
        for layer in plan.layers:
            kept[layer.layer] = [(short.in_whole(head) if short else head).tolist() for head in layer.kept[0]]
        known = self.example["methods"].get(contestant.name)
        if known is None or plan.share < known["share"]:
            entry = {"keep": contestant.method.keep, "share": plan.share, "output": output, "kept": kept}
            self.example["methods"][contestant.name] = entry


def _always(method: Method) -> Method:
    """The method, reading every prompt as it says."""
    if isinstance(method, SparsePrefill):
        return replace(method, dispatch="always")
    return method if method.prefill is None else replace(method, prefill=replace(method.prefill, dispatch="always"))


def _read_alike(contestants: Sequence[Contestant]) -> list[list[Contestant]]:
    """The contestants by how they read the prompt: those that read it alike share it. The full cache comes first."""
    groups: dict[tuple[SparsePrefill | Cascade | None, PromptDropper | None], list[Contestant]] = {}
    for contestant in contestants:
        groups.setdefault((contestant.method.reading, contestant.method.shortening), []).append(contestant)
    return list(groups.values())


def _prompts(mode: Mode, sample: Sample) -> Iterator[tuple[list[int], list[tuple[int, Question]]]]:
    """The prompts to compress, each with the questions to ask on it."""
    if mode == "query-agnostic":
        yield list(sample.context_ids), list(enumerate(sample.questions))
        return
    for number, question in enumerate(sample.questions):
        yield [*sample.context_ids, *question.token_ids], [(number, question)]


def _account(tally: Tally, compressed: Compressed) -> None:
    tally.bytes_full.append(compressed.cache.bytes_full)
    tally.bytes_kept.append(compressed.cache.bytes_kept)
    tally.prefill.append(compressed.seconds)
    tally.plans.append(compressed.cache.plan)
    if compressed.cache.density is not None:
        tally.density.append(compressed.cache.density)


def _mean_shares(plans: Sequence[Plan | None], layers: int) -> list[list[float] | None]:
    """[layer][kv_head] share of seen tokens kept, mean over prompts; None for layers that are not compressed."""
    made = [plan for plan in plans if plan is not None]
    shares: list[list[float] | None] = [None] * layers
    if not made:
        return shares
    for number, layer in enumerate(made[0].layers):
        per_plan = [plan.layers[number].share() for plan in made]
        shares[layer.layer] = [round(statistics.mean(heads), 4) for heads in zip(*per_plan, strict=True)]
    return shares


def _worse(scores: Sequence[Sequence[float]], full: Sequence[Sequence[float]]) -> int:
    """Questions that the full cache answered better."""
    pairs = ((a, b) for mine, theirs in zip(scores, full, strict=True) for a, b in zip(mine, theirs, strict=True))
    return sum(mine < theirs and not math.isclose(mine, theirs) for mine, theirs in pairs)
