"""Neighborhood attention, generalised (Hassani et al. 2025, arXiv:2504.16922): windows with stride and dilation.

Nothing is ranked: a row reads what lies near it. `stride` rows that follow each other share the window of one of them,
their leader, and `dilation` d makes d interleaved grids that do not see each other (x // d counts in each of them):

    a prompt:   j <= i  and  leader(i) − j < w           leader(i): the last of the rows that share, w ↔ window
    a grid:     first <= j < first + w on every axis     first = leader(i) − w/2, moved inside, leader: the middle one

Stride 1 is a sliding window, stride w attention in blocks. Reads are exact to the token, by a mask inside of blocks,
and without one where windows begin at blocks, as those of a prompt do by default (stride ↔ block).

Cost: nothing that grows with the prompt but the map of blocks, and a number per token.

Deviations:
1. `keep` sets the window, as large as it allows; so under a ratio that of a prompt grows with the position, while a
   number of keys is the window itself. `window` limits it. By default windows of a prompt are whole blocks, and heads
   take their next block one after another, so that all of the budget is used.
2. In a prompt the earlier of the rows that share a window read fewer keys, by definition; the budget counts what is
   read. A row always reads its own group up to itself.
3. On a grid the window is the same share of every axis, up to rounding. Dilation d reads at most 1/d of an axis.
4. Dilated grids are computed in blocks with a mask, not one after the other: density counts what is read, blocks more.
"""

from __future__ import annotations

import itertools
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
from sparing.errors import InvalidInputError, require

Sizes = int | tuple[int, ...] | None


@register(
    "neighborhood",
    family="sparse_prefill",
    unit="block",
    moment="prefill",
    paper="2504.16922",
    summary="a window around every token, with stride and dilation; also for grids",
)
@dataclass(frozen=True)
class Neighborhood(GridSparse):
    """Windows with stride and dilation. See the module.

    Attributes:
        window: keys on each axis, at most; None: what the budget allows. One number for all axes of a grid, or one
            for each; so with the others.
        stride: rows that share a window; None: those of a block.
        dilation: every so manieth token is a neighbour.
    """

    window: int | tuple[int, ...] | None = None
    stride: int | tuple[int, ...] | None = None
    dilation: int | tuple[int, ...] = 1

    chunks: ClassVar[Chunks] = "any"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("window", "stride", "dilation"):
            value = getattr(self, name)
            sizes = () if value is None else value if isinstance(value, tuple) else (value,)
            is_size = all(type(size) is int and size >= 1 for size in sizes)
            require(is_size and (value is None or len(sizes) > 0), name, value, "whole numbers >= 1")

    @property
    def reads_all(self) -> bool:
        """See `SparsePrefill.reads_all`."""
        return super().reads_all and self.window is None and self.dilation == 1

    # -- prompts ------------------------------------------------------------------------------------------------

    def pattern(self, call: PromptCall) -> Pattern:
        """See `SparsePrefill.pattern`."""
        (window,), (stride,), (dilation,) = (
            _axes(name, value, 1)
            for name, value in (("window", self.window), ("stride", self.stride), ("dilation", self.dilation))
        )
        stride = self.block if stride is None else stride
        assert dilation is not None
        _check(window, stride)
        first_block, device = call.start // self.block, call.query.device
        if stride == self.block and dilation == 1 and (window is None or window % self.block == 0):
            blocks = self._whole_blocks(call, window)[:, first_block:]
            return Pattern(call.tokens, call.start, self.block, blocks)
        numbers = torch.arange(-(-call.tokens // self.block), device=device)
        first = self._first_keys(len(numbers) * self.block, window, stride, dilation).to(device)
        of_blocks = first.view(-1, self.block)
        blocks = (numbers + 1) * self.block > of_blocks.amin(1)[:, None] * dilation
        blocks = blocks[first_block:].expand(call.heads, -1, -1)
        is_aligned = dilation == 1 and bool((of_blocks == of_blocks[:, :1] // self.block * self.block).all())

        def near(rows: Tensor, keys: Tensor) -> Tensor:
            return (keys // dilation >= first[rows]) & ((rows - keys) % dilation == 0)

        return Pattern(call.tokens, call.start, self.block, blocks, rule=None if is_aligned else near)

    def _whole_blocks(self, call: PromptCall, window: int | None) -> Tensor:
        """(Hq, nk, nk) bool: windows that begin at a block."""
        numbers = torch.arange(-(-call.tokens // self.block), device=call.query.device)
        values = numbers.double().expand(len(numbers), -1)
        if window is not None:
            values = values.masked_fill(numbers[:, None] - numbers >= window // self.block, -torch.inf)
        until = self.pairs_until((numbers + 1) * self.block)
        own = numbers == numbers[:, None]
        return best_by_position(values.expand(call.heads, -1, -1), own, until, self.block)

    def _first_keys(self, rows: int, window: int | None, stride: int, dilation: int) -> Tensor:
        """(at least rows,) int64: the first key that each row reads, counted in its own interleaved grid."""
        groups = -(-rows // (stride * dilation))
        ends = self.pairs_until(torch.arange(groups * stride * dilation + 1))
        budget = ends.diff().view(groups, stride, dilation).sum(1).cumsum(0)
        number = torch.arange(1, groups + 1)[:, None]
        own = number * (stride * (stride + 1) / 2)
        # Every key more is read by all rows of a group; what one cannot use goes to the next.
        taken = ((budget - own) / stride).floor().clamp_min(0).cummax(0).values
        reach = taken.diff(dim=0, prepend=taken.new_zeros(1, dilation)).long() + stride
        reach = reach if window is None else reach.clamp_max(window)
        first = (number * stride - reach).clamp_min(0)
        return first[:, None].expand(-1, stride, -1).flatten()[:rows]

    # -- grids --------------------------------------------------------------------------------------------------

    def lay_out(self, grid: Grid) -> Layout:
        """See `GridSparse.lay_out`."""
        tile = grid.tile(None, self.block)
        masks = self._masks(grid, tile)
        some, whole = (_by_tile(masks, tile, kind) for kind in (torch.any, torch.all))
        order, size = grid.order(tile), math.prod(tile)
        blocks = grid.with_text(some, size)[None]
        if torch.equal(some, whole):
            return Layout(order, Pattern(grid.tokens, 0, size, blocks, is_causal=False))
        cells = torch.stack(torch.unravel_index(order.clamp_max(grid.cells - 1), grid.shape))
        last, tables = grid.tokens - 1, [(x, mask) for x, mask in zip(cells, masks, strict=True)]

        def near(rows: Tensor, keys: Tensor) -> Tensor:
            rows, keys = rows.clamp_max(last), keys.clamp_max(last)
            read = torch.ones_like(rows - keys, dtype=torch.bool)
            for at, mask in tables:
                at, mask = at.to(rows.device), mask.to(rows.device)
                read = read & mask[at[rows], at[keys]]
            return read | (rows >= grid.cells) | (keys >= grid.cells)

        return Layout(order, Pattern(grid.tokens, 0, size, blocks, rule=near, is_causal=False))

    def _masks(self, grid: Grid, tile: tuple[int, ...]) -> list[Tensor]:
        """Per axis (n, n) bool: who reads whom; a token reads one that it reads on every axis."""
        axes = len(grid.shape)
        strides = [s or t for s, t in zip(_axes("stride", self.stride, axes), tile, strict=True)]
        dilations = [d or 1 for d in _axes("dilation", self.dilation, axes)]
        lengths = [n // d for n, d in zip(grid.shape, dilations, strict=True)]
        limits = _axes("window", self.window, axes)
        for length, stride, limit, dilation in zip(lengths, strides, limits, dilations, strict=True):
            require(length >= 1, "dilation", dilation, f"at most an axis of the grid {grid.shape}")
            _check(limit, min(stride, length))
        strides = [min(s, n) for s, n in zip(strides, lengths, strict=True)]
        text = grid.text * (grid.tokens + grid.cells)
        keys = (self.grid_pairs(grid) - text) // grid.cells
        windows = [
            w if limit is None else min(w, limit) for w, limit in zip(_box(keys, strides, lengths), limits, strict=True)
        ]
        return [near_on_axis(n, w, s, d) for n, w, s, d in zip(grid.shape, windows, strides, dilations, strict=True)]


def near_on_axis(length: int, window: int, stride: int, dilation: int) -> Tensor:
    """(n, n) bool: what each of n tokens reads on an axis that is seen in both directions; `window` keys each."""
    numbers = torch.arange(length)
    mine, at = numbers % dilation, numbers // dilation
    count = (length - mine + dilation - 1) // dilation
    leader = (at // stride * stride + stride // 2).minimum(count - 1)
    first = (leader - window // 2).clamp_min(0).minimum(count - window)[:, None]
    return (mine == mine[:, None]) & (at >= first) & (at < first + window)


def _box(volume: int, low: list[int], high: list[int]) -> list[int]:
    """Whole numbers between the bounds that multiply to at most `volume`, about the same share of each upper bound."""
    share = (max(volume, 1) / math.prod(high)) ** (1 / len(high))
    near = [sorted({min(max(int(n * share) + more, s), n) for more in (0, 1)}) for n, s in zip(high, low, strict=True)]
    boxes = []
    for sides in itertools.product(*near[:-1]):
        last = min(max(volume // math.prod(sides), low[-1]), high[-1])
        boxes.append([*sides, last])
    fitting = [box for box in boxes if math.prod(box) <= volume]
    return max(fitting, key=math.prod) if fitting else list(low)


def _by_tile(masks: list[Tensor], tile: tuple[int, ...], kind: object) -> Tensor:
    """(tiles, tiles) bool: any or all of what two tiles read of each other, over all axes."""
    assert callable(kind)
    result = torch.ones(1, 1, dtype=torch.bool)
    for mask, side in zip(masks, tile, strict=True):
        parts = mask.unflatten(1, (-1, side)).unflatten(0, (-1, side)).transpose(1, 2).flatten(2)
        result = (result[:, None, :, None] & kind(parts, -1)[None, :, None]).flatten(2).flatten(0, 1)
    return result


def _axes(name: str, value: Sizes, axes: int) -> tuple[int | None, ...]:
    """One number for each axis."""
    if not isinstance(value, tuple):
        return (value,) * axes
    if len(value) != axes:
        raise InvalidInputError(name, value, f"one number, or one for each of the {axes} axes")
    return value


def _check(window: int | None, stride: int) -> None:
    require(window is None or window >= stride, "window", window, f"at least the stride, {stride}")
