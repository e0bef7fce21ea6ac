"""Grids of tokens (images, videos), whose tokens see each other in both directions.

Tokens come row by row (the last axis fastest), text after them. To be read by blocks they are put in another order:
tile by tile, so that a tile, a small box of the grid, is a block of a pattern. What is read does not depend on the
order, since positions are in the keys already.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.core.pattern import Pattern
from sparing.core.prefill import SparsePrefill
from sparing.errors import require


@dataclass(frozen=True)
class Grid:
    """A grid and the text after it.

    Attributes:
        shape: length of every axis, the slowest first. text: tokens after the grid's own.
    """

    shape: tuple[int, ...]
    text: int = 0

    def __post_init__(self) -> None:
        is_shape = 1 <= len(self.shape) <= 3 and all(type(n) is int and n >= 1 for n in self.shape)
        require(is_shape, "grid", self.shape, "one to three whole numbers >= 1")
        require(self.text >= 0, "text_tokens", self.text, "a number of tokens >= 0")

    @property
    def cells(self) -> int:
        """Tokens of the grid itself."""
        return math.prod(self.shape)

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.cells + self.text

    def tile(self, wanted: tuple[int, ...] | None, most: int) -> tuple[int, ...]:
        """The wanted tile, or the one of at most so many tokens that holds most for its size; it divides the grid.

        Raises:
            InvalidInputError: the wanted tile does not divide the grid.
        """
        if wanted is not None:
            divides = len(wanted) == len(self.shape) and all(
                n % s == 0 for n, s in zip(self.shape, wanted, strict=True)
            )
            require(divides, "group", wanted, f"a divisor of every axis of the grid {self.shape}")
            return wanted
        divisors = ([s for s in range(1, min(n, most) + 1) if n % s == 0] for n in self.shape)
        fitting = (tile for tile in itertools.product(*divisors) if math.prod(tile) <= most)
        return max(fitting, key=lambda tile: math.prod(tile) / sum(tile))

    def order(self, tile: tuple[int, ...]) -> Tensor:
        """(tokens,) int64: which token stands at each place, tile by tile, text last."""
        axes = len(self.shape)
        split = [part for n, s in zip(self.shape, tile, strict=True) for part in (n // s, s)]
        by_tile = torch.arange(self.cells).view(split).permute(*range(0, 2 * axes, 2), *range(1, 2 * axes, 2))
        return torch.cat([by_tile.flatten(), torch.arange(self.cells, self.tokens)])

    def places(self, tile: tuple[int, ...]) -> Tensor:
        """(tiles, axes) int64: where each tile lies, counted in tiles."""
        return torch.cartesian_prod(*(torch.arange(n // s) for n, s in zip(self.shape, tile, strict=True))).view(
            -1, len(self.shape)
        )

    def with_text(self, blocks: Tensor, size: int) -> Tensor:
        """(nb, nb) bool: the (tiles, tiles) blocks of the grid, and those of text, which reads and is read by all."""
        tiles = len(blocks)
        total = tiles + -(-self.text // size)
        full = torch.ones(total, total, dtype=torch.bool)
        full[:tiles, :tiles] = blocks
        return full


@dataclass(frozen=True)
class Layout:
    """How a method reads a grid.

    Attributes:
        order: (tokens,) int64, which token stands at each place. pattern: what the places read, of one head for all.
    """

    order: Tensor
    pattern: Pattern


@dataclass(frozen=True)
class GridSparse(SparsePrefill):
    """Base of methods that read grids as well as prompts."""

    def lay_out(self, grid: Grid) -> Layout:
        """The order of a grid's tokens, and what is read."""
        raise NotImplementedError

    def grid_pairs(self, grid: Grid) -> int:
        """The budget of a head: pairs among all tokens of a grid."""
        tokens = grid.tokens
        if self.budget.kind == "ratio":
            return int(self.budget.amount * tokens**2 + 0.5)
        return min(int(self.budget.amount), tokens) * tokens
