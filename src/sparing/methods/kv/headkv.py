"""HeadKV: each head's budget in proportion to how much it retrieves (Fu et al. 2024, arXiv:2410.19258).

Ranks: KV head, by a measurement I made beforehand (`sparing calibrate --method headkv`: retrieval heads), and in every
head kv_token by SnapKV's votes of a short window.

    p_h = I_h / Σ I
    C_h = W + (1 - 1/β) · C + p_h · (C / β) · heads,   C = tokens per head - W
    window ↔ W = 8, kernel_size ↔ 7 (max pooling), beta ↔ β = 1.01 as in the authors' code: 1 % even, 99 % by importance

Cost: as SnapKV's; the measurement once per model.

Deviations:
1. The window is part of the budget; the authors add it on top.
2. Capacities are real numbers until the end and rounded once, so that they sum to the budget. The authors floor-divide
   by β, and what a head cannot use for want of tokens is lost there; here it goes to the others in proportion.
3. Grouped-query attention: a KV head's importance is the mean over its query heads, as in the authors' code. Selection
   is per KV head.
4. I is the retrieval score of `sparing score --scorer retrieval`, on synthetic needles. The paper's retrieval-reasoning
   variant, or any other measurement of heads, can be given instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from sparing.core.allocate_heads import WeightedHeads
from sparing.core.measured import MeasuredMethod
from sparing.core.method import Parts, register
from sparing.errors import require
from sparing.methods.kv.snapkv import WindowAttention


@register("headkv", paper="2410.19258", summary="SnapKV's votes, with budgets in proportion to what a head retrieves",
          training_free=False, needs=("retrieval",))  # fmt: skip
@dataclass(frozen=True)
class HeadKV(MeasuredMethod):
    """Budgets in proportion to measured importance.

    Attributes:
        scores: of heads, as `sparing.score(model, "retrieval", tokenizer)` measures them.
        window: rows that vote, always kept themselves (8). kernel_size: odd width of the max over neighbours (7).
        beta: 1 / beta of the budget goes by importance, the rest is even; >= 1 (1.01).
    """

    window: int = 8
    kernel_size: int = 7
    beta: float = 1.01

    def __post_init__(self) -> None:
        require(1 <= self.beta < float("inf"), "beta", self.beta, "a number >= 1")
        super().__post_init__()

    @cached_property
    def _parts(self) -> Parts:
        allocator = WeightedHeads(self.per_kv_head("retrieval", "mean"), self.window, 1 - 1 / self.beta)
        return Parts(WindowAttention(self.window, self.kernel_size, "max"), allocator)

    def parts(self) -> Parts:
        """See `Method.parts`."""
        return self._parts
