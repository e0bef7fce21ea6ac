"""XAttention: antidiagonals of tiles tell which blocks matter (Xu et al. 2025, arXiv:2503.16428).

Ranks: block. Keys and query rows are cut into tiles of S tokens. Every vertical and every diagonal line crosses the
antidiagonal of each tile that it passes, so the tile's mean logit there shows it:

    e[r, c] = 1 / S Σ_t q[rS + S-1-t] · k[cS + t] / sqrt(D),   A = softmax of e over the tiles c <= r
    score of block (i, j) = Σ of A over the tiles in it

Each row of blocks reads its best blocks until they hold a share of its score, that of block 0 and of its own block
counted first: both are always read.   stride ↔ S = 16 (the paper also has 8 and 4),   threshold ↔ the share

Cost: N² D / (2 S) multiplications per head, 1 / (2 S) of attention's two products; tiles are made a few rows at a time.

Deviations:
1. `threshold` is None by default: the largest share that fits `keep`, the same for all rows and heads of a layer. The
   paper sets one (0.9; 0.8 to 0.95) or one per head by profiling, and lets the density follow.
2. A tile's score is the mean over the pairs that exist and that attention may see. For tiles of the diagonal these are
   one half of the antidiagonal (the authors count the other half, where keys are after their row), and for a tile that
   the text's beginning or end cuts, the antidiagonal of what is there.
3. Query heads of a group have masks of their own, as in the paper; keys are not copied for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.core.allocate_blocks import TopMass
from sparing.core.method import register
from sparing.core.prefill import BlockParts, BlockScorer, Chunks, PromptCall, SparsePrefill
from sparing.errors import require

# Tile scores that are held at a time.
ELEMENTS = 2**20


@dataclass(frozen=True)
class Antidiagonals(BlockScorer):
    """Attention between tiles, from their antidiagonals.

    Attributes:
        stride: tokens of a tile; it divides the block.
    """

    stride: int = 16
    is_mass: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.stride >= 1, "stride", self.stride, "a number of tokens >= 1")

    def score(self, call: PromptCall, size: int) -> Tensor:
        """See `BlockScorer.score`."""
        require(size % self.stride == 0, "stride", self.stride, f"a divisor of the block, {size}")
        tiles = _Tiles(call, self.stride)
        inside, blocks = size // self.stride, -(-call.tokens // size)
        scores = torch.zeros(call.heads, blocks - call.start // size, blocks, device=call.query.device)
        # Whole rows of blocks at a time; those of tiles may begin inside of one.
        many = max(ELEMENTS // (call.heads * tiles.first_free * inside), 1)
        for first in range(0, scores.shape[1], many):
            low = (call.start // size + first) * inside
            attention = tiles.attention(low, low + many * inside)
            columns = F.pad(attention, (0, -attention.shape[-1] % inside)).unflatten(-1, (-1, inside)).sum(-1)
            rows = torch.arange(max(low, tiles.first), max(low, tiles.first) + attention.shape[1])
            at = (rows // inside - call.start // size).to(scores.device)
            scores[..., : columns.shape[-1]].index_add_(1, at, columns)
        return scores


class _Tiles:
    """The tiles of a call.

    Attributes:
        first, first_free: numbers of the first tile that holds query rows, and behind the last.
    """

    def __init__(self, call: PromptCall, stride: int) -> None:
        self.call, self.stride = call, stride
        self.first, self.first_free = call.start // stride, -(-call.tokens // stride)
        front, back = call.start - self.first * stride, self.first_free * stride - call.tokens
        query = F.pad(call.query.float(), (0, 0, front, back))
        # Rows turned round in each tile, so that the antidiagonal is one long product.
        self.rows = query.unflatten(1, (-1, stride)).flip(2).flatten(2)
        self.keys = F.pad(call.keys.float(), (0, 0, 0, back)).unflatten(1, (-1, stride)).flatten(2)
        numbers = torch.arange(self.first, self.first_free, device=query.device) * stride
        self.begin = (call.start - numbers).clamp_min(0)  # the rows of a tile that are there: [begin, end)
        self.end = (call.tokens - numbers).clamp_max(stride)

    def attention(self, low: int, high: int) -> Tensor:
        """(Hq, rows, tiles) of the rows of tiles [low, high), as far as there are any: a softmax over tiles."""
        low, high = max(low, self.first), min(high, self.first_free)
        part = slice(low - self.first, high - self.first)
        grouped = self.rows[:, part].unflatten(0, (self.keys.shape[0], -1)).flatten(1, 2)
        logits = (grouped @ self.keys[:, :high].transpose(-1, -2)).view(self.call.heads, high - low, high)
        logits = logits / (self.end - self.begin)[part, None]
        rows, tiles = torch.arange(low, high, device=logits.device), torch.arange(high, device=logits.device)
        logits[:, rows - low, rows] = self._own(part)
        logits = self.call.softmax.capped(logits * self.call.softmax.scaling)
        return logits.masked_fill_(tiles > rows[:, None], -torch.inf).softmax(-1)

    def _own(self, part: slice) -> Tensor:
        """(Hq, rows): products of tiles with themselves: pairs (end-1-t, t) of a row and a key not after it."""
        begin, end = self.begin[part, None], self.end[part, None]
        keys = torch.arange(-(-self.stride // 2), device=begin.device)
        rows = end - 1 - keys
        there = (rows >= keys) & (rows >= begin)
        at = (self.stride - 1 - rows).clamp(0, self.stride - 1)[..., None]  # rows are turned round
        count, shape = end.shape[0], (self.stride, -1)
        of_rows = self.rows[:, part].unflatten(-1, shape).gather(
            2, at.expand(self.call.heads, -1, -1, self.call.query.shape[-1])
        )  # fmt: skip
        of_keys = self.keys[:, self.first + part.start : self.first + part.start + count].unflatten(-1, shape)
        of_keys = of_keys[:, :, : len(keys)].repeat_interleave(self.call.group, dim=0)
        products = (of_rows * of_keys).sum(-1).masked_fill(~there, 0.0)
        return products.sum(-1) / there.sum(-1)


@register(
    "xattention",
    family="sparse_prefill",
    unit="block",
    moment="prefill",
    paper="2503.16428",
    summary="blocks that hold most of the attention between tiles, seen on their antidiagonals",
)
@dataclass(frozen=True)
class XAttention(SparsePrefill):
    """Antidiagonal scores. See the module.

    Attributes:
        stride: tokens of a tile (16); it divides the block.
        threshold: the share of its score that a row of blocks reads (the paper: 0.9), in (0, 1]; `keep` stays the
            most. None: the largest share that fits `keep`.
    """

    stride: int = 16
    threshold: float | None = None
    chunks: ClassVar[Chunks] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.stride >= 1 and self.block % self.stride == 0
        require(fits, "stride", self.stride, f"a divisor of the block, {self.block}")
        TopMass(self.threshold)  # refuses what is no share

    def block_parts(self) -> BlockParts:
        """See `SparsePrefill.block_parts`."""
        return BlockParts(Antidiagonals(self.stride), TopMass(self.threshold))

    @property
    def reads_all(self) -> bool:
        """See `SparsePrefill.reads_all`."""
        return self.budget.keeps_all and self.threshold in (None, 1.0)
