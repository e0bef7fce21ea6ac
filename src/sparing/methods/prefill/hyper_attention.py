"""HyperAttention: keys of the same hash bucket exactly, the others by a sample (Han et al. 2023, arXiv:2310.05869).

Nothing is chosen that could be shown as a map: attention is estimated, and so are its denominators. For rows Q and
keys K that all come before them:

    bucket(x) = place, in Gray order, of the signs of r random projections of x        neighbours differ in one sign
    sort rows and keys by bucket, cut both into blocks; each row attends to the keys of its block exactly
    S keys are drawn evenly, with replacement; those outside of a row's block join with log(|K| / S) added to logits

so that exp of a row's log-sum-exp has the true denominator as its mean. A prompt is halved again and again: the upper
rows of a half meet the lower keys in this way, what is left is exact.

    r ↔ planes (7), keys of a block ↔ bucket (256), S ↔ samples (256), exact below ↔ min_tokens (4096), draws ↔ seed

Cost: hashing, N r D, and sorting for each of the log2(N / min_tokens) halvings.

It estimates sums over many similar keys well and single keys badly: do not use it for retrieval. Two equal calls give
the same; another length draws other numbers.

Deviations:
1. `keep` sets the sizes: exact parts as large as half of the budget allows, then as many keys per row, half of them of
   the bucket and half drawn, as the rest does. Values that are given are upper limits. Parts of 16 tokens are always
   exact, and a row never reads less than two keys of a half.
2. The published code applies the Gray code where its inverse is meant, counts drawn keys of a row's own block twice in
   all but one of its paths, and attends to pads where lengths don't divide: none of that here. Blocks are of equal size
   up to one key instead.
3. Projections are drawn per KV head, and keys are hashed without their mean, which attention ignores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparing.core.method import register
from sparing.core.pattern import Cost, Partial, Pattern, causal_pairs, merged
from sparing.core.prefill import Attended, Chunks, PromptCall, SparsePrefill
from sparing.core.scorer import Softmax
from sparing.errors import require
from sparing.measures.biased import attend_biased

EXACT = 16  # shorter parts are not halved


@register(
    "hyperattention",
    family="sparse_prefill",
    unit="block",
    moment="prefill",
    paper="2310.05869",
    summary="keys of the same hash bucket exactly, the others by a random sample",
)
@dataclass(frozen=True)
class HyperAttention(SparsePrefill):
    """Buckets and samples. See the module.

    Attributes:
        planes: signs of a hash, 1 to 62.
        bucket, samples, min_tokens: upper limits of the sizes; None: what the budget allows.
        seed: of the random draws.
    """

    planes: int = 7
    bucket: int | None = None
    samples: int | None = None
    min_tokens: int | None = None
    seed: int = 0

    chunks: ClassVar[Chunks] = "none"
    is_masked_softmax: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.planes <= 62, "planes", self.planes, "a number of signs from 1 to 62")
        for name, least in (("bucket", 1), ("samples", 0), ("min_tokens", 1)):
            value = getattr(self, name)
            require(value is None or value >= least, name, value, f"a whole number >= {least}, or None")

    @property
    def reads_all(self) -> bool:
        """See `SparsePrefill.reads_all`."""
        return super().reads_all and self.bucket is self.samples is self.min_tokens is None

    def pattern(self, call: PromptCall) -> Pattern:
        """What is computed; it is no set of blocks."""
        return self._cost(call, self._plan(call))

    def attend(self, call: PromptCall) -> Attended:
        """See `SparsePrefill.attend`."""
        plan = self._plan(call)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + call.layer)
        planes = torch.randn(len(call.keys), call.keys.shape[-1], self.planes, generator=generator)
        estimate = _Estimate(call, plan, planes.to(call.keys.device), generator)
        part = estimate.of_rows(0, call.rows)
        if call.start:
            part = merged(part, estimate.of_keys(slice(0, call.rows), slice(0, call.start)))
        return Attended(part, self._cost(call, plan))

    def _plan(self, call: PromptCall) -> _Plan:
        """The sizes that fit the budget."""
        pairs, leaf = self.pairs(call), call.rows
        while leaf > EXACT and sum(causal_pairs(n, n) for n in _leaves(call.rows, leaf)) > pairs // 2:
            leaf = -(-leaf // 2)
        if self.min_tokens is not None:
            leaf = max(min(leaf, self.min_tokens), EXACT)
        low, high = 2, call.tokens + 1  # what fits, and what does not
        while high - low > 1:
            middle = (low + high) // 2
            plan = _Plan(leaf, middle, self.bucket, self.samples)
            low, high = (middle, high) if plan.pairs(call) <= pairs else (low, middle)
        return _Plan(leaf, low, self.bucket, self.samples)

    def _cost(self, call: PromptCall, plan: _Plan) -> Cost:
        grid = call.grid(self.block)
        computed = torch.full((call.heads,), plan.pairs(call), device=call.query.device)
        return Cost(call.tokens, call.start, self.block, grid.blocks, computed=computed)


@dataclass(frozen=True)
class _Plan:
    """How a call is computed.

    Attributes:
        leaf: parts of at most so many tokens are exact. keys: that a row of a half reads at most.
        bucket, samples: limits of those in its bucket and of those drawn.
    """

    leaf: int
    keys: int
    bucket: int | None
    samples: int | None

    def sizes(self, there: int) -> tuple[int, int]:
        """How many blocks `there` keys are cut into, and how many are drawn."""
        limit = there if self.bucket is None else min(self.bucket, there)
        if self.keys >= there and limit == there:
            return 1, 0
        most = there if self.samples is None else self.samples
        blocks = -(-there // min(max(-(-self.keys // 2), self.keys - most), limit))
        width = -(-there // blocks)
        return blocks, min(min(self.keys, there) - width, most)

    def pairs(self, call: PromptCall) -> int:
        """(query, key) pairs of one head."""
        halves = [*_halves(call.rows, self.leaf), *([(call.rows, call.start)] if call.start else [])]
        total = sum(causal_pairs(n, n) for n in _leaves(call.rows, self.leaf))
        for rows, there in halves:
            blocks, drawn = self.sizes(there)
            number = range(blocks + 1)
            mine, theirs = ([i * n // blocks for i in number] for n in (rows, there))
            total += rows * drawn
            total += sum((mine[i + 1] - mine[i]) * (theirs[i + 1] - theirs[i]) for i in range(blocks))
        return total


class _Estimate:
    """The attention of one call."""

    def __init__(self, call: PromptCall, plan: _Plan, planes: Tensor, generator: torch.Generator) -> None:
        self.call, self.plan, self.planes, self.generator = call, plan, planes, generator

    def of_rows(self, first: int, end: int) -> Partial:
        """Rows over the keys from the first of them on: (Hq, rows, Dv)."""
        call, rows = self.call, end - first
        if rows <= self.plan.leaf:
            keys = slice(call.start + first, call.start + end)
            part = replace(call, query=call.query[:, first:end], keys=call.keys[:, keys], values=call.values[:, keys])
            everything = part.grid(max(EXACT, min(128, rows // EXACT * EXACT)))
            return part.attend(replace(everything, blocks=torch.ones_like(everything.blocks)))
        middle = first + rows // 2
        upper, lower = self.of_rows(first, middle), self.of_rows(middle, end)
        across = self.of_keys(slice(middle, end), slice(call.start + first, call.start + middle))
        lower = merged(lower, across)
        return Partial(torch.cat([upper.out, lower.out], dim=1), torch.cat([upper.lse, lower.lse], dim=1))

    def of_keys(self, rows: slice, keys: slice) -> Partial:
        """Rows over keys that all come before them."""
        call = self.call
        there = keys.stop - keys.start
        blocks, drawn = self.plan.sizes(there)
        places = torch.randint(there, (len(call.keys), drawn), generator=self.generator).to(call.keys.device)
        query = call.query[:, rows].unflatten(0, (len(call.keys), call.group))
        part = estimate(query, call.keys[:, keys], call.values[:, keys], self.planes, places, blocks, call.softmax)
        return Partial(part.out.flatten(0, 1), part.lse.flatten(0, 1))


def estimate(
    query: Tensor, keys: Tensor, values: Tensor, planes: Tensor, places: Tensor, blocks: int, softmax: Softmax
) -> Partial:
    """Attention of (H, G, n, D) rows over (H, m, D) keys by buckets and samples: out (H, G, n, Dv), lse (H, G, n).

    Args:
        planes: (H, D, r). places: (H, S) int64, which keys were drawn, counted in the order of their buckets.
        blocks: of rows and of keys.
    """
    there, drawn = keys.shape[1], places.shape[1]
    order = buckets(keys.float() - keys.float().mean(1, keepdim=True), planes).sort(dim=-1, stable=True).indices
    keys, values = (_taken(x, order) for x in (keys, values))
    mine = buckets(query.float(), planes[:, None]).sort(dim=-1, stable=True).indices
    query = _taken(query, mine)
    rows, is_row = _cut(query.shape[2], blocks, query.device)
    slots, is_key = _cut(there, blocks, query.device)
    low, high = slots[:, :1], slots[:, :1] + is_key.sum(-1, keepdim=True)
    in_own = (places[:, None] >= low) & (places[:, None] < high)
    some = in_own.new_zeros(in_own.shape, dtype=torch.float32).fill_(math.log(there / max(drawn, 1)))
    bias = torch.cat(
        [
            torch.zeros_like(slots, dtype=torch.float32).masked_fill(~is_key, -torch.inf).expand(len(keys), -1, -1),
            some.masked_fill(in_own, -torch.inf),
        ],
        dim=-1,
    )
    sample = [_taken(x, places)[:, None] for x in (keys, values)]
    outs: list[Tensor] = []
    sums: list[Tensor] = []
    for block in torch.arange(blocks, device=query.device).split(max(2**16 // (rows.shape[1] * query.shape[1]), 1)):
        read = (
            torch.cat([x[:, slots[block]], s.expand(-1, len(block), -1, -1)], dim=2)
            for x, s in zip((keys, values), sample, strict=True)
        )
        theirs, outputs = read
        states = query[:, :, rows[block]].transpose(1, 2).flatten(2, 3)
        part = attend_biased(states, theirs, outputs, softmax, bias[:, block])
        for parts, x in ((outs, part.out), (sums, part.lse)):
            parts.append(x.unflatten(2, (query.shape[1], -1)).transpose(1, 2)[:, :, is_row[block]])
    back = mine.argsort(dim=-1)
    return Partial(_taken(torch.cat(outs, dim=2), back), torch.cat(sums, dim=2).gather(-1, back))


def buckets(states: Tensor, planes: Tensor) -> Tensor:
    """(..., n) int64: the place of each state's signs in Gray order."""
    signs = (states @ planes.to(states.dtype) > 0).long()
    code = (signs << torch.arange(signs.shape[-1], device=signs.device)).sum(-1)
    shift = 1
    while shift < signs.shape[-1]:  # the inverse of x ^ (x >> 1)
        code = code ^ (code >> shift)
        shift *= 2
    return code


def _taken(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(-2, order[..., None].expand(*order.shape, x.shape[-1]))


def _cut(total: int, blocks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(blocks, widest) int64 places of a sorted order, cut into equal blocks, and which of them are there."""
    edges = torch.arange(blocks + 1, device=device) * total // blocks
    widths = edges.diff()[:, None]
    inside = torch.arange(int(widths.max()), device=device)
    return (edges[:-1, None] + inside).clamp_max(total - 1), inside < widths


def _leaves(rows: int, leaf: int) -> Iterator[int]:
    """Lengths of the exact parts."""
    if rows <= leaf:
        yield rows
    else:
        yield from _leaves(rows // 2, leaf)
        yield from _leaves(rows - rows // 2, leaf)


def _halves(rows: int, leaf: int) -> Iterator[tuple[int, int]]:
    """(rows, keys) of the estimated parts."""
    if rows > leaf:
        yield rows - rows // 2, rows // 2
        yield from _halves(rows // 2, leaf)
        yield from _halves(rows - rows // 2, leaf)
