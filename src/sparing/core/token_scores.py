"""Scores: a number for every unit, with what is needed to choose by it. Higher = keep, always."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Unit = Literal[
    "kv_token", "block", "head", "kv_head", "layer", "neuron", "expert", "weight", "rank",
    "prompt_token", "document", "visual_token", "sample",
]  # fmt: skip


@dataclass(frozen=True)
class TokenScores:
    """The scores of one layer's KV tokens.

    Attributes:
        values: (rows, kv_heads, tokens) float32, finite where valid; higher = keep.
        valid: (rows, kv_heads, tokens) bool; False for pads and empty slots, which are never kept or counted.
        guard: (rows, kv_heads, tokens) int64 >= 0; above 0 the token is protected. Protected tokens are kept
            before all others, the larger guard first, so a budget smaller than the protection is still exact.
        layer: its number among all attention layers of the model; None where that is its place in the list.
        heads: (rows, kv_heads) how much each head matters for this prompt, if the scorer says so (`rank_heads`).
    """

    values: Tensor
    valid: Tensor
    guard: Tensor
    layer: int | None = None
    heads: Tensor | None = None

    @property
    def order(self) -> Tensor:
        """(rows, kv_heads, tokens) int64: token indices, best first; invalid ones last, ties by lower index."""
        values = self.values.masked_fill(~self.valid, -torch.inf)
        by_value = torch.sort(values, dim=-1, descending=True, stable=True).indices
        guard = self.guard.masked_fill(~self.valid, -1).gather(-1, by_value)
        by_guard = torch.sort(guard, dim=-1, descending=True, stable=True).indices
        return by_value.gather(-1, by_guard)


def guard_ends(valid: Tensor, positions: Tensor, pads: Tensor, first: int | Tensor, recent: int | Tensor) -> Tensor:
    """Protect the first and the most recent tokens of every row and head.

    Args:
        valid: (rows, kv_heads, tokens) bool. positions: same shape, cache positions, in any order.
        pads: (rows,) left pads per row.
        first: how many tokens at the start of the sequence are protected (attention sinks); one number or (rows,).
        recent: how many tokens at its end are protected, likewise.

    Returns:
        (rows, kv_heads, tokens) int64 guards: the first above all (earliest highest), then the newest.
    """
    first, recent = (torch.as_tensor(n, device=valid.device).view(-1, 1, 1) for n in (first, recent))
    newest = positions.masked_fill(~valid, -1).amax(-1, keepdim=True)
    guard = (recent - (newest - positions)).clamp_min(0)
    from_start = (first - (positions - pads[:, None, None])).clamp_min(0)
    guard = torch.where(from_start > 0, from_start + recent, guard)
    return guard.masked_fill(~valid, 0)


def select(scores: TokenScores, counts: Tensor) -> list[list[Tensor]]:
    """The tokens to keep: the best `counts[row, head]` of every row and head.

    Args:
        scores: the layer's scores.
        counts: (rows, kv_heads) integers, at most the number of valid tokens.

    Returns:
        [row][kv_head] → sorted int64 token indices.
    """
    assert bool((counts.to(scores.valid.device) <= scores.valid.sum(-1)).all()), "more tokens asked for than are valid"
    order = scores.order
    number = counts.tolist()
    return [
        [order[row, head, : number[row][head]].sort().values for head in range(order.shape[1])]
        for row in range(order.shape[0])
    ]
