"""StreamingLLM: attention sinks and a recent window (Xiao et al. 2023, arXiv:2309.17453).

Ranks: kv_token, by position alone. Keeps the first `sinks` tokens and the most recent ones, equally in all layers
and heads, at every step: the window slides while decoding.

    s_j = j, with the first `sinks` protected        sinks ↔ the paper's start size, 4

Cost: nothing to compute. Memory: the budget, for any length.

Deviations from the authors' code:
1. Keys stay rotated at their original positions, and new queries use their true position. The authors cache
   unrotated keys and rotate by slot, which lets a model run beyond its trained length; here that is not offered.
2. The prompt is attended in full and evicted at its end. The authors evict while reading the prompt too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sparing.core.allocate import Uniform
from sparing.core.method import Method, Moment, Parts, register
from sparing.core.scorer import KeyValues, Scorer
from sparing.errors import require


@dataclass(frozen=True)
class Recency(Scorer):
    """s[h, j] = j: newer is better, after the first `sinks` tokens.

    Attributes:
        sinks: tokens at the start that are always kept.
    """

    sinks: int = 4
    follows_decoding: ClassVar[bool] = True
    state_outlives_eviction: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.sinks >= 0, "sinks", self.sinks, "a number of tokens >= 0")

    def score(self, state: Any, stored: KeyValues) -> Tensor:
        """See `Scorer.score`."""
        return stored.positions.float()

    def protects(self, tokens_per_head: int) -> tuple[int, int]:
        """See `Scorer.protects`."""
        return (self.sinks, 0)

    def step(self, scores: Tensor, attention: Tensor | None, positions: Tensor) -> Tensor:
        """See `Scorer.step`."""
        return positions.float()


@register(
    "streaming_llm",
    paper="2309.17453",
    summary="the first tokens (attention sinks) and the most recent ones",
    moment="every_step",
)
@dataclass(frozen=True)
class StreamingLLM(Method):
    """Sinks and a sliding window.

    Attributes:
        sinks: tokens at the start that are always kept (4 in the paper).
        moment: "every_step" slides the window while decoding; "prefill_end" lets it grow.
    """

    sinks: int = 4
    moment: Moment = "every_step"

    def parts(self) -> Parts:
        """See `Method.parts`."""
        return Parts(Recency(self.sinks), Uniform(), self.moment)
