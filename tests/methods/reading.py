"""Readers on plain tensors: a prompt, then tokens one by one, and what each of them reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from oracles import Case

from sparing.core.reader import Choice, Reader, Step, until
from sparing.core.scorer import KeyValues, Queries


@dataclass(frozen=True)
class Read:
    """One step. `state`: the reader's, after it."""

    step: Step
    choice: Choice
    state: Any

    def slots(self, row: int, head: int) -> list[int]:
        """What was read, in order."""
        if self.choice.slots is None:
            return self.step.stored.valid[row, head].nonzero().squeeze(-1).tolist()
        slots = self.choice.slots[row, head]
        read = slots if self.choice.valid is None else slots[self.choice.valid[row, head]]
        assert len(set(read.tolist())) == len(read), "a token is read twice"
        return sorted(read.tolist())


def stored_until(case: Case, tokens: int) -> KeyValues:
    return until(case.stored, tokens)


def queries_of(case: Case, start: int, end: int) -> Queries:
    part = slice(start, end)
    asked = case.queries
    return Queries(asked.states[:, :, part], asked.positions[part], asked.valid[:, part], asked.softmax)


def prompt_state(reader: Reader, case: Case, prompt: int, sizes: Iterable[int] = ()) -> Any:
    """The state after a prompt, read in chunks of the given sizes."""
    state, start = None, 0
    for size in sizes or (prompt,):
        state = reader.observe(state, queries_of(case, start, start + size), stored_until(case, start + size))
        start += size
    assert start == prompt
    return state


def decode(reader: Reader, case: Case, prompt: int, count: int, sizes: Iterable[int] = ()) -> list[Read]:
    """Every token after the prompt, each reading `count` tokens per head."""
    state = prompt_state(reader, case, prompt, sizes)
    rows, heads = case.stored.keys.shape[:2]
    reads = []
    for token in range(prompt, case.tokens):
        counts = torch.full((rows, heads), count)
        stored = stored_until(case, token + 1)
        counts = counts.minimum((token + 1 - stored.pads)[:, None])
        step = Step(case.queries.states[:, :, token], stored, case.queries.softmax, counts)
        state, choice = reader.choose(state, step)
        copied = {k: v.clone() for k, v in state.items()} if isinstance(state, dict) else state
        reads.append(Read(step, choice, copied))
    return reads


def best_of_blocks(scores: list[float], size: int, tokens: int, pad: int, count: int) -> list[int]:
    """Slots by hand: blocks by falling score, ties to the earlier; of the one that is cut, the newest tokens."""
    read: list[int] = []
    for block in sorted(range(len(scores)), key=lambda b: (-scores[b], b)):
        inside = list(range(pad + block * size, min(pad + (block + 1) * size, tokens)))
        room = count - len(read)
        read += inside[max(len(inside) - room, 0) :] if room > 0 else []
    return sorted(read)
