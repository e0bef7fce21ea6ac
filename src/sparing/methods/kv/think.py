"""ThinK: thinner keys by query-driven pruning (Xu et al. 2024, arXiv:2407.21018).

Ranks: channels of keys, within each KV head, beside the tokens. Keys vary over few channels, and what a channel is
worth depends on the queries as well: dropping channel i changes the logits by the outer product of its column of
queries and its column of keys.

    Score_i = Σ over the group of ‖Q_i K_iᵀ‖_F = Σ_g ‖Q_i^g‖₂ · ‖K_i‖₂,   the best ⌊c D⌋ channels of each head stay
    Q ↔ the last `window` query rows of the prompt (32),   K ↔ the kept keys,   channels ↔ c = 1 - λ = 0.6

Keys are held with those channels only, from the prompt's end on; queries are gathered to match. The newest tokens (32
to 95, see `kernels.compact`) and all values are held in full. Which tokens stay is SnapKV's choice, or any scorer's.
Saves (1 - c) / 2 of the bytes of all but the newest tokens, on top of what `keep` saves and `bits` saves.

Cost: O(window D + n D) per head, once.

Deviations:
1. Channels are chosen once, after the first prompt; later turns drop tokens, and hold new ones with the same channels.
2. The paper leaves grouped queries open: the scores of a KV head's query heads are added.
3. The newest tokens become thin by pages of 64 when enough newer ones have come; in the paper one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sparing.core.allocate import Uniform
from sparing.core.budget import share_of
from sparing.core.method import Method, Parts, register
from sparing.core.scorer import KeyValues, Queries, Replay, Scorer
from sparing.core.wrapper import Wrapper
from sparing.errors import require
from sparing.measures.attention import window_rows
from sparing.methods.kv.snapkv import WindowAttention


@dataclass(frozen=True)
class ThinKeys(Wrapper):
    """Scores tokens as another scorer, and chooses key channels by the last queries.

    Attributes:
        scorer: ranks the tokens.
        channels: share of the key channels that is held, in (0, 1].
        window: query rows that decide.
    """

    channels: float = 0.6
    window: int = 32
    prunes_channels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.channels <= 1, "channels", self.channels, "a share in (0, 1]")
        require(self.window >= 1, "window", self.window, "a number of rows >= 1")

    def observe(self, state: Any, queries: Queries, stored: KeyValues) -> tuple[Any, Queries]:
        """See `Scorer.observe`; the state is the other scorer's and the last query rows."""
        inner, rows = (None, None) if state is None else state
        return super().observe(inner, queries, stored), window_rows(rows, queries, self.window)

    def observe_replay(self, state: Any, queries: Queries, stored: KeyValues, replay: Replay) -> tuple[Any, Queries]:
        """See `Scorer.observe_replay`; a replay's queries do not choose channels."""
        return super().observe_replay(state[0], queries, stored, replay), state[1]

    def score(self, state: Any, stored: KeyValues) -> Tensor:
        """See `Scorer.score`."""
        return super().score(state[0], stored)

    def rank_heads(self, state: Any, stored: KeyValues) -> Tensor | None:
        """See `Scorer.rank_heads`."""
        return super().rank_heads(state[0], stored)

    def choose_channels(self, state: Any, stored: KeyValues, kept: Tensor) -> Tensor:
        """See `Scorer.choose_channels`."""
        values = channel_scores(state[1], stored, kept)
        count = max(share_of(self.channels, values.shape[-1]), 1)
        return values.sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(-1).values


def channel_scores(queries: Queries, stored: KeyValues, kept: Tensor) -> Tensor:
    """Σ_g ‖Q_i^g‖ ‖K_i‖ of every key channel i, (B, H, D) float32, over the valid queries and the kept keys."""
    rows, heads = stored.keys.shape[:2]
    states = queries.states.float().masked_fill(~queries.valid[:, None, :, None], 0.0)
    by_group = states.norm(dim=2).view(rows, heads, -1, states.shape[-1]).sum(2)
    return by_group * stored.keys.float().masked_fill(~kept[..., None], 0.0).norm(dim=2)


@register("think", paper="2407.21018", summary="SnapKV's tokens, with the key channels that the last queries need")
@dataclass(frozen=True)
class ThinK(Method):
    """Thinner keys for the tokens that stay.

    Attributes:
        scorer: ranks the tokens; SnapKV's if None.
        channels: share of the key channels that is held, in (0, 1] (0.6).
        window: query rows that choose the channels (32).
    """

    scorer: Scorer | None = None
    channels: float = 0.6
    window: int = 32

    def parts(self) -> Parts:
        """See `Method.parts`."""
        return Parts(ThinKeys(self.scorer or WindowAttention(), self.channels, self.window), Uniform())
