"""What is compared on what: contestants and cells, and what one contestant did on one context of a cell."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from sparing.compare.engine import FULL
from sparing.core.budget import Keep
from sparing.core.method import Method
from sparing.errors import InvalidInputError
from sparing.tasks import Task

Shares = list[list[float] | None]
Mode = Literal["query-agnostic", "query-aware"]
MODES: tuple[Mode, ...] = ("query-agnostic", "query-aware")


@dataclass(frozen=True)
class Contestant:
    """A method at a budget.

    Attributes:
        name: the method as text (see `core.parsing`), which a worker makes it from; "full" for the gate.
        keep: its budget.
        method: the method itself, where text can't say it. It is sent to workers as it is.
    """

    name: str
    keep: Keep
    method: Method | None = None

    @classmethod
    def of(cls, name: str, method: Method) -> Contestant:
        """A method made in Python, under a name."""
        return cls(name, method.keep, method)

    @property
    def is_full(self) -> bool:
        """True for the cache that drops nothing."""
        return self.name == GATE.name

    @property
    def keep_label(self) -> str:
        """The budget as it is written in tables."""
        return f"{self.keep:.0%}" if isinstance(self.keep, float) else str(self.keep)


# Nothing dropped: what every cell is run with, since the others' scores mean something only beside it.
GATE = Contestant("full", 1.0, FULL)


@dataclass(frozen=True)
class Cell:
    """One column of the comparison.

    Attributes:
        length: tokens; None where the user's own texts have their own lengths.
        contexts: the numbers of the task's contexts that are read.
    """

    task: Task
    mode: Mode
    length: int | None
    contexts: tuple[int, ...]

    @property
    def label(self) -> str:
        """ "needle_single@1024"; the task alone where it has no length."""
        return self.task.label + (f"@{self.length}" if self.length else "")


@dataclass
class Observation:
    """What one contestant did on one context of a cell.

    Attributes:
        scores: of its questions, each in [0, 1].
        bytes_full, bytes_kept: of each compressed prompt. prefill: seconds to read and compress each.
        decode_seconds, decode_steps: of all single-token forwards. peak: bytes of the process's memory, 0 if unknown.
        shares: [layer][kv_head] share of the tokens kept, mean over prompts; None for layers that are not compressed.
        read: of every answer, the share of the stored tokens that it read, for methods that read a part.
        density: of every prompt, the share of dense attention that was computed, for methods that read less of it.
    """

    scores: list[float] = field(default_factory=list)
    bytes_full: list[int] = field(default_factory=list)
    bytes_kept: list[int] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    decode_seconds: float = 0.0
    decode_steps: int = 0
    peak: int = 0
    shares: Shares = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    density: list[float] = field(default_factory=list)


def cells_of(tasks: Sequence[Task], modes: Sequence[Mode], lengths: Sequence[int], samples: int) -> list[Cell]:
    """Every task in every mode at every length, with its first `samples` contexts, or as many as it has.

    Raises:
        InvalidInputError: no length, and no task that has its own.
    """
    found = []
    for mode in modes:
        for task in tasks:
            # A text of the user's own has the length that it has.
            own: Sequence[int | None] = [None] if task.num_samples is not None else lengths
            count = samples if task.num_samples is None else min(samples, task.num_samples)
            found += [Cell(task, mode, length, tuple(range(count))) for length in own]
    if not found:
        raise InvalidInputError("lengths", lengths, "at least one number of tokens")
    return found


def shown(cells: Sequence[Cell]) -> tuple[int, int] | None:
    """The context that examples are of: the first one of the first query-agnostic cell with answers in words."""
    for number, cell in enumerate(cells):
        if cell.task.kind == "generation" and cell.mode == "query-agnostic":
            return number, cell.contexts[0]
    return None


def mean_shares(shares: Sequence[Shares]) -> Shares:
    """[layer][kv_head] share of seen tokens kept: the mean of several, but for those that are empty."""
    return [
        None
        if layers[0] is None
        else [round(statistics.mean(heads), 4) for heads in zip(*(layer or [] for layer in layers), strict=True)]
        for layers in zip(*filter(None, shares), strict=True)
    ]
