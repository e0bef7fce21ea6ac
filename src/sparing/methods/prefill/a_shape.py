"""A-shape and tri-shape: the first tokens and a local window, for every head alike (MInference, arXiv:2407.02490).

A row i reads the keys j < sinks and i - j < window, by blocks. Nothing is ranked. The window is what `keep` leaves:
with a ratio it grows with the position, so that every row reads the same share of what lies before it, and with a
number of keys it stays the same. Only the position of a row matters, so that a prompt may be read in any chunks.

    sinks ↔ 100 tokens; the window (800 in the paper's search) ↔ keep

Tri-shape (SCBench, arXiv:2412.10319) also reads densely the last rows, where the question is.

Cost: nothing that grows with the prompt but the map of blocks.

Deviations:
1. The share of a row is met up to a block; what is left of it goes to the next rows. A call that does not begin at
   position 0 may therefore compute up to a block of every head more than its share.
2. Sinks take no more than half of the blocks that a row reads besides its own, and dense rows of tri-shape no more than
   half of the budget: small budgets are honoured. The paper fixes all numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparing.core.method import register
from sparing.core.pattern import Pattern
from sparing.core.prefill import Chunks, PromptCall, SparsePrefill
from sparing.errors import require
from sparing.measures.blocks import diagonals_of


@register(
    "a_shape",
    family="sparse_prefill",
    unit="block",
    moment="prefill",
    paper="2407.02490",
    summary="the first tokens and a local window, whatever the prompt",
)
@dataclass(frozen=True)
class AShape(SparsePrefill):
    """Sinks and a local window. See the module.

    Attributes:
        sinks: first tokens that all rows read (100), in whole blocks.
    """

    block: int = 64
    sinks: int = 100

    chunks: ClassVar[Chunks] = "any"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.sinks >= 0, "sinks", self.sinks, "a number of tokens >= 0")

    def pattern(self, call: PromptCall) -> Pattern:
        """See `SparsePrefill.pattern`."""
        grid = call.grid(self.block)
        ends = (torch.arange(grid.num_key_blocks, device=grid.blocks.device) + 1.0).double() * self.block
        own = ends * (self.block + 1) / 2
        counts = _block_counts((self.pairs_until(ends) - own) / self.block**2)
        return self._shaped(grid, counts[grid.first_block :])

    def _shaped(self, grid: Pattern, counts: Tensor, dense: Tensor | None = None) -> Pattern:
        """Sinks and windows of (nq,) blocks besides the own, and (nq,) bool, rows that read everything."""
        blocks = counts[:, None]
        sinks = ((blocks + 1) / 2).floor().clamp_max(math.ceil(self.sinks / self.block))
        numbers = torch.arange(grid.num_key_blocks, device=blocks.device)
        on = (numbers < sinks) | (diagonals_of(grid) <= blocks - sinks)
        if dense is not None:
            on = on | dense[:, None]
        return Pattern(grid.tokens, grid.start, grid.size, on.expand_as(grid.blocks))


@register(
    "tri_shape",
    family="sparse_prefill",
    unit="block",
    moment="prefill",
    paper="2412.10319",
    summary="the first tokens, a local window, and all of it for the last rows",
)
@dataclass(frozen=True)
class TriShape(AShape):
    """Sinks, a local window, and last rows that read everything. See the module.

    Attributes:
        dense_last: last rows that read everything (100), in whole blocks.
    """

    dense_last: int = 100

    chunks: ClassVar[Chunks] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.dense_last >= 0, "dense_last", self.dense_last, "a number of rows >= 0")

    def pattern(self, call: PromptCall) -> Pattern:
        """See `SparsePrefill.pattern`."""
        grid, pairs = call.grid(self.block), self.pairs(call)
        areas = grid.areas()
        there, own = areas.sum(1), (areas * grid.blocks[0]).sum(1)
        numbers = torch.arange(grid.first_block, grid.num_key_blocks, device=there.device)
        is_last = (numbers + 1) * self.block > grid.tokens - self.dense_last
        dense = is_last & (2 * there.flip(0).cumsum(0).flip(0) <= pairs)
        read = int(there[dense].sum())
        share = (pairs - read) / max(int(there.sum()) - read, 1)
        rows = ((numbers + 1) * self.block).clamp_max(grid.tokens) - (numbers * self.block).clamp_min(grid.start)
        each = (share * there - own).double() / (rows * self.block)
        each = torch.where(rows < self.block, each.floor(), each)  # so that a part of a block leaves nothing to others
        return self._shaped(grid, _block_counts(each.cumsum(0)), dense)


def _block_counts(until: Tensor) -> Tensor:
    """(blocks,) whole blocks that rows read, of the number that all rows up to each block may read together."""
    whole = until.floor().clamp_min(0)
    return whole.diff(prepend=whole.new_zeros(1))
