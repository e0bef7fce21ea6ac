"""Scorers that change the scores of another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparing.core.scorer import KeyValues, Queries, Replay, Scorer

# What a wrapper can do and needs is what the wrapped scorer can do and needs. Following decoding token by token is left
# out: the wrapper's scores are no sums that one more row could be added to.
_INHERITED = (
    "comparable_across_heads", "needs_rotary", "state_outlives_eviction", "replays", "needs_output", "refines",
    "prunes_channels",
)  # fmt: skip


@dataclass(frozen=True)
class Wrapper(Scorer):
    """Watches, protects and scores as another scorer does; subclasses change a part of that.

    Attributes:
        scorer: the other one.
    """

    scorer: Scorer

    def __post_init__(self) -> None:
        for name in _INHERITED:
            if name not in vars(type(self)):
                object.__setattr__(self, name, getattr(self.scorer, name))

    def observe(self, state: Any, queries: Queries, stored: KeyValues) -> Any:
        """See `Scorer.observe`."""
        return self.scorer.observe(state, queries, stored)

    def meet(self, model: Any) -> None:
        """See `Scorer.meet`."""
        self.scorer.meet(model)

    def replay(self, ids: Sequence[int], drafted: Any = None) -> list[Replay]:
        """See `Scorer.replay`."""
        return self.scorer.replay(ids, drafted)

    def observe_replay(self, state: Any, queries: Queries, stored: KeyValues, replay: Replay) -> Any:
        """See `Scorer.observe_replay`."""
        return self.scorer.observe_replay(state, queries, stored, replay)

    def score(self, state: Any, stored: KeyValues) -> Tensor:
        """See `Scorer.score`."""
        return self.scorer.score(state, stored)

    def rank_heads(self, state: Any, stored: KeyValues) -> Tensor | None:
        """See `Scorer.rank_heads`."""
        return self.scorer.rank_heads(state, stored)

    def protects(self, tokens_per_head: int) -> tuple[int, int]:
        """See `Scorer.protects`."""
        return self.scorer.protects(tokens_per_head)

    def choose_channels(self, state: Any, stored: KeyValues, kept: Tensor) -> Tensor:
        """See `Scorer.choose_channels`."""
        return self.scorer.choose_channels(state, stored, kept)

    def refine(self, values: Tensor, contenders: Tensor, room: Tensor, stored: KeyValues) -> Tensor:
        """See `Scorer.refine`."""
        return self.scorer.refine(values, contenders, room, stored)
