"""Scissorhands: what stays important stays (Liu et al. 2023, arXiv:2305.17118).

Ranks: kv_token. A token that received less than its even share of attention in many of the last w rows is expendable.
When the cache is full, the tokens with the most such rows are dropped, many at once.

    I[h, j] = number of the last w rows i with A[h, i, j] < 1 / t_i,  t_i = keys that row i sees,  summed over the group
    s[h, j] = -I[h, j] + A[h, last row, j] / 2             (the second term only breaks ties: counts are whole numbers)
    window ↔ w = 400,  recent ↔ r = 10 newest, never dropped,  period ↔ m = 0.5 of the budget, dropped when it is full

Cost: O(w N d) each time that the cache is full, which is once in m tokens; between those, the queries since the last
drop are remembered (w at most), and nothing is computed.

Deviations:
1. Remembering w rows longer than that would cost more than the cache. So when fewer than w rows have come since the
   last drop, those before it count by what was counted then: I = I_since + I_then (1 - rows since / w).
2. Grouped-query attention, absent from the paper: a KV head's counts are summed over its query heads.
3. The paper leaves ties open, and most tokens tie; here the last row's attention decides.
4. All layers get the same share. The authors give later ones more, by a rule that could not be verified.
5. `period` is the share that is dropped when decoding has filled the cache. At the prompt's end exactly the budget is
   kept, as by every other method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparing.core.allocate import Uniform
from sparing.core.method import Method, Moment, Parts, register
from sparing.core.scorer import KeyValues, Queries, Scorer
from sparing.errors import require
from sparing.measures.attention import below_average, column_mass, window_rows
from sparing.measures.pooling import over_group


@dataclass(frozen=True)
class Persistence(Scorer):
    """s[h, j] = minus the number of recent rows in which key j was below average.

    Attributes:
        window: rows that are counted. recent: newest tokens that are always kept.
    """

    window: int = 400
    recent: int = 10
    accumulates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.window >= 1, "window", self.window, "a number of rows >= 1")
        require(self.recent >= 0, "recent", self.recent, "a number of tokens >= 0")

    def observe(self, state: Any, queries: Queries, stored: KeyValues) -> tuple[Queries, Tensor | None]:
        """See `Scorer.observe`; the state is the last rows since the last drop, and the scores that it left."""
        rows, before = state if isinstance(state, tuple) else (None, state)
        return window_rows(rows, queries, self.window), before

    def score(self, state: Any, stored: KeyValues) -> Tensor:
        """See `Scorer.score`."""
        if not isinstance(state, tuple):  # nothing has come since the last drop
            return torch.nn.functional.pad(state, (0, stored.keys.shape[2] - state.shape[-1]))
        rows, before = state
        heads = stored.keys.shape[1]
        counts = over_group(below_average(rows, stored), heads, "sum")
        last = over_group(column_mass(window_rows(None, rows, 1), stored), heads)
        scores = last / 2 - counts
        if before is not None:
            older = 1 - rows.valid.sum(-1)[:, None, None] / self.window
            scores[..., : before.shape[-1]] += before * older
        return scores

    def protects(self, tokens_per_head: int) -> tuple[int, int]:
        """See `Scorer.protects`."""
        return (0, self.recent)


@register(
    "scissorhands",
    paper="2305.17118",
    summary="the tokens that recent rows rarely found below average, dropped half a cache at a time",
    moment="every_step",
)
@dataclass(frozen=True)
class Scissorhands(Method):
    """Persistence of importance.

    Attributes:
        window: rows that are counted (400). recent: newest tokens that are always kept (10).
        period: tokens dropped when decoding has filled the cache: a number, or a share of the budget (0.5).
        moment: "every_step" as in the paper; "prefill_end" evicts once.
    """

    window: int = 400
    recent: int = 10
    period: int | float = 0.5
    moment: Moment = "every_step"

    def parts(self) -> Parts:
        """See `Method.parts`."""
        return Parts(Persistence(self.window, self.recent), Uniform(), self.moment, self.period)
