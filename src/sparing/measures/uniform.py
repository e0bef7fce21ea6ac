"""Heads that attend to everything alike: the mean of the values that each row may see, without any map.

A row sees a run of neighbouring keys (causality, a sliding window, left pads: all leave one run), so its mean is a
difference of two prefix sums of the values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparing.core.lens import AttentionCall
from sparing.measures.attention import ROWS_PER_TILE


def uniform_attention(call: AttentionCall) -> Tensor:
    """z[t] = (1 / |S_t|) Σ_{s ∈ S_t} v_s, with S_t the keys that row t may see.

    Returns:
        (B, T, Hq, Dv) in the values' dtype; 0 where a row sees nothing. Prefix sums are in float64, so a mean over n
        values is off by n · 2^-53 of their size.
    """
    batch, heads, count = call.queries.shape[:3]
    kv_heads, stored, dim = call.values.shape[1:]
    sums = torch.zeros(batch, kv_heads, stored + 1, dim, dtype=torch.float64, device=call.values.device)
    torch.cumsum(call.values.double(), dim=2, out=sums[:, :, 1:])
    out = call.values.new_empty(batch, count, heads, dim)
    for start in range(0, count, ROWS_PER_TILE):
        rows = slice(start, min(start + ROWS_PER_TILE, count))
        seen = call.may_see(rows)[:, 0].expand(batch, -1, -1)  # (B, rows, S)
        number = seen.sum(-1)
        first = seen.int().argmax(-1)
        is_run = bool((seen.flip(-1).int().argmax(-1) == stored - first - number)[number > 0].all())
        if is_run:
            total = _at(sums, first + number) - _at(sums, first)
        else:  # a pattern of its own, e.g. strided: add up what is seen
            total = seen[:, None].double() @ call.values.double()
        mean = total / number.clamp_min(1)[:, None, :, None]
        mean = mean.masked_fill((number == 0)[:, None, :, None], 0.0)
        out[:, rows] = mean.repeat_interleave(heads // kv_heads, dim=1).transpose(1, 2).to(out.dtype)
    return out


def _at(sums: Tensor, index: Tensor) -> Tensor:
    """(B, H, rows, D) prefix sums at (B, rows) places."""
    places = index[:, None, :, None].expand(-1, sums.shape[1], -1, sums.shape[3])
    return sums.gather(2, places)
