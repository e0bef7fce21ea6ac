"""CompressKV: semantic retrieval heads choose for their whole layer (Lin et al. 2025, arXiv:2508.02401).

Ranks: kv_token, once per layer. Of each layer only the query heads with the best semantic retrieval scores vote, so
that the many heads that look at sinks do not outvote the few that look at facts; all KV heads keep the same tokens.

    s[j] = pool_k( mean over the last W rows of A[h, i, j] ),  mean over the layer's best `heads` query heads
    C_l  = base + e_l / Σ e · (C - base) · layers,   base <= C_l <= cap · C
    window ↔ W = 8, kernel_size ↔ k = 5 (average), heads ↔ 4, base ↔ 32, cap ↔ 3 as in the authors' code
    e_l ↔ the layer's error under a trial budget (`sparing score --scorer layer_error`)

Cost: as SnapKV's; both measurements once per model (`sparing calibrate --method compresskv`).

Deviations:
1. Measured on synthetic needles and texts. The authors measure layer errors on LongBench, on which they also report.
2. Counts are rounded by largest remainder, and what the cap cuts off is spread by e again; the authors add or take
   single tokens in order of importance.
3. Pooling averages over the tokens that exist, as in `snapkv`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparing.core.allocate_heads import WeightedLayers
from sparing.core.measured import MeasuredMethod
from sparing.core.method import Parts, register
from sparing.core.scorer import KeyValues, Queries, Scorer
from sparing.errors import ScoresMismatchError, require
from sparing.measures.attention import attention_mass, window_rows
from sparing.measures.pooling import check_window, pool_tokens


@dataclass(frozen=True)
class ChosenHeadsAttention(Scorer):
    """s[j] = pooled mean attention that the last `window` rows of some query heads pay to key j; alike in all KV heads.

    Attributes:
        heads: [attention layer of the model] → the query heads that vote.
        window: rows that vote, always kept themselves. kernel_size: odd width of the average over neighbours.
    """

    heads: tuple[tuple[int, ...], ...]
    window: int = 8
    kernel_size: int = 5
    state_outlives_eviction: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_window(self.window, self.kernel_size)
        require(all(self.heads) and len(self.heads) > 0, "heads", self.heads, "one or more query heads of every layer")

    def observe(self, state: Any, queries: Queries, stored: KeyValues) -> Queries:
        """See `Scorer.observe`; the state is the last `window` query rows."""
        return window_rows(state, queries, self.window)

    def score(self, state: Any, stored: KeyValues) -> Tensor:
        """See `Scorer.score`."""
        mass = attention_mass(state, stored)
        voters = self._voters(stored, mass.shape[1])
        votes, seen = mass[:, voters], voters // (mass.shape[1] // stored.keys.shape[1])
        # The window's own columns take part in the softmax but not in the vote of their neighbours.
        before = (stored.valid & (stored.positions < state.positions[0]))[:, seen]
        votes = votes.where(~before, pool_tokens(votes, before, self.kernel_size, "avg"))
        # By position: under other allocators KV heads may hold different tokens in the same slot.
        longest = int(stored.positions.max()) + 1
        total = votes.new_zeros(votes.shape[0], longest)
        total.scatter_add_(1, stored.positions[:, seen].flatten(1), votes.flatten(1))
        return total.gather(1, stored.positions.flatten(1)).view(stored.positions.shape) / len(voters)

    def protects(self, tokens_per_head: int) -> tuple[int, int]:
        """See `Scorer.protects`."""
        return (0, self.window)

    def _voters(self, stored: KeyValues, query_heads: int) -> Tensor:
        layer = stored.layer if stored.attention_layer is None else stored.attention_layer
        if layer >= len(self.heads) or max(self.heads[layer]) >= query_heads:
            raise ScoresMismatchError(f"no heads were chosen for layer {layer}", "measure this model")
        return torch.tensor(self.heads[layer], device=stored.keys.device)


@register("compresskv", paper="2508.02401", summary="what the semantic retrieval heads of each layer attend to",
          training_free=False, needs=("semantic_retrieval", "layer_error"))  # fmt: skip
@dataclass(frozen=True)
class CompressKV(MeasuredMethod):
    """Votes of semantic retrieval heads, with budgets by layer error.

    Attributes:
        scores: measurements by `semantic_retrieval` and `layer_error`.
        heads: query heads of a layer that vote (4). window: rows that vote, always kept themselves (8).
        kernel_size: odd width of the average over neighbours (5).
        base: tokens that every layer keeps first (32). cap: the most that it keeps, as a multiple of the average (3).
    """

    heads: int = 4
    window: int = 8
    kernel_size: int = 5
    base: int = 32
    cap: float = 3.0

    def __post_init__(self) -> None:
        require(self.heads >= 1, "heads", self.heads, "a number of query heads >= 1")
        super().__post_init__()

    @cached_property
    def _parts(self) -> Parts:
        semantic, error = self.measured("semantic_retrieval"), self.measured("layer_error")
        semantic.require_axes("layer", "head")
        error.require_axes("layer")
        order = torch.sort(semantic.values.nan_to_num(-torch.inf), dim=-1, descending=True, stable=True).indices
        chosen = tuple(tuple(sorted(row)) for row in order[:, : self.heads].tolist())
        allocator = WeightedLayers(tuple(error.values.nan_to_num(0.0).tolist()), self.base, self.cap)
        return Parts(ChosenHeadsAttention(chosen, self.window, self.kernel_size), allocator)

    def parts(self) -> Parts:
        """See `Method.parts`."""
        return self._parts
