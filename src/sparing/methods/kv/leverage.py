"""Leverage scores: keys that the other keys do not explain (Compactor, Chari and Van Durme 2025, arXiv:2507.08143).

Ranks: kv_token, by the keys before rotation, centred over the sequence, after a Gaussian sketch Φ:

    X = (K - mean K) Φ,   Φ ∈ R^{d × k}, entries N(0, 1/k),     l_j = x_jᵀ (XᵀX + λ I)⁻¹ x_j
    sketch ↔ k = 48, jitter ↔ λ = 0.01

This is the query-free half of Compactor; its non-causal attention half is not part of this method.
Cost: O(n k²). The sketch is seeded and the same for every row and head, so results repeat and batches agree.

Deviations:
1. Keys before rotation are recovered by inverting the model's own rotation.
2. The first 8 and last 4 tokens are protected, as in the code of the combined method (kvpress).
3. The Gram matrix is solved in float64 by its eigenvectors: in float32 λ drowns beside large keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparing.core.allocate import Uniform
from sparing.core.method import Method, Parts, register
from sparing.core.scorer import KeyValues, Scorer
from sparing.errors import require
from sparing.measures.keys import centred, leverage


@dataclass(frozen=True)
class LeverageScore(Scorer):
    """s[h, j] = leverage of key j among the keys of its head, in [0, 1].

    Attributes:
        sketch: width of the Gaussian sketch; 0 for none (exact leverage).
        jitter: added to the diagonal of the Gram matrix.
        first, recent: tokens protected at both ends.
        seed: of the sketch.
    """

    sketch: int = 48
    jitter: float = 0.01
    first: int = 8
    recent: int = 4
    seed: int = 0
    comparable_across_heads: ClassVar[bool] = False
    needs_rotary: ClassVar[bool] = True
    state_outlives_eviction: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.sketch >= 0, "sketch", self.sketch, "a width >= 1, or 0 for none")
        require(self.jitter >= 0, "jitter", self.jitter, "a number >= 0")

    def score(self, state: Any, stored: KeyValues) -> Tensor:
        """See `Scorer.score`."""
        keys = stored.keys.float()
        if stored.rotary is not None:
            heads = [
                stored.rotary.unrotate(keys[:, h : h + 1], stored.true_positions[:, h]) for h in range(keys.shape[1])
            ]
            keys = torch.cat(heads, dim=1)
        x = centred(keys, stored.valid)
        if self.sketch:
            generator = torch.Generator().manual_seed(self.seed)
            phi = torch.randn(keys.shape[-1], self.sketch, generator=generator) / self.sketch**0.5
            x = x @ phi.to(x.device)
        return leverage(x, self.jitter)

    def protects(self, tokens_per_head: int) -> tuple[int, int]:
        """See `Scorer.protects`."""
        return (self.first, self.recent)


@register("leverage", paper="2507.08143", summary="the tokens whose keys the other keys do not explain (Compactor)")
@dataclass(frozen=True)
class Leverage(Method):
    """Statistical leverage of the keys.

    Attributes:
        sketch: width of the Gaussian sketch (48); 0 for exact leverage.
        jitter: added to the diagonal of the Gram matrix (0.01).
        seed: of the sketch.
    """

    sketch: int = 48
    jitter: float = 0.01
    seed: int = 0

    def parts(self) -> Parts:
        """See `Method.parts`."""
        return Parts(LeverageScore(self.sketch, self.jitter, seed=self.seed), Uniform())
