"""StreamingLLM: attention sinks and a recent window (Xiao et al. 2023, arXiv:2309.17453).

Ranks: kv_token, by position alone. Keeps the first `sinks` tokens and the most recent ones, equally in all layers
and heads, at every step: the window slides while decoding.

    s_j = j, with the first `sinks` protected        sinks ↔ the paper's start size, 4
    rerotate: distances as in the cache, not as in the text; key i of n lies n - i from the next query

Cost: nothing to compute; with `rerotate`, the sinks are turned whenever something is dropped. Memory: the budget, for
any length.

Deviations from the authors' code:
1. By default keys stay at their original positions, as in most comparisons. `rerotate=True` gives the paper's own
   positions, with which a model can run beyond the length that it was trained for. The authors cache unrotated keys
   and rotate all of them at every step; here kept keys move when others are dropped.
2. The prompt is attended in full and evicted at its end; `moment="chunk_end"` evicts after every chunk, as the authors
   do, and not while decoding.
3. A new token is attended together with a full cache, and then something is dropped; the authors drop first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sparing.core.actions import Drop, Rerotate
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
        moment: "every_step" slides the window while decoding; "chunk_end" evicts after every chunk of a prompt;
            "prefill_end" after the prompt only.
        rerotate: turn the kept keys to consecutive positions, as in the paper.
        period: tokens dropped at once while decoding: a number, or a share of the budget in (0, 1).
    """

    sinks: int = 4
    moment: Moment = "every_step"
    rerotate: bool = False
    period: int | float = 1

    def parts(self) -> Parts:
        """See `Method.parts`."""
        action = Rerotate() if self.rerotate else Drop()
        return Parts(Recency(self.sinks), Uniform(), self.moment, self.period, action)
