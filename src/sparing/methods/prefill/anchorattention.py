"""AnchorAttention: columns whose logit comes close to what a row has found nearby (Zhang et al., arXiv:2505.23520).

Ranks: key column, per query head and group of rows. The first blocks and a local window hold a row's largest logits
nearly always, so they are attended exactly: the anchor. What else is read is measured against it,

    x_i = anchor level of row i,   z_bj = scaling · mean(q over block b) · k_j,   gap_bj = mean(x over block b) − z_bj
    column j is read by a group of `step` blocks if gap_bj ≤ theta for any of its blocks b

so e^-theta is the weight of the lightest column relative to the anchor, and none of it has to be normalised.
first, local ↔ initial and local blocks; step ↔ 16; theta ↔ 12 in the authors' settings; block ↔ 128.

Cost: attention over the anchor, (first + local + 1/2) · block keys a row, and the search, 1 / block of dense q · k.

Deviations:
1. The anchor level is the log-sum-exp of the anchor's logits, which its attention yields anyway, and not their maximum:
   it is larger by 0 to log(keys of the anchor). A theta admits at least what it would admit in the paper from
   theta - log(keys) on, and says exactly how heavy a column is compared to all of the anchor.
2. theta=None, the default, is the largest theta that `keep` allows: gaps are ranked over all rows and heads of a layer,
   and columns are read until the budget is used up. With a theta, `keep` is a ceiling.
3. Blocks of rows are pooled one by one and a group reads the union of their columns; a column that lies inside a group
   counts, and is read, in the blocks behind it only. What we could read leaves both open, as well as the window's
   width: `local` whole blocks before a row's own.
4. The paper goes on from the anchor's online softmax. Here the kernel reads anchor and columns in one pass, and the
   anchor is attended once more before, for its level: gathering the columns' part on its own to merge it took longer.
5. The whole prompt shares one budget and groups share a search, so a prompt must be read at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparing.core.method import register
from sparing.core.pattern import Pattern, always_on
from sparing.core.prefill import Chunks, PromptCall, SparsePrefill
from sparing.errors import require
from sparing.measures.blocks import pooled


@register(
    "anchorattention",
    family="sparse_prefill",
    unit="block",
    moment="prefill",
    paper="2505.23520",
    summary="sinks, a local window and the columns whose logit comes close to theirs",
)
@dataclass(frozen=True)
class AnchorAttention(SparsePrefill):
    """Columns by their distance to the anchor. See the module.

    Attributes:
        first, local: leading blocks, and blocks before a row's own, that make the anchor with it.
        step: blocks of rows that share their columns (16).
        theta: largest gap of a column that is read (12 in the paper; inf: all, -inf: none); None: by `keep` alone.
    """

    first: int = 1
    local: int = 1
    step: int = 16
    theta: float | None = None

    chunks: ClassVar[Chunks] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.first >= 0, "first", self.first, "a number of blocks >= 0")
        require(self.local >= 0, "local", self.local, "a number of blocks >= 0")
        require(self.step >= 1, "step", self.step, "a number of blocks >= 1")
        is_number = self.theta is None or not math.isnan(self.theta)
        require(is_number, "theta", self.theta, "a difference of logits, or None")

    @property
    def reads_all(self) -> bool:
        """See `SparsePrefill.reads_all`."""
        return super().reads_all and self.theta is None

    def pattern(self, call: PromptCall) -> Pattern:
        """See `SparsePrefill.pattern`."""
        anchor = self._anchor(call)
        return self._with_columns(call, anchor, call.attend(anchor).lse)

    def _anchor(self, call: PromptCall) -> Pattern:
        grid = call.grid(self.block)
        blocks = always_on(grid, self.first, self.local).expand_as(grid.blocks)
        return Pattern(call.tokens, call.start, self.block, blocks, blocks_per_group=self.step)

    def _with_columns(self, call: PromptCall, anchor: Pattern, lse: Tensor) -> Pattern:
        """The anchor and the columns of the smallest gaps that fit into the budget."""
        gaps = self._gaps(call, anchor, lse)
        costs = self._costs(anchor).repeat_interleave(self.block, dim=-1)[:, : call.tokens].expand_as(gaps).flatten()
        left = max(self.pairs(call) * call.heads - int(anchor.pairs().sum()), 0)
        ordered, order = gaps.flatten().sort(stable=True)
        takes = (costs[order].cumsum(0) <= left) & (costs[order] > 0)
        if self.theta is not None:
            takes &= ordered <= self.theta
        columns = torch.zeros_like(gaps, dtype=torch.bool).flatten().index_fill_(0, order[takes], True)
        return replace(anchor, columns=columns.view_as(gaps))

    def _gaps(self, call: PromptCall, anchor: Pattern, lse: Tensor) -> Tensor:
        """(Hq, G, N) float32: the smallest gap of a key over the blocks of a group; inf where none may take it."""
        queries = pooled(call.query, self.block, call.start)
        levels = pooled(lse[..., None], self.block, call.start)
        keys = call.keys.float().transpose(-1, -2)
        free = anchor.reachable() & ~anchor.blocks[0]
        groups = anchor.group_of_block().unique_consecutive(return_counts=True)[1].tolist()
        gaps = levels.new_full((call.heads, len(groups), call.tokens), torch.inf)
        begin = 0
        for group, count in enumerate(groups):
            end = min((anchor.first_block + begin + count) * self.block, call.tokens)
            some = slice(begin, begin + count)
            logits = queries[:, some].reshape(len(keys), -1, keys.shape[1]) @ keys[..., :end] * call.softmax.scaling
            found = levels[:, some] - call.softmax.capped(logits).view(call.heads, count, end)
            may = free[some].repeat_interleave(self.block, dim=-1)[:, :end]
            gaps[:, group, :end] = found.masked_fill_(~may, torch.inf).amin(1)
            begin += count
        return gaps

    def _costs(self, anchor: Pattern) -> Tensor:
        """(G, nk) int64: the rows of a group that would read a column of a key block, and do not read it anyway."""
        rows = anchor.areas()[:, 0] // self.block  # wrong for block 0 itself, which is not free
        free = anchor.reachable() & ~anchor.blocks[0]
        groups = anchor.group_of_block()
        return rows.new_zeros(int(groups[-1]) + 1, free.shape[1]).index_add_(0, groups, free * rows[:, None])
