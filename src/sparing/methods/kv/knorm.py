"""Knorm: small keys draw attention (Devoto et al. 2024, arXiv:2406.11430).

Ranks: kv_token, by the key alone: s[h, j] = -||k_j||₂. No queries, no positions (rotation keeps the norm).

Cost: O(n d) once. Known limit: a model that normalises its keys (Qwen3, Gemma 3, OLMo 2) has nearly equal norms,
and the order is then noise.

Deviations:
1. No layers are skipped; the paper leaves out the first two.
2. The `recent` most recent tokens are protected, which neither paper nor code does: without them the model loses
   the sentence that it is in. `recent=0` gives the paper's rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sparing.core.allocate import Uniform
from sparing.core.method import Method, Parts, register
from sparing.core.scorer import KeyValues, Scorer
from sparing.errors import require


@dataclass(frozen=True)
class KeyNorm(Scorer):
    """s[h, j] = -||k_j||₂. `recent`: newest tokens that are protected."""

    recent: int = 16
    comparable_across_heads: ClassVar[bool] = False
    state_outlives_eviction: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.recent >= 0, "recent", self.recent, "a number of tokens >= 0")

    def score(self, state: Any, stored: KeyValues) -> Tensor:
        """See `Scorer.score`."""
        return -stored.keys.float().norm(dim=-1)

    def protects(self, tokens_per_head: int) -> tuple[int, int]:
        """See `Scorer.protects`."""
        return (0, self.recent)


@register("knorm", paper="2406.11430", summary="the tokens whose keys are small")
@dataclass(frozen=True)
class Knorm(Method):
    """Low-norm keys. `recent`: newest tokens that are protected (16; 0 as in the paper)."""

    recent: int = 16

    def parts(self) -> Parts:
        """See `Method.parts`."""
        return Parts(KeyNorm(self.recent), Uniform())
