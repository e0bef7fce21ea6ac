"""Attention of tokens that were run after a prompt, looking back at it (primitive P9)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sparing.core.scorer import KeyValues, Queries
from sparing.measures.attention import attention_tiles
from sparing.measures.pooling import over_group


def strongest_attention(queries: Queries, stored: KeyValues) -> Tensor:
    """The most that any of the given rows, of any query head of the group, pays to each key: (B, H, N) float32.

    0 where not valid. Rows that are pads do not count.
    """
    batch, query_heads = queries.states.shape[:2]
    best = torch.zeros(batch, query_heads, stored.keys.shape[2], device=queries.states.device)
    for rows, visible, probabilities in attention_tiles(queries, stored):
        is_pad = ~queries.valid[:, None, rows, None]
        most = probabilities.masked_fill(is_pad, 0.0).amax(2)
        best[..., :visible] = torch.maximum(best[..., :visible], most)
    return over_group(best, stored.keys.shape[1], "max")


def strongest_among(queries: Queries, stored: KeyValues, members: Tensor) -> Tensor:
    """As `strongest_attention`, with a softmax over some of the keys only: (B, H, N), 0 for all others.

    Args:
        members: (B, H, N) bool, the keys that there are. Only these are read, so the cost is theirs.
    """
    members = members & stored.valid
    slots = torch.sort(members, dim=-1, descending=True, stable=True).indices[..., : int(members.sum(-1).max())]
    chosen = replace(
        stored,
        keys=_gather(stored.keys, slots), values=_gather(stored.values, slots), valid=members.gather(-1, slots),
        positions=stored.positions.gather(-1, slots),
        bias=None if stored.bias is None else stored.bias.gather(-1, slots),
    )  # fmt: skip
    found = strongest_attention(queries, chosen)
    return torch.zeros(members.shape, device=found.device).scatter(-1, slots, found)


def _gather(x: Tensor, slots: Tensor) -> Tensor:
    return x.gather(2, slots[..., None].expand(-1, -1, -1, x.shape[-1]))
