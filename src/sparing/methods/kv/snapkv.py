"""SnapKV: what the last rows of the prompt look at (Li et al. 2024, arXiv:2404.14469).

Ranks: kv_token. The last W queries of the prompt vote for the keys before them; votes are smoothed over
neighbours, so that a phrase stays whole; the window itself is always kept.

    s[h, j] = pool_k( mean over the last W rows i of A[h, i, j] ),  mean over the group
    window ↔ W = 32, kernel_size ↔ k = 5 (average) as in the authors' code

Cost: O(W n d) per head at the end of the prompt.

Deviations:
1. Selection is per KV head (mean over its query heads); the authors select per query head, which makes the cache
   G times larger.
2. Pooling averages over the tokens that exist: zero padding would scale the first token, the sink, by 0.6.
3. A prompt shorter than the budget keeps everything by definition of the budget; there is no separate switch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from sparing.core.allocate import Uniform
from sparing.core.method import Method, Parts, register
from sparing.core.scorer import KeyValues, Queries, Scorer
from sparing.errors import require
from sparing.measures.attention import attention_mass, window_rows
from sparing.measures.pooling import check_window, over_group, pool_tokens


@dataclass(frozen=True)
class WindowAttention(Scorer):
    """s[h, j] = pooled mean attention that the last `window` rows of the prompt pay to key j.

    Attributes:
        window: rows that vote, always kept themselves.
        kernel_size: odd width of the smoothing over neighbours, 1 for none.
        pool: "avg" or "max".
    """

    window: int = 32
    kernel_size: int = 5
    pool: Literal["avg", "max"] = "avg"
    state_outlives_eviction: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_window(self.window, self.kernel_size)
        require(self.pool in ("avg", "max"), "pool", self.pool, '"avg" or "max"')

    def observe(self, state: Any, queries: Queries, stored: KeyValues) -> Queries:
        """See `Scorer.observe`; the state is the last `window` query rows."""
        return window_rows(state, queries, self.window)

    def score(self, state: Any, stored: KeyValues) -> Tensor:
        """See `Scorer.score`."""
        mass = over_group(attention_mass(state, stored), stored.keys.shape[1])
        # The window's own columns take part in the softmax but not in the vote of their neighbours.
        before = stored.valid & (stored.positions < state.positions[0])
        pooled = pool_tokens(mass, before, self.kernel_size, self.pool)
        return mass.where(~before, pooled)

    def protects(self, tokens_per_head: int) -> tuple[int, int]:
        """See `Scorer.protects`."""
        return (0, self.window)


@register("snapkv", paper="2404.14469", summary="the tokens that the last rows of the prompt attend to")
@dataclass(frozen=True)
class SnapKV(Method):
    """Votes of the last rows of the prompt, equally many tokens per head.

    Attributes:
        window: rows that vote, always kept themselves (32).
        kernel_size: odd width of the average over neighbours (5).
    """

    window: int = 32
    kernel_size: int = 5

    def parts(self) -> Parts:
        """See `Method.parts`."""
        return Parts(WindowAttention(self.window, self.kernel_size), Uniform())
