"""KeyDiff: keep keys that differ from the rest (Park et al. 2025, arXiv:2504.15364).

Ranks: kv_token, by the key alone, as cached (rotated):

    a_h = mean over j of k_j / ||k_j||,     s[h, j] = -cos(k_j, a_h)

Cost: O(n d). Known limit: everything near the common direction goes, the sinks too where their keys are common.

Deviations:
1. One shot at the end of the prompt. `moment="chunk_end"` is the paper's block by block: after every chunk the anchor
   is that of what is left.
2. The `recent` most recent tokens are protected; `recent=0` gives the paper's rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparing.core.allocate import Uniform
from sparing.core.method import Method, Moment, Parts, register
from sparing.core.scorer import KeyValues, Scorer
from sparing.errors import require
from sparing.measures.keys import mean_direction


@dataclass(frozen=True)
class KeyDifference(Scorer):
    """s[h, j] = -cos(k_j, mean of the unit keys). `recent`: newest tokens that are protected."""

    recent: int = 16
    comparable_across_heads: ClassVar[bool] = False
    state_outlives_eviction: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.recent >= 0, "recent", self.recent, "a number of tokens >= 0")

    def score(self, state: Any, stored: KeyValues) -> Tensor:
        """See `Scorer.score`."""
        anchor = mean_direction(stored.keys, stored.valid)
        return -torch.nn.functional.cosine_similarity(stored.keys.float(), anchor[:, :, None], dim=-1)

    def protects(self, tokens_per_head: int) -> tuple[int, int]:
        """See `Scorer.protects`."""
        return (0, self.recent)


@register("keydiff", paper="2504.15364", summary="the tokens whose keys differ most from the mean key")
@dataclass(frozen=True)
class KeyDiff(Method):
    """Distinctive keys.

    Attributes:
        recent: newest tokens that are protected (16; 0 as in the paper).
        moment: "chunk_end" evicts block by block; "every_step" keeps the cache at its size while decoding.
    """

    recent: int = 16
    moment: Moment = "prefill_end"

    def parts(self) -> Parts:
        """See `Method.parts`."""
        return Parts(KeyDifference(self.recent), Uniform(), self.moment)
