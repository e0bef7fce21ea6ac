"""H2O: heavy hitters by accumulated attention (Zhang et al. 2023, arXiv:2306.14048).

Ranks: kv_token. A token's score is the attention that it has received from all rows so far; the cache holds the
most recent tokens and the heaviest of the others.

    s[h, j] = Σ_i A[h, i, j]   over the prompt, then += the new row at each decoded token
    recent ↔ share of the budget given to the most recent tokens, 0.5: as many recent ones as heavy hitters

At each step as many tokens leave as came; survivors keep their sums. Cost: O(n² d) time for the prompt's column
sums, recomputed tile by tile from queries and keys, O(n) memory.

Deviations:
1. Grouped-query attention, absent from the paper: the sums of a KV head are averaged over its query heads.
2. The prompt is scored in one go at its end instead of token by token, as in the authors' implementation.
3. Sums are per sequence. The authors' code adds them over the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparing.core.allocate import Uniform
from sparing.core.budget import share_of
from sparing.core.method import Method, Moment, Parts, register
from sparing.core.scorer import KeyValues, Queries, Scorer
from sparing.errors import require
from sparing.measures.attention import column_mass
from sparing.measures.pooling import over_group


@dataclass(frozen=True)
class AccumulatedAttention(Scorer):
    """s[h, j] = the sum over all rows i of A[h, i, j], mean over the group.

    Attributes:
        recent: share of the budget that is reserved for the most recent tokens, in [0, 1].
    """

    recent: float = 0.5
    follows_decoding: ClassVar[bool] = True
    accumulates: ClassVar[bool] = True
    step_needs_attention: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(0 <= self.recent <= 1, "recent", self.recent, "a share in [0, 1]")

    def observe(self, state: Any, queries: Queries, stored: KeyValues) -> Tensor:
        """See `Scorer.observe`; the state is the (B, H, N) sums so far."""
        sums = over_group(column_mass(queries, stored), stored.keys.shape[1])
        if state is not None:
            sums[..., : state.shape[-1]] += state
        return sums

    def score(self, state: Any, stored: KeyValues) -> Tensor:
        """See `Scorer.score`."""
        missing = stored.keys.shape[2] - state.shape[-1]
        return torch.nn.functional.pad(state, (0, missing))

    def protects(self, tokens_per_head: int) -> tuple[int, int]:
        """See `Scorer.protects`."""
        return (0, share_of(self.recent, tokens_per_head))

    def step(self, scores: Tensor, attention: Tensor | None, positions: Tensor) -> Tensor:
        """See `Scorer.step`."""
        assert attention is not None
        return scores + attention.float().mean(2).sum(2)


@register(
    "h2o",
    paper="2306.14048",
    summary="the tokens that received most attention so far, and the most recent ones",
    moment="every_step",
)
@dataclass(frozen=True)
class H2O(Method):
    """Heavy hitters and recent tokens.

    Attributes:
        recent: share of the budget for the most recent tokens, in [0, 1].
        moment: "every_step" as in the paper; "prefill_end" evicts once, as most comparisons run it.
    """

    recent: float = 0.5
    moment: Moment = "every_step"

    def parts(self) -> Parts:
        """See `Method.parts`."""
        return Parts(AccumulatedAttention(self.recent), Uniform(), self.moment)
