"""S2-Attention: heads that read different shards of what lies far back (Lin et al. 2024, arXiv:2407.17678).

Nothing is ranked: what is read depends on the head and the position only. KV head h of H reads, of the blocks b before
a row's own,

    the local ones, and those with (b + h · step) mod stride = 0,     step = max(1, stride / H)

stride ↔ stride, local ↔ local blocks, a row's own counted. With H >= stride the heads together read everything; and a
far block that a head does not read is one that it never reads, whatever comes later.

Cost: nothing that grows with the prompt but the map of blocks.

Deviations:
1. The first block is always read: with a stride of 8, only one head in eight would see the sink once it is far.
2. `keep` says how much is read: the shards first, the newest of them first, then local blocks as far as it reaches. So
   under a ratio the local window grows with the position. `local` limits it (16 in the paper), `stride` sets the shards
   (8 in the paper); by default half of a ratio goes to them, stride = 2 / keep, which at a quarter is 8.
3. The paper trains models with this pattern, and leaves some heads or layers dense; here it is put on any model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparing.core.allocate_blocks import best_by_position
from sparing.core.method import register
from sparing.core.pattern import Pattern
from sparing.core.prefill import Chunks, PromptCall, SparsePrefill
from sparing.errors import require


@register(
    "s2attention",
    family="sparse_prefill",
    unit="block",
    moment="prefill",
    paper="2407.17678",
    summary="local blocks and, in every head, another shard of the rest",
)
@dataclass(frozen=True)
class S2Attention(SparsePrefill):
    """Static shards per KV head. See the module.

    Attributes:
        stride: every so manieth far block is read (8); None: half of the budget.
        local: blocks up to a row's own (16); None: what the shards leave of the budget.
    """

    block: int = 64
    stride: int | None = None
    local: int | None = None

    chunks: ClassVar[Chunks] = "any"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("stride", "local"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "a number of blocks >= 1, or None")

    @property
    def reads_all(self) -> bool:
        """See `SparsePrefill.reads_all`."""
        return super().reads_all and self.local is None

    def pattern(self, call: PromptCall) -> Pattern:
        """See `SparsePrefill.pattern`."""
        kv_heads, device = call.keys.shape[0], call.query.device
        numbers = torch.arange(-(-call.tokens // self.block), device=device)
        shards = self.shards(numbers, kv_heads)[:, None]
        is_near = numbers > numbers[:, None] - (len(numbers) if self.local is None else self.local)
        values = (numbers + len(numbers) * shards).double().masked_fill(~(shards | is_near), -torch.inf)
        forced = (numbers == 0) | (numbers == numbers[:, None])
        ends = (numbers + 1) * self.block
        blocks = best_by_position(values, forced, self.pairs_until(ends), self.block)
        blocks = blocks[:, call.start // self.block :].repeat_interleave(call.group, dim=0)
        return Pattern(call.tokens, call.start, self.block, blocks)

    def shards(self, numbers: Tensor, kv_heads: int) -> Tensor:
        """(H, blocks) bool: the blocks of these numbers that each KV head reads however far they are."""
        stride = self.stride
        if stride is None:
            stride = math.ceil(2 / self.budget.amount - 1e-9) if self.budget.kind == "ratio" else 8
        step = max(1, stride // kv_heads)
        return (numbers + torch.arange(kv_heads, device=numbers.device)[:, None] * step) % stride == 0
