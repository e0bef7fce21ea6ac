"""ProxyAttn: one proxy head ranks the blocks of many heads, each of which says how many it needs (arXiv:2509.24745).

Ranks: block, per group of heads. The proxies of group g are the plain means of its heads' queries and keys; of both the
first token of every s is taken. The best score that any pair of a block gets is the block's:

    P_g = causal softmax(Q_g K_gᵀ / sqrt(D)),   score of block (i, j) = max of P_g over its pairs, for all heads of g

How many of them a head reads is its own: with m[1] >= m[2] >= … the masses of the blocks under the last block of query
rows of head h, b_h = the smallest share of blocks that holds γ of them, and each row i reads b_h times the blocks that
it may see:   ⌈b_h · (i + 1)⌉, first and own block included, and `least` tokens or more.
groups ↔ the number of proxies (1 for Llama-3.1, 4 for Qwen2.5-1M),   stride ↔ s = 4,   threshold ↔ γ,   least ↔ 2048

Cost: (N / s)² D multiplications per proxy, and one block of rows of attention per head.

Deviations:
1. `threshold` is None by default: the largest γ that fits `keep`, the same for all heads and rows of a layer, `least`
   coming first. The paper sets 0.95 or 0.9, and lets the density follow.
2. Groups are unions of KV groups of equal size, up to one, so any number of KV heads has any number of groups.
3. The first block and a row's own are always read.
4. The share is of what the row may see; the paper does not say whether it is that or the whole prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.core.allocate_blocks import BlockBudget, TopMass, as_mass, best_within
from sparing.core.method import register
from sparing.core.pattern import Pattern
from sparing.core.prefill import BlockParts, BlockScorer, Chunks, PromptCall, SparsePrefill, choose_blocks
from sparing.errors import require
from sparing.measures.blocks import block_sums, last_mean

# Proxy attention that is held at a time.
ELEMENTS = 2**20


@dataclass(frozen=True)
class Proxies(BlockScorer):
    """The largest attention between mean heads in each block.

    Attributes:
        groups: how many proxies; no more than KV heads are used. stride: tokens of which the first is looked at.
    """

    groups: int = 1
    stride: int = 4
    is_mass: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.groups >= 1, "groups", self.groups, "a number of proxies >= 1")
        require(self.stride >= 1, "stride", self.stride, "a number of tokens >= 1")

    def score(self, call: PromptCall, size: int) -> Tensor:
        """See `BlockScorer.score`."""
        require(size % self.stride == 0, "stride", self.stride, f"a divisor of the block, {size}")
        kv_heads, first, inside = call.keys.shape[0], call.start // size, size // self.stride
        count = min(self.groups, kv_heads)
        member = torch.arange(kv_heads, device=call.keys.device) * count // kv_heads
        positions = _firsts(call.start, call.tokens, self.stride).to(call.keys.device)
        of_heads = member.repeat_interleave(call.group)
        queries = _means(call.query[:, positions - call.start], of_heads, count)
        keys = _means(call.keys[:, :: self.stride], member, count)
        scores = torch.zeros(count, -(-call.tokens // size) - first, -(-call.tokens // size), device=keys.device)
        for rows in torch.arange(len(positions)).split(max(ELEMENTS // (count * keys.shape[1]), 1)):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            attention = _attention(call, queries[:, part], keys, positions[part], self.stride)
            best = F.pad(attention, (0, -attention.shape[-1] % inside)).unflatten(-1, (-1, inside)).amax(-1)
            block = (positions[part] // size - first)[:, None].expand_as(best)
            scores[..., : best.shape[-1]].scatter_reduce_(1, block, best, "amax")
        return scores[of_heads]


@dataclass(frozen=True, eq=False)
class ShareOfHead:
    """Every head reads its own share of each row: the least that holds a part of the mass that was seen at its end.

    Attributes:
        held: (Hq, n) of a row of n blocks: the mass of the best 0, 1, … n - 1 of them.
        mass: the part to hold; None: as much as the budget allows. least: blocks of a row that come before all others.
    """

    held: Tensor
    mass: float | None
    least: int

    def allocate(self, scores: Tensor, budget: BlockBudget, *, is_mass: bool) -> Tensor:
        """See `BlockAllocator.allocate`."""
        shares = as_mass(scores, budget.reachable, is_mass).masked_fill(~budget.reachable, -1.0)
        order = (shares + 2.0 * budget.forced).sort(dim=-1, descending=True, stable=True).indices
        rank = torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1]).to(order).expand_as(order))
        # Number r of a row of n blocks is read once the share is more than r / n.
        blocks = budget.reachable.sum(-1)[:, None]
        at = (rank * self.held.shape[-1] // blocks).clamp_max(self.held.shape[-1] - 1)
        held = self.held.gather(-1, at.flatten(1)).view_as(scores)
        is_least = rank < self.least
        most = torch.inf if self.mass is None or self.mass == 1 else self.mass  # what rounds to 1 is not all of it
        wanted = budget.free & ((held < most) | is_least)
        return budget.forced | best_within(is_least.to(held) - held, budget, wanted)


@register(
    "proxyattn",
    family="sparse_prefill",
    unit="block",
    moment="prefill",
    paper="2509.24745",
    summary="blocks with the largest attention of a mean head, as many per head as its last rows need",
)
@dataclass(frozen=True)
class ProxyAttn(SparsePrefill):
    """Scores by proxies, budgets by heads. See the module.

    Attributes:
        groups: how many proxies (1). stride: tokens of which the proxies see the first (4).
        threshold: mass of its last block of rows that a head's share of the blocks holds (the paper: 0.95), in (0, 1];
            `keep` stays the most. None: the largest that fits `keep`.
        least: tokens that each row reads before any head reads more (2048).
    """

    groups: int = 1
    stride: int = 4
    threshold: float | None = None
    least: int = 2048
    chunks: ClassVar[Chunks] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.stride >= 1 and self.block % self.stride == 0
        require(fits, "stride", self.stride, f"a divisor of the block, {self.block}")
        require(self.least >= 0, "least", self.least, "a number of tokens >= 0")
        self.block_parts()  # refuses what is no number or share

    def block_parts(self) -> BlockParts:
        """See `SparsePrefill.block_parts`; with this allocator rows have budgets of their own, too."""
        return BlockParts(Proxies(self.groups, self.stride), TopMass(self.threshold))

    def pattern(self, call: PromptCall) -> Pattern:
        """See `SparsePrefill.pattern`."""
        last = (call.tokens - 1) // self.block * self.block
        masses = block_sums(last_mean(call, call.tokens - last), self.block)
        ordered = masses.sort(dim=-1, descending=True).values
        by_head = ShareOfHead(ordered.cumsum(-1) - ordered, self.threshold, -(-self.least // self.block))
        return choose_blocks(replace(self.block_parts(), allocator=by_head), call, self)

    @property
    def reads_all(self) -> bool:
        """See `SparsePrefill.reads_all`."""
        return self.budget.keeps_all and self.threshold in (None, 1.0)


def _firsts(start: int, end: int, stride: int) -> Tensor:
    """Of the positions from `start` on, the first that is there of every `stride`."""
    positions = torch.arange(start, end)
    return positions[(positions % stride == 0) | (positions == start)]


def _means(states: Tensor, member: Tensor, count: int) -> Tensor:
    """(count, T, D) float32: the mean of (heads, T, D) over the heads of each group."""
    sums = states.new_zeros(count, *states.shape[1:], dtype=torch.float32).index_add_(0, member, states.float())
    return sums / member.bincount(minlength=count)[:, None, None]


def _attention(call: PromptCall, queries: Tensor, keys: Tensor, positions: Tensor, stride: int) -> Tensor:
    """(groups, rows, keys up to the last of them) of some rows; keys after a row are 0, less than any that it sees."""
    seen = int(positions[-1]) // stride + 1
    logits = call.softmax.capped(queries @ keys[:, :seen].transpose(-1, -2) * call.softmax.scaling)
    later = torch.arange(seen, device=keys.device) * stride > positions[:, None]
    return logits.masked_fill_(later, -torch.inf).softmax(-1)
