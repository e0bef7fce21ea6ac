"""Vertical-slash: columns and diagonals that the last rows of a prompt attend to (MInference, arXiv:2407.02490).

With A the attention of the last R rows of a head, and n tokens:

    vertical[j] = mean over i of A[i, j]          the `sinks` first columns before all others
    slash[o]    = mean over i of A[i, i - o]      the `local` smallest offsets before all others
    a row reads the best columns and the best diagonals
    rows ↔ R = 64, sinks ↔ 30, local ↔ 100

A diagonal is read as the diagonals of blocks that hold any of it. They get the budget but for `vertical_share`, best
first as long as they fit; columns, whose cost is then known, get all that is left. So every head computes the same
share, used up to a column.

Cost: R n D per head, and sorting n columns.

Deviations:
1. The paper fixes numbers of columns and diagonals for each head, by a search on samples (1000 and 6096 where it has
   none), which is a density at one length only; here `keep` is the density, and what is really read is counted.
2. Sinks and local diagonals are read before all others instead of in any case, as far as they fit into half of what is
   there for their kind: small budgets are honoured, and go to more than what is always read.
3. The paper's kernel reads blocks of 64 that begin anywhere; here they lie on one grid.
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
from sparing.measures.blocks import best_offsets, best_that_fit, column_costs, diagonals_of, last_means


@register(
    "vertical_slash",
    family="sparse_prefill",
    unit="block",
    moment="prefill",
    paper="2407.02490",
    summary="columns and diagonals that the last rows attend to",
)
@dataclass(frozen=True)
class VerticalSlash(SparsePrefill):
    """MInference's vertical-slash pattern. See the module.

    Attributes:
        rows: last rows that are looked at (64).
        vertical_share: share of the budget that is for columns, in [0, 1]; what diagonals leave is theirs as well.
        sinks: first columns, before all others (30). local: smallest offsets, before all others (100).
    """

    block: int = 64
    rows: int = 64
    vertical_share: float = 0.5
    sinks: int = 30
    local: int = 100

    chunks: ClassVar[Chunks] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rows >= 1, "rows", self.rows, "a number of rows >= 1")
        require(0 <= self.vertical_share <= 1, "vertical_share", self.vertical_share, "a share in [0, 1]")
        require(self.sinks >= 0, "sinks", self.sinks, "a number of tokens >= 0")
        require(self.local >= 0, "local", self.local, "a number of tokens >= 0")

    def pattern(self, call: PromptCall) -> Pattern:
        """See `SparsePrefill.pattern`."""
        grid, number = call.grid(self.block), diagonals_of(call.grid(self.block))
        areas = grid.areas() * (number > 0)
        room = self.pairs(call) - grid.pairs()[:, None]
        vertical, slash = last_means(call, self.rows)
        whole = areas.new_zeros(grid.num_key_blocks).index_add_(0, number.flatten(), areas.flatten())
        whole, for_slashes = whole.expand(call.heads, -1), (room * (1 - self.vertical_share)).long()
        near = math.ceil(max(self.local - 1, 0) / self.block) + 1
        on = best_that_fit(_first(best_offsets(slash, self.block), near, whole, for_slashes), whole, for_slashes)
        costs = column_costs(on[:, number], areas, self.block).repeat_interleave(self.block, dim=1)[:, : call.tokens]
        left = room - (on * whole).sum(1, keepdim=True)
        columns = best_that_fit(_first(vertical, self.sinks, costs, left), costs, left)
        return Pattern(call.tokens, call.start, self.block, on[:, number], columns[:, None])


def _first(scores: Tensor, count: int, costs: Tensor, room: Tensor) -> Tensor:
    """(Hq, n) scores with the first `count` before all others, as far as these fit into half of the room."""
    is_first = (costs.cumsum(-1) * 2 <= room) & (torch.arange(scores.shape[-1], device=scores.device) < count)
    return scores.masked_fill(is_first, torch.inf)
