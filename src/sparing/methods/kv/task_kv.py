"""Task-KV: heads that gather something else than the others keep everything (He et al. 2025, arXiv:2501.15113).

Ranks: KV head, anew for every prompt, without any measurement; in the other heads kv_token.

    C[h, j] = mean over the last W rows i of A[h, i, j];   I = the t tokens with the largest C[h, j]
    v'[h]   = Σ_{j in I} C[h, j] V[j];   centre = mean over h of v'[h];   far = || v'[h] - centre ||_2
    layer r of R: f(r) = heads · (beta - (beta - last) · r / (R - 1)) heads keep everything: the farthest, and the one
                  nearest to the centre; all others their first s1 tokens, the s2 newest, and the best by C between
    window ↔ W = 32, tokens ↔ t = 256, beta ↔ 0.25, last ↔ m / heads = 4 / 32 (Llama-2-7B), kernel_size ↔ 7 (average),
    sinks ↔ s1 = 16, recent ↔ s2 = 256

Every layer has the same budget. Cost: W rows of attention per head, and t values.

Deviations:
1. Heads are KV heads: v' is the mean over a KV head's query heads, and f(r) is a share of KV heads, rounded half up.
2. The nearest head is one of the f(r) (the second, after the farthest): on top of them it would exceed the budget.
3. If the budget cannot hold f(r) whole heads beside the others' sinks and recent tokens, fewer heads are whole.
4. The ends kept are at most an eighth (sinks) and a quarter (recent) of a head's average budget, so that something is
   chosen in short contexts too.
5. L2 distance, which the paper leaves open; v' is taken before pooling; W_O is not applied (as in the paper).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sparing.core.allocate_heads import FullHeadsByLayer
from sparing.core.method import Method, Parts, register
from sparing.core.scorer import KeyValues, Queries, Scorer
from sparing.errors import require
from sparing.measures.attention import attention_mass, window_rows
from sparing.measures.pooling import check_window, over_group, pool_tokens


@dataclass(frozen=True)
class SemanticCentre(Scorer):
    """Pooled attention of the last rows per token, and the distance to the semantic centre per head.

    Attributes:
        window: rows at the end of the prompt that are looked at. kernel_size: odd width of the average over neighbours.
        tokens: the most attended tokens that a head's semantic vector is made of.
        sinks, recent: how many tokens at the ends are kept, if the budget is not small.
    """

    window: int = 32
    kernel_size: int = 7
    tokens: int = 256
    sinks: int = 16
    recent: int = 256
    state_outlives_eviction: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_window(self.window, self.kernel_size)
        require(self.tokens >= 1, "tokens", self.tokens, "a number of tokens >= 1")
        require(self.sinks >= 0, "sinks", self.sinks, "a number of tokens >= 0")
        require(self.recent >= 0, "recent", self.recent, "a number of tokens >= 0")

    def observe(self, state: Any, queries: Queries, stored: KeyValues) -> Queries:
        """See `Scorer.observe`; the state is the last `window` query rows."""
        return window_rows(state, queries, self.window)

    def score(self, state: Any, stored: KeyValues) -> Tensor:
        """See `Scorer.score`."""
        mass = over_group(attention_mass(state, stored), stored.keys.shape[1])
        return pool_tokens(mass, stored.valid, self.kernel_size, "avg")

    def rank_heads(self, state: Any, stored: KeyValues) -> Tensor:
        """See `Scorer.rank_heads`: the farthest, then the nearest, then the others by distance."""
        distance = self.distances(state, stored)
        farthest, nearest = (at(-1, keepdim=True) for at in (distance.argmax, distance.argmin))
        above = distance.amax(-1, keepdim=True) + 1
        return distance.scatter(-1, nearest, above).scatter(-1, farthest, above + 1)

    def distances(self, state: Any, stored: KeyValues) -> Tensor:
        """(B, H) float32: how far each head's semantic vector is from the mean of all."""
        kv_heads, count = stored.keys.shape[1:3]
        mass, places = attention_mass(state, stored).topk(min(self.tokens, count), dim=-1)
        # Query heads of one KV head side by side, so that values are never repeated.
        grouped, index = (x.unflatten(1, (kv_heads, -1)).flatten(2) for x in (mass, places))
        chosen = stored.values.gather(2, index[..., None].expand(-1, -1, -1, stored.values.shape[-1])).float()
        # A pad may be among the places, with no mass; what lies there must not matter.
        chosen = chosen.masked_fill(~stored.valid.gather(2, index)[..., None], 0.0)
        groups = mass.shape[1] // kv_heads
        gathered = (grouped[..., None] * chosen).sum(2) / groups
        return (gathered - gathered.mean(1, keepdim=True)).norm(dim=-1)

    def protects(self, tokens_per_head: int) -> tuple[int, int]:
        """See `Scorer.protects`."""
        return (min(self.sinks, tokens_per_head // 8), min(self.recent, tokens_per_head // 4))


@register("task_kv", paper="2501.15113", summary="everything in heads that gather something else than the others")
@dataclass(frozen=True)
class TaskKV(Method):
    """Heterogeneous heads keep everything, the others sinks, recent and most attended tokens.

    Attributes:
        beta, last: share of heads in the first and the last layer that keep everything (0.25 and 0.125).
        window, kernel_size, tokens, sinks, recent: see `SemanticCentre`.
    """

    beta: float = 0.25
    last: float = 0.125
    window: int = 32
    kernel_size: int = 7
    tokens: int = 256
    sinks: int = 16
    recent: int = 256

    def parts(self) -> Parts:
        """See `Method.parts`."""
        scorer = SemanticCentre(self.window, self.kernel_size, self.tokens, self.sinks, self.recent)
        return Parts(scorer, FullHeadsByLayer(self.beta, self.last))
