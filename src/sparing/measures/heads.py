"""Numbers about rows of attention: how far back they look, how spread they are.

All take the call and a tile of its rows, (B, Hq, rows, S), from `measures.attention.row_tiles`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparing.core.lens import AttentionCall


def distances(call: AttentionCall, rows: slice) -> Tensor:
    """(rows, S) float32: t - s for the rows t and keys s of a call; negative for keys in a row's future."""
    at = torch.arange(call.queries.shape[2], device=call.queries.device)[rows] + call.first
    return (at[:, None] - torch.arange(call.keys.shape[2], device=at.device)).float()


def mean_distance(call: AttentionCall, rows: slice, attention: Tensor, clip: float = float("inf")) -> Tensor:
    """(B, Hq, rows) Σ_s A_ts · min(t - s, clip)."""
    distance = distances(call, rows).clamp(0, clip)
    return (attention * distance.to(attention)).sum(-1)


def focus(call: AttentionCall, rows: slice, attention: Tensor) -> Tensor:
    """(B, Hq, rows) 1 - H(A_t) / ln n_t, with n_t the keys that row t may see: 0 uniform, 1 on a single key.

    nan for rows that may see fewer than two keys. A row that gives part of its attention to a learned sink outside of
    the keys (gpt-oss) is normalised over the keys first.
    """
    count = call.may_see(rows).sum(-1).to(attention)
    share = attention / attention.sum(-1, keepdim=True).clamp_min(torch.finfo(attention.dtype).tiny)
    entropy = -torch.special.xlogy(share, share).sum(-1)
    return torch.where(count >= 2, 1 - entropy / count.clamp_min(2).log(), torch.nan)


def row_mean(values: Tensor, counted: Tensor) -> Tensor:
    """(B, Hq) mean of (B, Hq, T) over the (B, T) rows that are counted; nan where none is."""
    counted = counted[:, None].to(values.device) & ~values.isnan()
    return values.where(counted, 0.0).sum(-1) / counted.sum(-1)
