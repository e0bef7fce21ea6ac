"""`tune`: which method, at which budget, loses least on this model, this work, within these limits.

Contexts are split in two. Choices are based on the first half; the numbers that a recipe promises are of the second,
on which only the finalists are read. The finalists are tried there in the order of the first half, and the first that
meets the request is the one: that is the only choice which the second half takes part in.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sparing.compare.cells import GATE, Cell, Mode, cells_of
from sparing.compare.observer import Observer
from sparing.errors import InvalidInputError, MethodRefusedError, require
from sparing.loading import ModelSpec
from sparing.recipe import Recipe
from sparing.scale.pool import Cluster
from sparing.tasks import Task
from sparing.tune.request import Request
from sparing.tune.search import Search
from sparing.tune.space import Space, default_methods
from sparing.tune.standing import Contexts, Standing, best_of_each, standing

# Contexts that each half must have at least, for an interval to say anything.
LEAST = 2


@dataclass(frozen=True)
class Outcome:
    """What a tuning found.

    Attributes:
        request: what was asked for.
        recipe: what to run; None if nothing met the request.
        finalists: (on the contexts that they were chosen by, on those held out), the recommended one first.
        full: the full cache on the contexts of the search.
        searched: all candidates that read every context of the search. dropped: the others, and why.
        refused: what methods can't work on the model, each reason once.
        left_out: cells whose full cache does not reach the gate, and its score there.
    """

    request: Request
    recipe: Recipe | None
    finalists: list[tuple[Standing, Standing]]
    full: Standing
    searched: list[Standing]
    dropped: list[tuple[Standing, str]]
    refused: list[MethodRefusedError]
    left_out: list[tuple[Cell, float]]


def tune(
    spec: ModelSpec,
    tasks: Sequence[tuple[str, Task]],
    request: Request,
    out: Path,
    *,
    methods: Sequence[str] = (),
    mode: Mode = "query-agnostic",
    lengths: Sequence[int] = (1024,),
    samples: int = 32,
    trials: int = 60,
    gate: float = 0.95,
    seed: int = 0,
    cluster: Cluster | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Outcome:
    """Search methods, budgets, allocators and precisions for a request; observations are kept in `out`.

    Args:
        tasks: (text that makes it, task). methods: as text; by default all that need no measurement and no draft.
        samples: contexts per task and length, half of them held out. trials: candidates that are proposed.
        gate: a cell counts only if the full cache scores at least this much on it.

    Raises:
        InvalidInputError: too few contexts, or no cell passes the gate. MissingExtraError: Optuna is not installed.
        MethodRefusedError: none of the methods can work on the model. SparingError: see `Observer`.
    """
    require(samples >= 2 * LEAST, "samples", samples, f"a number of contexts >= {2 * LEAST}")
    require(0 <= gate <= 1, "gate", gate, "a score in [0, 1]")
    require(trials >= 1, "trials", trials, "a number of candidates >= 1")
    texts = {task.label: text for text, task in tasks}
    cells = [_drawn(cell, seed) for cell in cells_of([task for _, task in tasks], [mode], lengths, samples)]
    with Observer(spec, cells, seed, out, cluster) as observer:
        observer.introduce([])
        halves = _halves(cells)
        searched, left_out = _gated(observer, halves[0], gate)
        held_out = {cell: halves[1][cell] for cell in searched}
        bytes_full = [observer.get(GATE, cell, index).bytes_full for cell in searched for index in searched[cell]]
        full = max(size for sizes in bytes_full for size in sizes)
        space = Space(methods or default_methods(), request, observer.facts.element_bits, full)
        search = Search(observer, request, space, searched, trials, seed, progress)
        search.run()
        if not any(not request.broken(each) for each in search.finished):
            search.relax()
        finalists = _held_out(observer, best_of_each(search.finished, search.value), held_out, request)
        recipe = None
        if finalists and not request.broken(finalists[0][1]):
            recipe = _recipe(observer, finalists[0][1], held_out, request, texts, seed)
        whole = standing(observer, GATE, searched)
        refused = list({str(error): error for error in search.refused.values()}.values())
        return Outcome(request, recipe, finalists, whole, search.finished, search.dropped, refused, left_out)


def _drawn(cell: Cell, seed: int) -> Cell:
    """A cell with its contexts in the order in which they are read; those of a file are shuffled, others are random."""
    count, there = len(cell.contexts), cell.task.num_samples
    if count < 2 * LEAST:
        allowed = f"at least {2 * LEAST} contexts, half of which are held out"
        raise InvalidInputError(f"contexts of {cell.task.label}", count, allowed, "add rows with other contexts")
    if there is None:
        return cell
    order = list(range(there))
    random.Random(seed).shuffle(order)
    return replace(cell, contexts=tuple(order[:count]))


def _halves(cells: Sequence[Cell]) -> tuple[Contexts, Contexts]:
    """The contexts to choose by, and those to report."""
    middle = {number: (len(cell.contexts) + 1) // 2 for number, cell in enumerate(cells)}
    return (
        {number: cells[number].contexts[:half] for number, half in middle.items()},
        {number: cells[number].contexts[half:] for number, half in middle.items()},
    )


def _gated(observer: Observer, contexts: Contexts, gate: float) -> tuple[Contexts, list[tuple[Cell, float]]]:
    """The cells that the full cache can do, and the others with its score.

    Raises:
        InvalidInputError: it can do none.
    """
    observer.observe((cell, index, [GATE]) for cell, indices in contexts.items() for index in indices)
    scores = {cell: standing(observer, GATE, {cell: contexts[cell]}).score for cell in contexts}
    likelihood = {cell for cell in contexts if observer.cells[cell].task.kind == "likelihood"}
    counted = {cell: contexts[cell] for cell in contexts if cell in likelihood or scores[cell] >= gate}
    if not counted:
        found = ", ".join(f"{scores[cell]:.2f} on {observer.cells[cell].label}" for cell in scores)
        fix = "choose work that the model can do, lower the gate, or leave the answers out: then the full cache's count"
        raise InvalidInputError("score of the full cache", found, f"at least {gate:g} on one task", fix)
    return counted, [(observer.cells[cell], scores[cell]) for cell in contexts if cell not in counted]


def _held_out(
    observer: Observer, finalists: Sequence[Standing], held_out: Contexts, request: Request
) -> list[tuple[Standing, Standing]]:
    """The finalists on contexts that nothing was chosen by; those that meet the request there first."""
    readers = [GATE, *(each.contestant for each in finalists)]
    observer.observe((cell, index, readers) for cell, indices in held_out.items() for index in indices)
    both = [(each, standing(observer, each.contestant, held_out)) for each in finalists]
    return sorted(both, key=lambda pair: bool(request.broken(pair[1])))


def _recipe(
    observer: Observer, best: Standing, held_out: Contexts, request: Request, texts: dict[str, str], seed: int
) -> Recipe:
    contestant = best.contestant
    cells = [
        {"task": texts[observer.cells[n].task.label], "label": observer.cells[n].task.label,
         "mode": observer.cells[n].mode, "length": observer.cells[n].length, "contexts": list(indices)}
        for n, indices in held_out.items()
    ]  # fmt: skip
    expected: dict[str, Any] = {
        "loss": {"mean": best.loss.mean, "low": best.loss.low, "high": best.loss.high, "n": best.n},
        "worst": {"loss": best.worst[0], "on": best.worst[1]},
        "score": best.score, "score_full": best.full, "bytes_share": best.share, "bytes_kept_most": best.bytes_kept,
        "decode_s_per_token": best.decode_s, "prefill_s": best.prefill_s,
        "cells": [{name: row[name] for name in _ROW} | {"label": row["task"]} for row in best.rows],
    }  # fmt: skip
    return Recipe(
        model=observer.spec,
        fingerprint=observer.facts.fingerprint,
        text=contestant.name,
        keep=contestant.keep,
        parameters=observer.parameters(contestant),
        work={"cells": cells, "seed": seed},
        request={name: value for name, value in asdict(request).items() if value is not None},
        expected=expected,
        environment=observer.facts.environment,
    )


_ROW = ("mode", "length", "n", "metric", "score", "low", "high", "full", "bytes_full", "bytes_kept", "prefill_s",
        "decode_s_per_token")  # fmt: skip
