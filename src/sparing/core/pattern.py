"""Patterns: which keys the queries of a prompt read, per query head, as blocks and columns.

A pattern is about one sequence without pads. Positions count its real tokens; query rows are the last Q of N tokens.
Blocks lie on a grid of `size` x `size` that begins at position 0, so that a prompt read in chunks meets the same grid.

Shape legend: Hq query heads, Q query rows, N keys, S = size, nq blocks that hold query rows, nk = ceil(N / S).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from sparing.errors import require

Count = TypeVar("Count", int, Tensor)


@dataclass
class Partial:
    """Attention over a part of the keys.

    Attributes:
        out: (..., rows, Dv) normalised over the part. lse: (..., rows) float32, the log of the sum of exp(logit);
            -inf where the part holds no key.
    """

    out: Tensor
    lse: Tensor


@dataclass(frozen=True)
class Pattern:
    """What each query head reads of a prompt.

    A row reads a key that is not after it if the block of both is on, or the key is one of its columns; and, where
    there is a `rule`, if that holds as well. The block that holds the row itself is always on, so no row is empty.

    Attributes:
        tokens: N. start: position of the first query row; Q = N - start.
        size: S, tokens of a block.
        blocks: (Hq, nq, nk) bool; entry [h, i, j] is query block start // S + i against key block j.
        columns: (Hq, G, N) bool, keys that whole groups of rows read; None for none. A row reads only those columns
            that lie before its own block.
        blocks_per_group: query blocks of a group, counted from block 0; None if all rows are one group.
        rule: (rows, keys) → bool, of positions that broadcast; all heads alike. It must hold for a row's own position.
        is_causal: False for grids of tokens that see each other in both directions (rows read keys after them).
    """

    tokens: int
    start: int
    size: int
    blocks: Tensor
    columns: Tensor | None = None
    blocks_per_group: int | None = None
    rule: Callable[[Tensor, Tensor], Tensor] | None = None
    is_causal: bool = True

    def __post_init__(self) -> None:
        require(0 <= self.start < self.tokens, "start", self.start, f"in [0, {self.tokens})")
        shape = (self.num_query_blocks, self.num_key_blocks)
        require(
            tuple(self.blocks.shape[1:]) == shape,
            "blocks",
            tuple(self.blocks.shape),
            f"(heads, {shape[0]}, {shape[1]})",
        )
        may = self.reachable()
        blocks = (self.blocks & may) | self.own()
        object.__setattr__(self, "blocks", blocks)
        if self.columns is not None:
            groups = int(self.group_of_block()[-1]) + 1
            wanted = (self.blocks.shape[0], groups, self.tokens)
            require(tuple(self.columns.shape) == wanted, "columns", tuple(self.columns.shape), str(wanted))
            require(self.is_causal, "columns", "given", "none where rows see keys after them")

    def dense(self) -> Pattern:
        """Dense attention of the same rows on the same grid."""
        return Pattern(self.tokens, self.start, self.size, torch.ones_like(self.blocks), is_causal=self.is_causal)

    # -- the grid -----------------------------------------------------------------------------------------------

    @property
    def heads(self) -> int:
        """Hq."""
        return int(self.blocks.shape[0])

    @property
    def rows(self) -> int:
        """Q."""
        return self.tokens - self.start

    @property
    def first_block(self) -> int:
        """The number of the block that holds the first query row."""
        return self.start // self.size

    @property
    def num_key_blocks(self) -> int:
        """nk."""
        return -(-self.tokens // self.size)

    @property
    def num_query_blocks(self) -> int:
        """nq."""
        return self.num_key_blocks - self.first_block

    def reachable(self) -> Tensor:
        """(nq, nk) bool: blocks that hold anything a row may see."""
        device = self.blocks.device
        if not self.is_causal:
            return torch.ones(self.num_query_blocks, self.num_key_blocks, dtype=torch.bool, device=device)
        return torch.arange(self.num_key_blocks, device=device) <= self._numbers()[:, None]

    def group_of_block(self) -> Tensor:
        """(nq,) int64: the group of every query block."""
        numbers = self._numbers()
        if self.blocks_per_group is None:
            return torch.zeros_like(numbers)
        groups = numbers // self.blocks_per_group
        return groups - groups[0]

    def own(self) -> Tensor:
        """(nq, nk) bool: the blocks that hold their rows themselves."""
        return torch.arange(self.num_key_blocks, device=self.blocks.device) == self._numbers()[:, None]

    def _numbers(self) -> Tensor:
        return torch.arange(self.first_block, self.num_key_blocks, device=self.blocks.device)

    # -- what is computed ---------------------------------------------------------------------------------------

    def may_read(self, head: int, rows: Tensor) -> Tensor:
        """(rows, N) bool: the pattern token by token, of a few rows given by their positions."""
        keys = torch.arange(self.tokens, device=rows.device)
        at = rows // self.size - self.first_block
        allowed = self.blocks[head][at][:, keys // self.size]
        if self.columns is not None:
            before = keys < (rows // self.size * self.size)[:, None]
            allowed = allowed | (self.columns[head][self.group_of_block()[at]] & before)
        if self.is_causal:
            allowed = allowed & (keys <= rows[:, None])
        return allowed if self.rule is None else allowed & self.rule(rows[:, None], keys)

    def extra_columns(self) -> Tensor | None:
        """(Hq, nq, nk) int64: columns that a query block reads in each key block that is off for it."""
        if self.columns is None:
            return None
        heads, groups, tokens = self.columns.shape
        padded = self.columns.new_zeros(heads, groups, self.num_key_blocks * self.size)
        padded[..., :tokens] = self.columns
        counts = padded.view(heads, groups, -1, self.size).sum(-1)[:, self.group_of_block()]
        return counts.masked_fill(self.blocks | ~self.reachable() | self.own(), 0)

    def pairs(self) -> Tensor:
        """(Hq,) int64: (query, key) pairs that are computed."""
        if self.rule is not None:
            return self._pairs_by_rule()
        rows, areas = self._areas()
        pairs = (self.blocks * areas).sum((1, 2))
        extra = self.extra_columns()
        return pairs if extra is None else pairs + (extra.sum(-1) * rows).sum(-1)

    def all_pairs(self) -> int:
        """Pairs of dense attention."""
        if not self.is_causal:
            return self.rows * self.tokens
        return causal_pairs(self.rows, self.tokens)

    def density(self) -> Tensor:
        """(Hq,) float64: pairs computed over all pairs, in (0, 1]."""
        return self.pairs().double() / self.all_pairs()

    def areas(self) -> Tensor:
        """(nq, nk) int64: (query, key) pairs of every block; 0 where no row sees a key."""
        return self._areas()[1]

    def _areas(self) -> tuple[Tensor, Tensor]:
        """(nq,) query rows of every block, and the pairs of every block."""
        device, edges = self.blocks.device, self._numbers() * self.size
        low, high = edges.clamp_min(self.start), (edges + self.size).clamp_max(self.tokens)
        rows = high - low
        begins = torch.arange(self.num_key_blocks, device=device) * self.size
        width = (begins + self.size).clamp_max(self.tokens) - begins
        areas = rows[:, None] * width
        if not self.is_causal:
            return rows, areas
        # Row i of its own block sees i - edge + 1 of the block's keys.
        triangle = (low + high + 1 - 2 * edges) * rows // 2
        return rows, torch.where(self.own(), triangle[:, None], areas) * self.reachable()

    def _pairs_by_rule(self) -> Tensor:
        alike = self.columns is None and bool((self.blocks == self.blocks[:1]).all())
        none = torch.zeros((), dtype=torch.int64, device=self.blocks.device)
        pairs = torch.stack([
            sum((self.may_read(h, rows).sum() for rows in self._positions()), none)
            for h in range(1 if alike else self.heads)
        ])  # fmt: skip
        return pairs.expand(self.heads)

    def _positions(self) -> list[Tensor]:
        return list(torch.arange(self.start, self.tokens, device=self.blocks.device).split(self.size))


@dataclass(frozen=True)
class Cost(Pattern):
    """What was computed where that is no set of blocks: its own blocks, and a number of pairs.

    Attributes:
        computed: (Hq,) int64 (query, key) pairs.
    """

    computed: Tensor | None = None

    def pairs(self) -> Tensor:
        """See `Pattern.pairs`."""
        assert self.computed is not None
        return self.computed


def blank(heads: int, tokens: int, start: int, size: int, device: torch.device | None = None) -> Pattern:
    """The pattern in which every block reads itself only."""
    first, blocks = start // size, -(-tokens // size)
    return Pattern(tokens, start, size, torch.zeros(heads, blocks - first, blocks, dtype=torch.bool, device=device))


def always_on(grid: Pattern, first: int, recent: int) -> Tensor:
    """(nq, nk) bool: the `first` blocks, a row's own and the `recent` ones before it, as far as they are reachable."""
    numbers = torch.arange(grid.num_key_blocks, device=grid.blocks.device)
    own = numbers[grid.first_block :, None]
    return ((numbers < first) | (numbers >= own - recent)) & grid.reachable()


def causal_pairs(rows: Count, keys: Count) -> Count:
    """(query, key) pairs of dense attention: of the last `rows` of so many keys, each reading those not after it."""
    return rows * (keys - rows) + rows * (rows + 1) // 2


def merged(one: Partial, other: Partial) -> Partial:
    """Attention over the keys of both parts, which share none; `one` is used up.

    For parts with outputs o and log-sum-exps l the softmax over their union is sum exp(l - L) o, L = log sum exp(l).
    """
    lse = torch.logaddexp(one.lse, other.lse)
    mine, theirs = ((part.lse - lse).exp()[..., None].to(one.out.dtype) for part in (one, other))
    return Partial(one.out.mul_(mine).addcmul_(other.out, theirs), lse)
