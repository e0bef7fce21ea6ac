"""GRAT: groups of tokens that share what they read (Ren et al. 2025, arXiv:2505.14687).

Nothing is ranked by content. The tokens of a grid (image, video) are cut into equal groups; all tokens of a group
read the same groups, those nearest to theirs. With g and g' the places of two groups, counted in groups,

    surrounding:  distance(g, g') = max over axes |g_a − g'_a|
    criss-cross:  distance(g, g') = min over axes |g_a − g'_a|          0: the same frame, or row, or column of groups

group ↔ the box of tokens (the authors: 4 x 8 x 8 of a video), region ↔ which distance, radius ↔ how far is read. Text
reads everything and is read by all. Tokens are put in order group by group, so that a group is a block.

A prompt is a grid of one axis, where nobody reads what comes later: the first block and local ones.

Cost: one number for every pair of groups.

Deviations:
1. `keep` says how much is read: pairs of groups by distance (then by the sum over axes), each pair in both directions;
   groups at the border so read fewer. `radius` limits it; the authors' criss-cross is radius 0.
2. The group must divide the grid; by default it is the most compact one of at most `block` tokens that does. (The
   authors' code takes whole groups and has no word for the rest.)
3. Pads of text are not for this method: leave them out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparing.core.allocate_blocks import best_by_position
from sparing.core.grids import Grid, GridSparse, Layout
from sparing.core.method import register
from sparing.core.pattern import Pattern
from sparing.core.prefill import Chunks, PromptCall
from sparing.errors import require


@register(
    "grat",
    family="sparse_prefill",
    unit="block",
    moment="prefill",
    paper="2505.14687",
    summary="groups of tokens that read the groups around them; also for grids",
)
@dataclass(frozen=True)
class GRAT(GridSparse):
    """Groups around a group, or in line with it. See the module.

    Attributes:
        region: "surrounding" or "criss_cross".
        radius: the largest distance that is read, in groups; None: what the budget allows.
        group: the box of tokens on a grid, one number for each axis; None: one of about `block` tokens.
    """

    block: int = 256
    region: str = "surrounding"
    radius: int | None = None
    group: tuple[int, ...] | None = None

    chunks: ClassVar[Chunks] = "any"

    def __post_init__(self) -> None:
        super().__post_init__()
        regions = ("surrounding", "criss_cross")
        require(self.region in regions, "region", self.region, '"surrounding" or "criss_cross"')
        require(self.radius is None or self.radius >= 0, "radius", self.radius, "a number of groups >= 0, or None")
        is_box = self.group is None or all(type(n) is int and n >= 1 for n in self.group)
        require(is_box, "group", self.group, "whole numbers >= 1, or None")

    @property
    def reads_all(self) -> bool:
        """See `SparsePrefill.reads_all`."""
        return super().reads_all and self.radius is None

    def pattern(self, call: PromptCall) -> Pattern:
        """See `SparsePrefill.pattern`."""
        numbers = torch.arange(-(-call.tokens // self.block), device=call.query.device)
        values = numbers.double().expand(len(numbers), -1)
        if self.radius is not None:
            values = values.masked_fill(numbers[:, None] - numbers > self.radius, -torch.inf)
        forced = (numbers == 0) | (numbers == numbers[:, None])
        until = self.pairs_until((numbers + 1) * self.block)
        blocks = best_by_position(values.expand(call.heads, -1, -1), forced, until, self.block)
        return Pattern(call.tokens, call.start, self.block, blocks[:, call.start // self.block :])

    def lay_out(self, grid: Grid) -> Layout:
        """See `GridSparse.lay_out`."""
        tile = grid.tile(self.group, self.block)
        size, places = math.prod(tile), grid.places(tile)
        forced = grid.with_text(torch.eye(len(places), dtype=torch.bool), size)
        pattern = Pattern(grid.tokens, 0, size, forced[None], is_causal=False)
        room = (self.grid_pairs(grid) - int(pattern.pairs()[0])) // (2 * size**2)
        blocks = grid.with_text(self._nearest(places, max(room, 0)), size)
        return Layout(grid.order(tile), Pattern(grid.tokens, 0, size, blocks[None], is_causal=False))

    def _nearest(self, places: Tensor, count: int) -> Tensor:
        """(groups, groups) bool: each itself, and so many pairs of different ones in both directions."""
        first, second = torch.triu_indices(len(places), len(places), offset=1)
        apart = (places[first] - places[second]).abs()
        distance = apart.amax(-1) if self.region == "surrounding" else apart.amin(-1)
        order = (distance * (1 + int(places.max()) * places.shape[1]) + apart.sum(-1)).sort(stable=True).indices
        if self.radius is not None:
            order = order[distance[order] <= self.radius]
        read = torch.eye(len(places), dtype=torch.bool)
        some = order[:count]
        read[first[some], second[some]] = True
        return read | read.T
