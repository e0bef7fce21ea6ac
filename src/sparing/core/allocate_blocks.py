"""Allocators of blocks: scores of blocks and a budget of (query, key) pairs in, blocks that are computed out.

Every one of them stays within the budget of a layer, heads times pairs, unless what is always on exceeds it, and leaves
less than a block of every row (or of the layer, where all rows share it) unused. Ties go to the earlier block.

Shape legend: Hq query heads, nq blocks of query rows, nk blocks of keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparing.errors import require


@dataclass(frozen=True)
class BlockBudget:
    """How much may be computed.

    Attributes:
        areas: (nq, nk) int64 pairs of every block. reachable: (nq, nk) bool, blocks with any pair.
        forced: (Hq, nq, nk) bool, blocks that are on in any case. pairs: per head, on average.
        blocks_until: (nk + 1,) float64, of a head: how many blocks the rows before each edge, from position 0 on, may
            compute besides what is forced there; for allocators that look at no row behind.
    """

    areas: Tensor
    reachable: Tensor
    forced: Tensor
    pairs: int
    blocks_until: Tensor | None = None

    @property
    def free(self) -> Tensor:
        """(Hq, nq, nk) bool: blocks to choose from."""
        return self.reachable & ~self.forced

    @property
    def left(self) -> int:
        """Pairs of the whole layer that are left to choose; at least 0."""
        return max(self.pairs * self.forced.shape[0] - int((self.forced * self.areas).sum()), 0)


class BlockAllocator(Protocol):
    """Chooses blocks."""

    def allocate(self, scores: Tensor, budget: BlockBudget, *, is_mass: bool) -> Tensor:
        """(Hq, nq, nk) bool: blocks that are on, the forced ones among them.

        Args:
            scores: (Hq, nq, nk) float32, higher = keep. is_mass: they estimate attention mass; where they do not,
                allocators that compare rows use their softmax over a row instead.
        """
        ...


@dataclass(frozen=True)
class EqualRows:
    """Every query row of every head reads the same share of the keys before it.

    A row's number of blocks depends on its position alone, so that a prompt in chunks is read as the whole is: with
    U(i) blocks that the budget allows for the rows before block i, forced ones taken off, row i reads
    floor(U(i + 1)) - floor(U(i)) more. What is forced in excess is saved later.
    """

    def allocate(self, scores: Tensor, budget: BlockBudget, *, is_mass: bool) -> Tensor:
        """See `BlockAllocator.allocate`."""
        assert budget.blocks_until is not None
        until = (budget.blocks_until + 1e-9).clamp_min(0).cummax(0).values.floor().long()
        counts = until.diff()[-scores.shape[1] :].to(scores.device)
        return budget.forced | _best_of_rows(scores, budget.free, counts.expand(scores.shape[:2]))


@dataclass(frozen=True)
class AllRows:
    """The best blocks of a layer, whichever head and row they belong to."""

    def allocate(self, scores: Tensor, budget: BlockBudget, *, is_mass: bool) -> Tensor:
        """See `BlockAllocator.allocate`."""
        return budget.forced | best_within(as_mass(scores, budget.reachable, is_mass), budget)


@dataclass(frozen=True)
class TopMass:
    """Every row reads its best blocks until they hold a share of its mass, the block that crosses it included.

    Blocks are taken in the order of the mass that a row's better blocks hold already, least first, over all rows and
    heads of a layer: with a budget alone, the share is the largest that fits.

    Attributes:
        mass: the share to hold, in (0, 1]; rows that have it take no more blocks. None: as much as the budget allows.
    """

    mass: float | None = None

    def __post_init__(self) -> None:
        is_share = self.mass is None or 0 < self.mass <= 1
        require(is_share, "TopMass.mass", self.mass, "a share in (0, 1], or None")

    def allocate(self, scores: Tensor, budget: BlockBudget, *, is_mass: bool) -> Tensor:
        """See `BlockAllocator.allocate`."""
        held = mass_of_better(as_mass(scores, budget.reachable, is_mass), budget.forced)
        most = torch.inf if self.mass is None or self.mass == 1 else self.mass  # what rounds to 1 is not all of it
        wanted = budget.free & (held < most)
        return budget.forced | best_within(-held, budget, wanted)


BLOCK_ALLOCATORS = {"rows": EqualRows, "layer": AllRows, "top_mass": TopMass}


def as_mass(scores: Tensor, reachable: Tensor, is_mass: bool) -> Tensor:
    """(Hq, nq, nk) scores as shares of each row that sum to 1."""
    if not is_mass:
        return scores.masked_fill(~reachable, -torch.inf).softmax(-1)
    there = scores.masked_fill(~reachable, 0.0).clamp_min(0.0)
    return there / there.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


def mass_of_better(mass: Tensor, forced: Tensor) -> Tensor:
    """(Hq, nq, nk): the mass that the better blocks of the same row hold, forced ones before all others."""
    ordered, order = (mass + 2.0 * forced).sort(dim=-1, descending=True, stable=True)
    ordered = ordered - 2.0 * forced.gather(-1, order)
    return torch.empty_like(mass).scatter_(-1, order, ordered.cumsum(-1) - ordered)


def best_within(values: Tensor, budget: BlockBudget, wanted: Tensor | None = None) -> Tensor:
    """(Hq, nq, nk) bool: the blocks of the highest values that fit into what is left, of those wanted."""
    free = budget.free if wanted is None else wanted
    order = values.masked_fill(~free, -torch.inf).flatten().sort(descending=True, stable=True).indices
    areas = (budget.areas * free).flatten()[order]
    fits = (areas.cumsum(0) <= budget.left) & (areas > 0)
    return (
        torch.zeros_like(free)
        .flatten()
        .index_put_((order[fits],), torch.ones_like(order[fits], dtype=torch.bool))
        .view_as(free)
    )


def best_by_position(values: Tensor, forced: Tensor, until: Tensor, size: int) -> Tensor:
    """(heads, nk, nk) bool: the best blocks of every row, as many as its position allows, and those that are forced.

    No row's number depends on rows after it, so that a prompt gets the same blocks in whatever parts it is read. What a
    row cannot use, or takes too much, goes to the next; and heads take their next block one after another, so that all
    of them together are never more than a block below the budget, or above it where a call begins later.

    Args:
        values: (heads, nk, nk), higher = first; -inf for blocks that no budget buys. forced: (nk, nk) bool.
        until: (nk,) float64, the budget in pairs of a head for all rows up to the end of every block.
    """
    heads, numbers = values.shape[0], torch.arange(len(until), device=values.device)
    before = numbers < numbers[:, None]
    others = (forced & before).sum(-1).cumsum(0)
    own = (numbers + 1) * (size * (size + 1) / 2)
    room = ((until - own) / size**2 - others).clamp_min(0).cummax(0).values
    # The floors of x, x + 1/H, ..., x + (H - 1)/H add up to the floor of H x.
    turns = torch.arange(heads, device=values.device, dtype=torch.float64)[:, None] / heads
    taken = (room + turns).floor()
    counts = taken.diff(dim=-1, prepend=taken.new_zeros(heads, 1)).long()
    free = before & ~forced & (values > -torch.inf)
    return _best_of_rows(values, free, counts) | forced


def _best_of_rows(scores: Tensor, free: Tensor, counts: Tensor) -> Tensor:
    """(Hq, nq, nk) bool: the `counts` best free blocks of every row."""
    order = scores.masked_fill(~free, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    )
    return (rank < counts[..., None]) & free
