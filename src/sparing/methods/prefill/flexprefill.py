"""FlexPrefill: a test of every head, then as many columns, diagonals or blocks as hold gamma (arXiv:2502.20766).

With A the attention of the last R rows of a head, K̄ the mean keys of blocks and q̄ the mean of the R queries:

    p[j] = mean over rows of sum of A over block j          p̂ = softmax(q̄ · K̄ / sqrt(D))
    sqrt(JS(p̂, p)) < tau                                    the head is read by blocks, else by columns and diagonals
    columns: mean over rows of A[i, j]    diagonals: mean over rows of A[i, i - o]    blocks: softmax(Q̄ K̄ᵀ / sqrt(D))
    of each, best first, until they hold gamma of their sum; the one that crosses it is taken
    block ↔ 128 tokens, which is R too; tau ↔ 0.1, gamma ↔ 0.9 or 0.95

Without `gamma`, it is what the budget of a layer affords, one and the same for all of its heads. Room that a diagonal
does not fit into is for the next columns and blocks.

Cost: R n D per head and sorting n columns; for heads that are read by blocks also nq * nk * D.

Deviations:
1. `keep` is the density, and stays the ceiling where `gamma` is given; there is no least number of tokens (512 or 1024
   in the authors' code), which would be a density of its own.
2. The first block and a row's own come before all others, instead of the first block in any case.
3. Columns are tokens, as in the paper; the authors' code reads the blocks of the best columns, as many as the columns
   would fill. A diagonal is read as the diagonals of blocks that hold any of it.
4. Blocks hold gamma of every row. The authors' code takes gamma of all rows together, which starves some.
5. p̂ counts the tokens of a block that the rows see, so that a last block of few tokens is not taken for a whole one.
   The divergence is 0 log 0 = 0 safe: in the authors' code a vanishing p makes it nan, and the head vertical-slash.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparing.core.allocate_blocks import as_mass, mass_of_better
from sparing.core.method import register
from sparing.core.pattern import Pattern
from sparing.core.prefill import Chunks, PromptCall, SparsePrefill
from sparing.errors import require
from sparing.measures.blocks import (
    best_offsets,
    best_that_fit,
    block_sums,
    column_costs,
    diagonals_of,
    last_means,
    pooled,
    pooled_logits,
)


@register(
    "flexprefill",
    family="sparse_prefill",
    unit="block",
    moment="prefill",
    paper="2502.20766",
    summary="as many columns and diagonals, or blocks, as hold the mass of each head",
)
@dataclass(frozen=True)
class FlexPrefill(SparsePrefill):
    """Heads tested, and read until gamma is held. See the module.

    Attributes:
        gamma: share of its attention that a head reads, in (0, 1] (the paper's: 0.9 and 0.95); None: what fits `keep`.
        tau: distance below which pooled queries and keys are taken to tell the blocks of a head (0.1).
    """

    gamma: float | None = None
    tau: float = 0.1

    chunks: ClassVar[Chunks] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        is_share = self.gamma is None or 0 < self.gamma <= 1
        require(is_share, "gamma", self.gamma, "a share in (0, 1], or None for what fits keep")
        require(self.tau >= 0, "tau", self.tau, "a distance >= 0")

    @property
    def reads_all(self) -> bool:
        """See `SparsePrefill.reads_all`."""
        return self.budget.keeps_all and self.gamma in (None, 1)

    def pattern(self, call: PromptCall) -> Pattern:
        """See `SparsePrefill.pattern`."""
        vertical, slash = last_means(call, self.block)
        by_blocks = pooled_distance(call, vertical, self.block) < self.tau
        units = _Units(call.grid(self.block), by_blocks)
        held = units.held(vertical, slash, self._block_mass(call, by_blocks))
        if self.gamma is not None and self.gamma < 1:
            held = [part.masked_fill(part >= self.gamma, torch.inf) for part in held]
        return units.best(held, self.pairs(call) * call.heads)

    def _block_mass(self, call: PromptCall, by_blocks: Tensor) -> Tensor:
        """(heads, nq, nk) what blocks hold of every row, of the heads that are read by blocks."""
        reachable = call.grid(self.block).reachable()
        if not bool(by_blocks.any()):
            return reachable.new_zeros(0, *reachable.shape, dtype=torch.float64)
        return as_mass(pooled_logits(call, self.block)[by_blocks], reachable, is_mass=False).double()


def pooled_distance(call: PromptCall, vertical: Tensor, size: int) -> Tensor:
    """(Hq,) float64: sqrt of the Jensen-Shannon divergence between pooled and true attention of the last rows.

    Args:
        vertical: (Hq, N) mean attention of the last `size` rows.
    """
    queries = call.query[:, -size:].float().mean(1, keepdim=True)
    keys = pooled(call.keys, size).repeat_interleave(call.group, dim=0)
    logits = call.softmax.capped((queries @ keys.transpose(-1, -2))[:, 0] * call.softmax.scaling)
    seen = torch.arange(max(call.tokens - size, call.start), call.tokens, device=keys.device)[:, None] + 1
    counts = (seen - torch.arange(keys.shape[1], device=keys.device) * size).clamp(0, size).double().mean(0)
    guess, true = (logits.double() + counts.log()).softmax(-1), block_sums(vertical.double(), size)
    middle = (guess + true) / 2
    to_guess, to_true = (torch.xlogy(part, part) - torch.xlogy(part, middle) for part in (guess, true))
    return ((to_guess + to_true).sum(-1) / 2).clamp_min(0).sqrt()


@dataclass(frozen=True)
class _Units:
    """What is chosen from: columns and diagonals of some heads, blocks of the others.

    Attributes:
        by_blocks: (Hq,) bool, heads that are read by blocks.
    """

    grid: Pattern
    by_blocks: Tensor

    def held(self, vertical: Tensor, slash: Tensor, blocks: Tensor) -> list[Tensor]:
        """What the better units of the same head (of blocks: and row) hold; inf for what is no unit.

        Args:
            vertical, slash: (Hq, N), blocks: (heads read by blocks, nq, nk): what each unit holds.

        Returns:
            (Hq, N) of columns, (Hq, nk) of diagonals, (heads read by blocks, nq, nk) of blocks.
        """
        numbers, before = torch.arange(self.grid.tokens, device=slash.device), diagonals_of(self.grid)
        is_no_unit, is_sink = self.by_blocks[:, None], torch.arange(blocks.shape[-1], device=slash.device) == 0
        lines = -best_offsets(-_held(slash.double(), numbers == 0), self.grid.size)
        return [
            _held(vertical.double(), numbers < self.grid.size).masked_fill(is_no_unit, torch.inf),
            lines.masked_fill(is_no_unit, torch.inf),
            _held(blocks, is_sink | (before == 0)).masked_fill(~self.grid.reachable(), torch.inf),
        ]

    def best(self, held: Sequence[Tensor], pairs: int) -> Pattern:
        """The units that come first, as many as fit into the pairs of a layer."""
        columns, slash, blocks = held
        number, size = diagonals_of(self.grid), self.grid.size
        areas = self.grid.areas() * (number > 0)
        room = pairs - int(self.grid.pairs().sum())
        order = slash.flatten().sort(stable=True).indices

        def diagonals(count: int) -> Tensor:
            on = torch.zeros(slash.numel(), dtype=torch.bool, device=slash.device)
            return on.index_fill_(0, order[:count], True).view_as(slash)[:, number]

        def is_room(count: int) -> bool:
            """For so many diagonals, and all that comes before the last of them."""
            on, last = diagonals(count), slash.flatten()[order[count - 1]]
            costs = block_sums(columns <= last, size) * column_costs(on, areas, size)
            return int((on * areas).sum() + costs.sum() + ((blocks <= last) * areas).sum()) <= room

        low, high = 0, int(slash.isfinite().sum())
        while low < high:  # what is read grows with the number of diagonals
            middle = (low + high + 1) // 2
            low, high = (middle, high) if is_room(middle) else (low, middle - 1)
        on = diagonals(low)
        costs = column_costs(on, areas, size).repeat_interleave(size, dim=1)[:, : self.grid.tokens]
        costs = torch.cat([costs.flatten(), areas.expand_as(blocks).flatten()])
        others = torch.cat([columns.flatten(), blocks.flatten()])
        chosen = best_that_fit(-others, costs, room - int((on * areas).sum()))
        some, on[self.by_blocks] = chosen[: columns.numel()].view_as(columns), chosen[columns.numel() :].view_as(blocks)
        return Pattern(self.grid.tokens, self.grid.start, size, on, some[:, None])


def _held(mass: Tensor, first: Tensor) -> Tensor:
    """What better units of the same row hold; -1 for those that come before all others."""
    return mass_of_better(mass, first.expand_as(mass)).masked_fill(first, -1.0)
