"""RefreshKV / Recycled Attention: now and then a token reads everything, and those after it what mattered to it.

arXiv:2411.05787 (Xu et al. 2024).

Ranks: kv_token, by one row of attention. Nothing is dropped: it saves reading, not memory.

    a_j = max over the group of  max-pool over neighbours of  A[h, t, j],   t: the last token that read everything

The best K tokens are the small cache; K ↔ `keep`. A token between full ones reads the small cache; each new token
enters it, and the entry with the lowest a leaves. At first t is the prompt's last token.

Every S tokens is a check: if the cosine of the query with the query at t, averaged over heads, is at most s, the token
reads everything and makes a new small cache. S ↔ stride; s ↔ similarity, where 1 is a full token at every check.

Cost: one row of attention beside every full token, and K indices per KV head. On average (1 − 1/S) · K + N/S tokens are
read per step, more than `keep`: the report says which share it was.

Deviations:
1. S = 5 as in the authors' tables; the value of s behind these tables is not known, so the default is a fixed stride.
2. The pooling's kernel, which is not known either, is that of SnapKV's max pooling (7).
3. Rows of a batch keep their own schedule, layers too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.core.method import Method, Parts, register
from sparing.core.reader import Choice, Reader, Step, until
from sparing.core.scorer import KeyValues, Queries
from sparing.errors import require
from sparing.measures.attention import column_mass
from sparing.measures.pooling import over_group, pool_tokens


@dataclass(frozen=True)
class RecycledAttention(Reader):
    """Reads what the last full row of attention was on.

    Its state: `query` (B, Hq, D) of that row, `at` (B,) the slots that there were, and once it is ranked `order`
    (B, H, K), the best slots first.

    Attributes:
        stride, similarity: when everything is read, see the module. kernel_size: of the pooling, odd.
    """

    stride: int = 5
    similarity: float = 1.0
    kernel_size: int = 7

    def __post_init__(self) -> None:
        require(self.stride >= 1, "stride", self.stride, "a number of tokens >= 1")
        require(-1 <= self.similarity <= 1, "similarity", self.similarity, "a cosine in [-1, 1]")
        odd = self.kernel_size >= 1 and self.kernel_size % 2 == 1
        require(odd, "kernel_size", self.kernel_size, "an odd number >= 1")

    def observe(self, state: Any, queries: Queries, stored: KeyValues) -> Any:
        """See `Reader.observe`."""
        seen = stored.pads.new_full(stored.pads.shape, int(queries.positions[-1]) + 1)
        return {"query": queries.states[:, :, -1].clone(), "at": seen}

    def choose(self, state: Any, step: Step) -> tuple[Any, Choice]:
        """See `Reader.choose`."""
        stored, tokens = step.stored, step.stored.keys.shape[2]
        if state is None:
            is_full = torch.ones_like(stored.pads, dtype=torch.bool)
        else:
            if "order" not in state:
                state["order"] = self._order(state["query"], until(stored, int(state["at"][0])), step)
            cosine = F.cosine_similarity(step.query.float(), state["query"].float(), dim=-1).mean(1).clamp(-1, 1)
            is_due = (tokens - state["at"]) % self.stride == 0
            is_full = is_due & (cosine <= self.similarity)
        if bool(is_full.any()):
            mine = {"query": step.query.clone(), "at": torch.full_like(stored.pads, tokens)}
            mine["order"] = self._order(step.query, stored, step)
            before, state = state, mine if state is None else _merged(is_full, mine, state)
            if bool(is_full.all()):
                return state, Choice(None)
            return state, _mixed(is_full, _recent_and_best(before, step), stored)
        return state, Choice(None) if step.reads_all else _recent_and_best(state, step)

    def crop(self, state: Any, tokens: int) -> Any:
        """See `Reader.crop`: the last full row still counts, unless it was taken back itself."""
        return state if bool((state["at"] <= tokens).all()) else None

    def _order(self, query: Tensor, stored: KeyValues, step: Step) -> Tensor:
        """(B, H, K) slots, best first, for as many as any head may read."""
        asked = stored.positions[0, 0, -1:]
        valid = torch.ones(query.shape[0], 1, dtype=torch.bool, device=query.device)
        row = column_mass(Queries(query[:, :, None], asked, valid, step.softmax), stored)
        mass = over_group(row, stored.keys.shape[1], "max")
        scores = pool_tokens(mass, stored.valid, self.kernel_size, "max").masked_fill(~stored.valid, -torch.inf)
        best = torch.sort(scores, dim=-1, descending=True, stable=True).indices
        return best[..., : int(step.counts.max())].clone()


def _recent_and_best(state: dict[str, Tensor], step: Step) -> Choice:
    """The tokens since the last full one, and the best of that one: as many together as may be read."""
    stored, order, counts = step.stored, state["order"], step.counts
    tokens, device = stored.keys.shape[2], order.device
    newer = (tokens - state["at"])[:, None]
    there = (state["at"] - stored.pads)[:, None]
    best = (counts - newer).clamp_min(0).minimum(there)[..., None]
    recent = torch.arange(int(newer.max()), device=device)
    slots = torch.cat([order, (tokens - 1 - recent).expand(*order.shape[:2], -1)], dim=-1)
    ranks = torch.arange(order.shape[-1], device=device)
    valid = torch.cat([ranks < best, recent < newer.minimum(counts)[..., None]], dim=-1)
    return Choice(slots, valid)


def _mixed(is_full: Tensor, choice: Choice, stored: KeyValues) -> Choice:
    """Everything in the full rows, the choice in the others."""
    assert choice.slots is not None
    assert choice.valid is not None
    slots = torch.arange(stored.keys.shape[2], device=choice.slots.device).expand_as(stored.valid)
    read = torch.zeros_like(stored.valid, dtype=torch.int64).scatter_add(-1, choice.slots, choice.valid.long()) > 0
    return Choice(slots, torch.where(is_full[:, None, None], stored.valid, read))


def _merged(is_full: Tensor, new: dict[str, Tensor], old: dict[str, Tensor]) -> dict[str, Tensor]:
    """The new state in the full rows, the old one in the others."""
    longest = max(new["order"].shape[-1], old["order"].shape[-1])
    result = {}
    for name, mine in new.items():
        theirs = old[name]
        if name == "order":
            mine, theirs = (F.pad(t, (0, longest - t.shape[-1])) for t in (mine, theirs))
        result[name] = torch.where(is_full.view(-1, *[1] * (mine.dim() - 1)), mine, theirs)
    return result


@register("refreshkv", paper="2411.05787", summary="what the last token that read all was on; frees no memory")
@dataclass(frozen=True)
class RefreshKV(Method):
    """Full attention now and then, its best tokens in between.

    Attributes:
        stride: a token may read everything every so many tokens (5).
        similarity: it does if its query's cosine with the last such token's is at most this; 1 for always.
        kernel_size: of the max pooling over neighbours, odd (7).
    """

    stride: int = 5
    similarity: float = 1.0
    kernel_size: int = 7

    def parts(self) -> Parts:
        """See `Method.parts`."""
        return Parts.reading(RecycledAttention(self.stride, self.similarity, self.kernel_size))
