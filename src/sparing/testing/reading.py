"""Writing down what a reader chooses, so that it can be checked against dense attention."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sparing.core.method import Method, Parts
from sparing.core.reader import Choice, Reader, Step
from sparing.core.scorer import KeyValues, Queries


@dataclass(frozen=True)
class Note:
    """One decoded token of one layer. `there`: (B, H, N) bool, the tokens that there were; `counts`: (B, H)."""

    layer: int
    choice: Choice
    counts: Tensor
    there: Tensor

    def slots(self, row: int, head: int) -> Tensor:
        """The slots that were read, as often as they were."""
        if self.choice.slots is None:
            return self.there[row, head].nonzero().squeeze(-1)
        slots = self.choice.slots[row, head]
        return slots if self.choice.valid is None else slots[self.choice.valid[row, head]]


@dataclass(frozen=True)
class NotedReader(Reader):
    """A reader that works as another one and writes its choices down."""

    reader: Reader
    notes: list[Note] = field(compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs_rotary", self.reader.needs_rotary)

    def observe(self, state: Any, queries: Queries, stored: KeyValues) -> Any:
        """See `Reader.observe`."""
        return self.reader.observe(state, queries, stored)

    def score(self, state: Any, stored: KeyValues) -> Tensor:
        """See `Reader.score`."""
        return self.reader.score(state, stored)

    def begin(self, state: Any, stored: KeyValues) -> Any:
        """See `Reader.begin`."""
        return self.reader.begin(state, stored)

    def choose(self, state: Any, step: Step) -> tuple[Any, Choice]:
        """See `Reader.choose`."""
        state, choice = self.reader.choose(state, step)
        copies = {name: None if part is None else part.clone() for name, part in vars(choice).items()}
        self.notes.append(Note(step.stored.layer, Choice(**copies), step.counts.clone(), step.stored.valid.clone()))
        return state, choice

    def crop(self, state: Any, tokens: int) -> Any:
        """See `Reader.crop`."""
        return self.reader.crop(state, tokens)


@dataclass(frozen=True)
class Noted(Method):
    """A method whose reader's choices are written down.

    Attributes:
        method: the method. notes: what is written.
    """

    method: Method | None = None
    notes: list[Note] = field(default_factory=list, compare=False)

    def parts(self) -> Parts:
        """See `Method.parts`."""
        assert self.method is not None
        parts = self.method.parts()
        assert parts.reader is not None
        return replace(parts, reader=NotedReader(parts.reader, self.notes))


def noted(method: Method) -> Noted:
    """The same method, with its choices written down in `notes`."""
    return Noted(method.keep, min_prompt=method.min_prompt, method=method)


def check_note(note: Note) -> None:
    """A choice reads no pad, nothing twice, the new token always, and as many tokens as it may, or all of them."""
    rows, heads, tokens = note.there.shape
    for row in range(rows):
        for head in range(heads):
            read, there = note.slots(row, head), int(note.there[row, head].sum())
            what = f"layer {note.layer}, row {row}, head {head}"
            assert bool(note.there[row, head, read].all()), f"{what}: a pad is read"
            assert len(read) == len(set(read.tolist())), f"{what}: a token is read twice"
            assert tokens - 1 in read.tolist(), f"{what}: the new token is not read"
            allowed = min(int(note.counts[row, head]), there)
            assert len(read) in (allowed, there), f"{what}: {len(read)} tokens are read, not {allowed}"


def read_instead(choice: Choice, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, keys and a mask (B, H, N) with which dense attention reads what was chosen."""
    assert choice.slots is not None
    valid = torch.ones_like(choice.slots, dtype=torch.bool) if choice.valid is None else choice.valid
    visible = torch.zeros(key.shape[:3], dtype=torch.bool)
    key = key.clone()
    for row in range(key.shape[0]):
        for head in range(key.shape[1]):
            slots = choice.slots[row, head, valid[row, head]]
            visible[row, head, slots] = True
            if choice.keys is not None:
                key[row, head, slots] = choice.keys[row, head, valid[row, head]].to(key.dtype)
    return query if choice.query is None else choice.query[:, :, None].to(query.dtype), key, visible
