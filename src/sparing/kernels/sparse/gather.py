"""Attention under a pattern without a compiler: what every query block reads is gathered, and attended without a mask.

A *problem* is a query block of a head. Its parts are merged by log-sum-exp: its own block (causal), the whole blocks
that it reads, and the columns. Problems that read equally many blocks are solved together, few at a time, so that what
is gathered stays in the caches.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.core.pattern import Partial, Pattern, merged
from sparing.core.scorer import Softmax
from sparing.kernels.sparse.partial import attend_part, needs_gradients

# Keys that are gathered at a time, unless a single problem has more.
GATHERED = 8192


def attend_gathered(query: Tensor, keys: Tensor, values: Tensor, pattern: Pattern, softmax: Softmax) -> Partial:
    """Attention under a pattern.

    Args:
        query: (Hq, Q, D). keys, values: (H, N, D) and (H, N, Dv).

    Returns:
        out (Hq, Q, Dv) and lse (Hq, Q), sinks left out.
    """
    problems = _Problems(query, keys, values, pattern, softmax)
    size, heads = pattern.size, pattern.heads
    out = query.new_zeros(len(problems.counts), size, values.shape[-1])
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = torch.zeros(len(problems.counts), size, dtype=exact, device=query.device)
    for count in problems.counts.unique().tolist():
        alike = (problems.counts == count).nonzero()[:, 0]
        for some in alike.split(max(GATHERED // ((count + 1) * size), 1)):
            solved = problems.solve(some, count)
            out.index_copy_(0, some, solved.out)
            lse.index_copy_(0, some, solved.lse)
    front = pattern.start - pattern.first_block * size
    rows = slice(front, front + pattern.rows)
    return Partial(out.view(heads, -1, values.shape[-1])[:, rows], lse.view(heads, -1)[:, rows])


class _Problems:
    """All query blocks of all heads, and the blocks of keys.

    Attributes:
        counts: (problems,) key blocks that each reads besides its own.
    """

    def __init__(self, query: Tensor, keys: Tensor, values: Tensor, pattern: Pattern, softmax: Softmax) -> None:
        size, queries, blocks = pattern.size, pattern.num_query_blocks, pattern.num_key_blocks
        back = blocks * size - pattern.tokens
        self.pattern, self.softmax = pattern, softmax
        front = pattern.start - pattern.first_block * size
        self.states = _padded(query, front, back).reshape(pattern.heads * queries, size, -1)
        self.grids = [_padded(x, 0, back).reshape(-1, size, x.shape[-1]) for x in (keys, values)]
        problem = torch.arange(pattern.heads * queries, device=query.device)
        self.first = problem // queries // (pattern.heads // keys.shape[0]) * blocks  # block 0 of the KV head
        self.number = pattern.first_block + problem % queries
        self.others = (pattern.blocks & ~pattern.own()).view(len(problem), blocks)
        self.counts = self.others.sum(-1)
        most = max(GATHERED // size, int(self.counts.max()) + 1)
        # Used again and again: memory that was never touched is slow to write.
        self.rooms = [x.new_empty(most, *x.shape[1:]) for x in self.grids]
        self.keeps_graph = needs_gradients(self.states, *self.grids)  # then nothing may be overwritten
        self.columns = _Columns(pattern) if pattern.columns is not None else None

    def solve(self, some: Tensor, count: int) -> Partial:
        """The attention of some problems that read equally many blocks: (problems, S, Dv)."""
        states, own = self.states.index_select(0, some), self.number[some, None]
        others = self.others[some].nonzero()[:, 1].view(len(some), count)
        if self.pattern.rule is not None or not self.pattern.is_causal:
            which = torch.cat([own, others], dim=1)
            keys, values = self._gather(which + self.first[some, None])
            sees_all = (
                self.pattern.rule is None
                and self.pattern.tokens % self.pattern.size == 0
                and not self.pattern.is_causal
            )
            return attend_part(states, keys, values, self.softmax, mask=None if sees_all else self._mask(which))
        keys, values = self._gather(own + self.first[some, None])
        total = attend_part(states, keys, values, self.softmax, is_causal=True)
        if count:
            keys, values = self._gather(others + self.first[some, None])
            total = merged(total, attend_part(states, keys, values, self.softmax))
        return total if self.columns is None else self._with_columns(total, states, some)

    def _with_columns(self, total: Partial, states: Tensor, some: Tensor) -> Partial:
        """The problems once their columns are read as well: those that have any."""
        assert self.columns is not None
        slots, valid = self.columns.of(some)
        has = valid.any(-1).nonzero()[:, 0]
        if not len(has):
            return total
        out, lse = total.out.clone(), total.lse.clone()  # gradients need what was there
        for part in has.split(max(GATHERED // max(slots.shape[1], 1), 1)):
            at = (slots[part] + self.first[some[part], None] * self.pattern.size).flatten()
            keys, values = (x.flatten(0, 1).index_select(0, at).view(len(part), -1, x.shape[-1]) for x in self.grids)
            read = attend_part(states[part], keys, values, self.softmax, mask=valid[part, None])
            both = merged(Partial(out[part], lse[part]), read)
            out[part], lse[part] = both.out, both.lse
        return Partial(out, lse)

    def _gather(self, which: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (problems, blocks * S, D) of the blocks of each problem; valid until the next call."""
        rooms: list[Tensor | None] = [room[: which.numel()] for room in self.rooms]
        if self.keeps_graph:
            rooms = [None, None]
        keys, values = (
            torch.index_select(x, 0, which.flatten(), out=room).view(len(which), -1, x.shape[-1])
            for x, room in zip(self.grids, rooms, strict=True)
        )
        return keys, values

    def _mask(self, which: Tensor) -> Tensor:
        """(problems, S, blocks * S) bool: what the rows may see of these blocks, the first of which is their own."""
        pattern, inside = self.pattern, torch.arange(self.pattern.size, device=which.device)
        keys = (which[..., None] * pattern.size + inside).flatten(1)[:, None]
        rows = (which[:, :1] * pattern.size + inside)[..., None]
        mask = (keys < pattern.tokens) if not pattern.is_causal else (keys <= rows)
        if pattern.rule is not None:
            mask = mask & pattern.rule(rows, keys)
        return mask | (rows == keys)  # rows that are no tokens read themselves


class _Columns:
    """The columns that problems read outside the blocks that are on for them."""

    def __init__(self, pattern: Pattern) -> None:
        assert pattern.columns is not None
        self.pattern, self.groups = pattern, pattern.group_of_block()
        self.numbers = torch.arange(pattern.tokens, device=pattern.blocks.device)

    def of(self, some: Tensor) -> tuple[Tensor, Tensor]:
        """(problems, c) int64 positions of the columns of some problems, and which of them are there."""
        pattern = self.pattern
        assert pattern.columns is not None
        head, block = some // pattern.num_query_blocks, some % pattern.num_query_blocks
        on = pattern.blocks[head, block].repeat_interleave(pattern.size, dim=-1)[:, : pattern.tokens]
        edge = (block + pattern.first_block) * pattern.size
        read = pattern.columns[head, self.groups[block]] & ~on & (self.numbers < edge[:, None])
        counts = read.sum(-1)
        valid = torch.arange(int(counts.max()), device=some.device) < counts[:, None]
        slots = torch.zeros_like(valid, dtype=torch.int64)
        slots[valid] = read.nonzero()[:, 1]
        return slots, valid


def _padded(x: Tensor, front: int, back: int) -> Tensor:
    return F.pad(x, (0, 0, front, back)) if front or back else x
