"""SpecKV: what the next tokens will look at, as a small model drafts them (Galim et al. 2025, arXiv:2506.08373).

Ranks: kv_token. A draft model with the same tokenizer writes `lookahead` tokens after the prompt, greedily. The model
reads them behind the prompt; a key matters as much as the most attention that any of the last W rows of the prompt, or
any drafted row, pays to it.

    s[h, j] = maxpool_k( max over rows {last W of the prompt, all drafted} and the group of A[h, i, j] )
    window ↔ w = 32,  kernel_size ↔ k = 7,  lookahead ↔ the tokens drafted; the window itself is always kept

Without drafted tokens it is SnapKV with maxima for means. Cost: the draft model's generation, a forward of `lookahead`
tokens, and O((W + lookahead) n d) per head. The drafted tokens are cropped.

Deviations:
1. The drafted tokens are read after the prompt instead of together with it, which gives the same rows, so the prompt's
   attention is never sparse: the paper's vertical-slash prefill is not part of a cache method.
2. The authors crop the prompt's last token as well and feed it again; here it stays, and is one of the window's.
3. They draft as many tokens as will be generated, which a method cannot know: 64 by default.
4. In Python the draft model's tokenizer is not known, and is checked by the size of the vocabulary only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparing.core.allocate import Uniform
from sparing.core.draft import Draft, Drafted
from sparing.core.method import Method, Parts, register
from sparing.core.scorer import KeyValues, Queries, Replay, Scorer
from sparing.errors import require
from sparing.measures.attention import window_rows
from sparing.measures.pooling import check_window, pool_tokens
from sparing.measures.replayed import strongest_attention


@dataclass(frozen=True)
class LookaheadAttention(Scorer):
    """s[h, j] = pooled strongest attention of the prompt's last rows and of the drafted rows to key j.

    Attributes:
        draft: a transformers model with the same tokenizer, or a `Draft`; not the model at work itself.
        lookahead: tokens to draft; 0 for none, then no draft model is needed.
        window: rows of the prompt that vote, always kept themselves.
        kernel_size: odd width of the maximum over neighbours, 1 for none.
    """

    draft: Any = None
    lookahead: int = 64
    window: int = 32
    kernel_size: int = 7
    replays: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.lookahead >= 0, "lookahead", self.lookahead, "a number of tokens >= 0")
        check_window(self.window, self.kernel_size)
        if self.lookahead or self.draft is not None:
            object.__setattr__(self, "draft", Draft.of(self.draft, "or set lookahead=0"))

    def meet(self, model: Any) -> None:
        """See `Scorer.meet`."""
        if self.lookahead:
            self.draft.meet("speckv", model)

    def observe(self, state: Any, queries: Queries, stored: KeyValues) -> tuple[Queries, Tensor | None]:
        """See `Scorer.observe`; the state is the last `window` rows, and what drafted rows have found so far."""
        return window_rows(None if state is None else state[0], queries, self.window), None

    def replay(self, ids: Sequence[int], drafted: Drafted | None = None) -> list[Replay]:
        """See `Scorer.replay`: one pass over the drafted tokens."""
        if not self.lookahead:
            return []
        is_ours = drafted is not None and (drafted.draft, drafted.lookahead) == (self.draft, self.lookahead)
        ahead = drafted.ids if drafted is not None and is_ours else self.draft.write(ids, self.lookahead)
        return [Replay(ahead, 0, len(ids))]

    def observe_replay(
        self, state: Any, queries: Queries, stored: KeyValues, replay: Replay
    ) -> tuple[Queries, Tensor | None]:
        """See `Scorer.observe_replay`."""
        return state[0], strongest_attention(queries, stored)[..., : stored.keys.shape[2] - len(replay.ids)]

    def score(self, state: Any, stored: KeyValues) -> Tensor:
        """See `Scorer.score`."""
        rows, ahead = state
        best = strongest_attention(rows, stored)
        if ahead is not None:
            best = torch.maximum(best, torch.nn.functional.pad(ahead, (0, best.shape[-1] - ahead.shape[-1])))
        before = stored.valid & (stored.positions < rows.positions[0])
        return best.where(~before, pool_tokens(best, before, self.kernel_size, "max"))

    def protects(self, tokens_per_head: int) -> tuple[int, int]:
        """See `Scorer.protects`."""
        return (0, self.window)


@register(
    "speckv",
    paper="2506.08373",
    summary="the tokens that a draft model's next tokens attend to; one sequence at a time",
    needs_draft=True,
)
@dataclass(frozen=True)
class SpecKV(Method):
    """Lookahead by a draft model.

    Attributes:
        draft: a transformers model with the same tokenizer.
        lookahead: tokens to draft (64); 0 for none, then no draft model is needed.
        window: rows of the prompt that vote, always kept themselves (32).
        kernel_size: odd width of the maximum over neighbours (7).
    """

    draft: Any = None
    lookahead: int = 64
    window: int = 32
    kernel_size: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "draft", self._scorer().draft)

    def _scorer(self) -> LookaheadAttention:
        return LookaheadAttention(self.draft, self.lookahead, self.window, self.kernel_size)

    def parts(self) -> Parts:
        """See `Method.parts`."""
        return Parts(self._scorer(), Uniform())
