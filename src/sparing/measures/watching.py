"""Watching a forward: one number per row, head and layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparing.core.lens import Attend, AttentionCall, Lens
from sparing.measures.attention import row_tiles

# (call, rows, attention of these rows) → (B, Hq, rows)
RowNumber = Callable[[AttentionCall, slice, Tensor], Tensor]


def watch_rows(lens: Lens, ids: Tensor, mask: Tensor, number: RowNumber) -> Tensor:
    """(L, B, Hq, T) float32: a number for every row of attention of a batch, read once."""
    found = torch.zeros(lens.num_layers, ids.shape[0], lens.num_heads, ids.shape[1])

    def watch(call: AttentionCall, attend: Attend) -> Tensor:
        for rows, attention in row_tiles(call):
            found[call.layer, :, :, rows] = number(call, rows, attention).float().cpu()
        return attend(call)

    with torch.no_grad(), lens.hooked(attention=watch):
        lens.forward(ids, mask, last=1)
    return found
