"""CaM: the values of dropped tokens live on in the tokens that follow them (Zhang et al. 2024, Cache Merging for
Memory-efficient LLMs Inference, ICML 2024, PMLR 235:58840; no arXiv number).

Ranks: kv_token. If token i is dropped, the output loses A_i v_i. CaM hands v_i to the m kept tokens that follow it, in
equal parts, with a probability that makes up for the attention that these get:

    p_i = clamp( s_i / mean of s over the m tokens, 0, 1 ),   b_i ~ Bernoulli(p_i),   v_k += b_i v_i / m  for each k
    spread ↔ m = 32,   s ↔ SnapKV's score: mean attention of the last W rows, averaged over k neighbours and the group
    window ↔ W = 32, always kept;   kernel_size ↔ k = 5

so that on average the m tokens give back Σ A_k b_i v_i / m = A_i v_i, as long as they get as much attention as i did.
Keys, positions and counts stay as they are. When: after the prompt, and at every decoded token, which drops one.
Cost: as SnapKV's score; with period 1 every decoded token scores and repacks the whole cache (see `period`).

Deviations:
1. The kept tokens are those with the highest s, and tokens of the prompt are dropped all at once, each into the kept
   ones after it, though there be fewer than m. The authors drop one token a step, the one that leaves a recent window.
2. CaM goes with any eviction; s is SnapKV's, so that the two differ by the merging alone. The authors' scripts take the
   current row or the mean over all rows, and one divides by the largest score instead of the mean.
3. The draw belongs to seed, layer, KV head and position, so rows of a batch, chunks and repeated runs agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparing.core.actions import Action, Folded
from sparing.core.allocate import Uniform
from sparing.core.method import Method, Moment, Parts, register
from sparing.core.scorer import KeyValues
from sparing.errors import require
from sparing.measures.draws import uniform
from sparing.methods.kv.snapkv import WindowAttention


@dataclass(frozen=True)
class HandOn(Action):
    """The values of dropped tokens are added to the kept tokens that follow them, or to none.

    Attributes:
        spread: tokens that share a dropped one's value.
        seed: of the draw.
    """

    spread: int = 32
    seed: int = 0
    is_exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self.spread >= 1, "spread", self.spread, "a number of tokens >= 1")

    def apply(self, kept: list[list[Tensor]], stored: KeyValues, scores: Tensor) -> Folded:
        """See `Action.apply`."""
        values, draws = stored.values.clone(), uniform(stored, self.seed)
        for row, heads in enumerate(kept):
            for head, slots in enumerate(heads):
                lane = [x[row, head] for x in (stored.valid, stored.positions, scores, draws)]
                self._hand_on(values[row, head], slots.to(values.device), *lane)
        return Folded(kept, stored.keys, values, stored.bias, stored.positions)

    def _hand_on(
        self, values: Tensor, kept: Tensor, valid: Tensor, positions: Tensor, scores: Tensor, draws: Tensor
    ) -> None:
        """Change the values (N, Dv) of the kept slots of one lane."""
        dropped = valid.clone()
        dropped[kept] = False
        dropped = dropped.nonzero().squeeze(-1)
        if len(kept) == 0 or len(dropped) == 0:
            return
        kept = kept[positions[kept].argsort()]
        first = torch.searchsorted(positions[kept], positions[dropped])
        number = first[:, None] + torch.arange(self.spread, device=kept.device)
        there = number < len(kept)
        targets = kept[number.clamp_max(len(kept) - 1)]
        count = there.sum(-1).clamp_min(1)
        mean = (scores[targets] * there).sum(-1) / count
        is_handed_on = draws[dropped] * mean < scores[dropped]
        exact = torch.promote_types(values.dtype, torch.float32)
        share, total = values[dropped].to(exact) * (is_handed_on / count)[:, None], values.to(exact)
        for step in range(self.spread):
            total.index_add_(0, targets[:, step], share * there[:, step, None])
        values[kept] = total[kept].to(values.dtype)


@register(
    "cam",
    paper="-",
    summary="what the last rows attend to; values of dropped tokens pass to those that follow",
    moment="every_step",
)
@dataclass(frozen=True)
class CaM(Method):
    """Cache merging.

    Attributes:
        window: rows that vote, always kept themselves (32).
        kernel_size: odd width of the average over neighbours (5).
        spread: tokens that share a dropped one's value (32).
        seed: of the draw.
        moment: "every_step" as in the paper; "prefill_end" merges once, after the prompt.
        period: tokens dropped at once while decoding, a number or a share of the budget in (0, 1).
    """

    window: int = 32
    kernel_size: int = 5
    spread: int = 32
    seed: int = 0
    moment: Moment = "every_step"
    period: int | float = 1

    def parts(self) -> Parts:
        """See `Method.parts`."""
        action = HandOn(self.spread, self.seed)
        scorer = WindowAttention(self.window, self.kernel_size)
        return Parts(scorer, Uniform(), self.moment, self.period, action)
