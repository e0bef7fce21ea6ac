"""TOVA: drop what the last token attends to least (Oren et al. 2024, arXiv:2401.06104).

Ranks: kv_token. One row decides, averaged over all heads, so all heads of a layer keep the same tokens.

    s_j = mean over all heads h of A[h, last, j]

After the prompt the best by its last row stay; then each decoded token drops the one with the lowest score in the
new row. Cost: O(n d) per head and step, no state. No sinks and no window are protected.

Deviations:
1. The newest token always stays, since it is the one that is asked. The authors let it compete with the others.
2. The prompt is cut once, at its end, as in the authors' code; the rule read strictly would cut token by token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sparing.core.allocate import Uniform
from sparing.core.method import Method, Moment, Parts, register
from sparing.core.scorer import KeyValues, Queries, Scorer
from sparing.measures.attention import attention_mass, window_rows


@dataclass(frozen=True)
class LastRowAttention(Scorer):
    """s_j = attention of the newest row to key j, mean over all heads of the layer."""

    follows_decoding: ClassVar[bool] = True
    step_needs_attention: ClassVar[bool] = True

    def observe(self, state: Any, queries: Queries, stored: KeyValues) -> Queries:
        """See `Scorer.observe`; the state is the last query row."""
        return window_rows(state, queries, 1)

    def score(self, state: Any, stored: KeyValues) -> Tensor:
        """See `Scorer.score`."""
        mass = attention_mass(state, stored).mean(1, keepdim=True)
        return mass.expand(-1, stored.keys.shape[1], -1)

    def protects(self, tokens_per_head: int) -> tuple[int, int]:
        """See `Scorer.protects`."""
        return (0, 1)

    def step(self, scores: Tensor, attention: Tensor | None, positions: Tensor) -> Tensor:
        """See `Scorer.step`."""
        assert attention is not None
        newest = attention[..., -1, :].float()  # (B, H, G, N)
        return newest.mean((1, 2)).unsqueeze(1).expand_as(scores)


@register(
    "tova",
    paper="2401.06104",
    summary="the tokens that the newest token attends to, the same for all heads",
    moment="every_step",
)
@dataclass(frozen=True)
class TOVA(Method):
    """The last row decides, for all heads of a layer together.

    Attributes:
        moment: "every_step" as in the paper; "prefill_end" evicts once.
    """

    moment: Moment = "every_step"

    def parts(self) -> Parts:
        """See `Method.parts`."""
        return Parts(LastRowAttention(), Uniform(), self.moment)
