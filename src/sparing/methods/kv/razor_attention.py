"""RazorAttention: retrieval heads keep everything, others a window and a summary (Tang et al. 2024, arXiv:2407.15891).

Ranks: KV head, by echo and induction scores measured on random tokens (`sparing calibrate --method razor`, see
`methods/heads/echo_induction.py`); in the other heads kv_token, by position.

    retrieval heads = the best `induction` share of KV heads by induction score  ∪  the best `echo` share by echo score,
                      a KV head scoring what its best query head does
    other heads:      the first `sinks` tokens, the newest ones, and ONE compensation token for all that was dropped:
                      its key and value are the means of theirs, its logit has log N added for the N that it stands for
    induction ↔ 14 %, echo ↔ 1 %, sinks ↔ N0 = 4 as in the authors' code

Cost: one mean per head at the prompt's end; the measurement once per model.

Deviations:
1. The authors keep max(4000, n / 5) recent tokens. Here `keep` is the whole budget: retrieval heads in order of their
   better score are full while all others still get `sinks + recent` tokens; what is left over makes the windows longer.
   n / 5 with 15 % of full heads is keep = 0.32.
2. What is decoded stays until the next turn has been read. Then what leaves the windows is merged into the compensation
   token, each by its weight, so that the mean stays that of all dropped tokens.
3. Keys are averaged as cached, rotated to their positions (as in the paper), which shrinks their mean.
4. ALiBi, for which the paper bounds windows per head, is not offered.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from sparing.core.actions import Action, Folded
from sparing.core.allocate_heads import FullHeads, Importances
from sparing.core.measured import MeasuredMethod
from sparing.core.method import Parts, register
from sparing.core.scorer import KeyValues
from sparing.core.scores import count_of
from sparing.errors import require
from sparing.methods.kv.streaming_llm import Recency


@dataclass(frozen=True)
class Compensate(Action):
    """In every head that loses tokens one token stands for them: their mean key and value, and log N on its logit.

    A token that stands for several counts as that many. The new token takes the slot and the position of the last one
    that it stands for, so that it lies before the window and is merged again when tokens leave that.
    """

    reserve: ClassVar[int] = 1
    is_exact: ClassVar[bool] = False
    counts_all: ClassVar[bool] = True

    def apply(self, kept: list[list[Tensor]], stored: KeyValues, scores: Tensor) -> Folded:
        """See `Action.apply`."""
        gone = stored.valid.clone()
        for row, heads in enumerate(kept):
            for head, chosen in enumerate(heads):
                gone[row, head, chosen] = False
        weight, slot = gone.to(torch.float32), _last(gone)
        if stored.bias is not None:
            weight = stored.bias.exp().where(gone, 0.0)
        total = weight.sum(-1)
        keys, values = (_with_mean(t, weight, gone, slot) for t in (stored.keys, stored.values))
        bias = torch.zeros_like(weight) if stored.bias is None else stored.bias.clone()
        loses = gone.any(-1)
        new = torch.where(loses, total.clamp_min(torch.finfo(total.dtype).tiny).log(), bias.gather(-1, slot)[..., 0])
        bias.scatter_(-1, slot, new[..., None])
        slots = [
            [
                torch.cat([chosen.to(slot.device), slot[row, head]]).sort().values if loses[row, head] else chosen
                for head, chosen in enumerate(heads)
            ]
            for row, heads in enumerate(kept)
        ]
        return Folded(slots, keys, values, bias, stored.positions)


def _last(gone: Tensor) -> Tensor:
    """(B, H, 1) the last slot that is marked; 0 where none is."""
    return (gone * torch.arange(gone.shape[-1], device=gone.device)).amax(-1, keepdim=True)


def _with_mean(x: Tensor, weight: Tensor, gone: Tensor, slot: Tensor) -> Tensor:
    """x (B, H, N, D) with the weighted mean of what is gone in each head's slot, if anything is."""
    exact = torch.promote_types(x.dtype, torch.float32)
    share = (weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)).to(exact)
    mean = torch.einsum("bhn,bhnd->bhd", share, x.to(exact).masked_fill(~gone[..., None], 0.0))
    place = slot[..., None].expand(-1, -1, -1, x.shape[-1])
    old = x.gather(2, place)
    return x.scatter(2, place, torch.where(gone.any(-1)[..., None, None], mean[:, :, None].to(x.dtype), old))


@register("razor", paper="2407.15891", summary="everything in retrieval heads, a window and one summary in others",
          training_free=False, needs=("echo", "induction"))  # fmt: skip
@dataclass(frozen=True)
class RazorAttention(MeasuredMethod):
    """Retrieval heads, and compensation tokens in the others.

    Attributes:
        scores: measurements by `echo` and `induction`.
        induction, echo: shares of KV heads that are retrieval heads, rounded up (0.14 and 0.01).
        sinks: first tokens that every head keeps (4). recent: newest tokens that it keeps at least.
    """

    induction: float = 0.14
    echo: float = 0.01
    sinks: int = 4
    recent: int = 64

    def __post_init__(self) -> None:
        require(0 <= self.induction <= 1, "induction", self.induction, "a share in [0, 1]")
        require(0 <= self.echo <= 1, "echo", self.echo, "a share in [0, 1]")
        require(self.sinks >= 0, "sinks", self.sinks, "a number of tokens >= 0")
        require(self.recent >= 0, "recent", self.recent, "a number of tokens >= 0")
        super().__post_init__()

    def retrieval_heads(self) -> list[tuple[int, int]]:
        """(layer, KV head) of the retrieval heads, best first."""
        tables = {name: self.per_kv_head(name, "max") for name in ("induction", "echo")}
        chosen = {unit for name, table in tables.items() for unit in _top(table, getattr(self, name))}
        best = {unit: max(table[unit[0]][unit[1]] for table in tables.values()) for unit in chosen}
        return sorted(best, key=lambda unit: (-best[unit], unit))

    @cached_property
    def _parts(self) -> Parts:
        heads, table = self.retrieval_heads(), self.per_kv_head("induction", "max")
        ranks = {unit: float(len(heads) - rank) for rank, unit in enumerate(heads)}
        importances: Importances = tuple(
            tuple(ranks.get((layer, head), 0.0) for head in range(len(row))) for layer, row in enumerate(table)
        )
        allocator = FullHeads(importances, self.sinks + self.recent, len(heads))
        return Parts(Recency(self.sinks), allocator, action=Compensate())

    def parts(self) -> Parts:
        """See `Method.parts`."""
        return self._parts


def _top(table: Importances, share: float) -> list[tuple[int, int]]:
    """The best share of all units, rounded up; ties by lower index."""
    units = [(layer, head) for layer, row in enumerate(table) for head in range(len(row))]
    ranked = sorted(units, key=lambda unit: (-table[unit[0]][unit[1]], unit))
    return ranked[: count_of(share, len(units))] if share > 0 else []
