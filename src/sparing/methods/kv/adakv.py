"""AdaKV: heads compete for the layer's budget (Feng et al. 2024, arXiv:2407.11550).

Ranks: kv_token, with any score that is comparable across heads; by default SnapKV's with the authors' max pooling.
Each head keeps its window and, for free, its best `floor` share of the rest; what remains of the layer's pool goes to
the best tokens of all heads. Safeguard α ↔ floor = 0.2, as in the authors' experiments.

Cost: as the score's, plus one sort over the layer. Heads end with different lengths, which the cache really stores.

Deviations:
1. "Free, then global" (as in kvpress) instead of the authors' convex mix of counts, whose rounding loses budget. As in
   the authors' code, and unlike kvpress, the window comes on top of the free share.
2. The optional re-weighting by the share of mass in the top K is not applied.
3. A score that is not comparable across heads (norms, cosines) is standardised per head before heads compete.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparing.core.allocate import AdaptiveHeads
from sparing.core.method import Method, Parts, register
from sparing.core.scorer import Scorer
from sparing.methods.kv.snapkv import WindowAttention


@register("adakv", paper="2407.11550", summary="SnapKV's votes, with heads competing for the layer's budget")
@dataclass(frozen=True)
class AdaKV(Method):
    """Head-wise budgets over any score.

    Attributes:
        scorer: ranks the tokens; SnapKV's window of 32 with max pooling of 7 if None.
        floor: share of the average budget that every head keeps for free, in [0, 1] (0.2).
    """

    scorer: Scorer | None = None
    floor: float = 0.2

    def parts(self) -> Parts:
        """See `Method.parts`."""
        scorer = self.scorer or WindowAttention(window=32, kernel_size=7, pool="max")
        return Parts(scorer, AdaptiveHeads(self.floor))
