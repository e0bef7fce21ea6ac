"""Sink mass: how much of a head's attention goes to the first token (Xiao et al. 2023, arXiv:2309.17453).

Ranks: head.

    s[h] = mean over rows i >= 1 of A[h, i, 0],   0 = the first token that is no pad

Row 0 is left out: it can see nothing else. Cost: one forward, O(n) memory per head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.core.head_scorer import MeanScorer, register_scorer
from sparing.core.lens import Attend, AttentionCall, Lens
from sparing.core.samples import TextSample
from sparing.measures.attention import row_tiles
from sparing.measures.batches import pad_left


@register_scorer("sink_mass", family="attention", data="text", paper="2309.17453",
                 summary="attention paid to the first token")  # fmt: skip
@dataclass(frozen=True)
class SinkMass(MeanScorer):
    """Mean attention to the first token."""

    def observe(self, lens: Lens, batch: Sequence[TextSample]) -> Tensor:
        """See `MeanScorer.observe`."""
        ids, mask = pad_left([sample.ids for sample in batch])
        first = (~mask).sum(-1)
        result = torch.zeros(len(batch), lens.num_layers, lens.num_heads)

        def watch(call: AttentionCall, attend: Attend) -> Tensor:
            at = first.to(call.keys.device).view(-1, 1, 1, 1).expand(-1, lens.num_heads, 1, 1)
            total = torch.zeros(len(batch), lens.num_heads, device=call.keys.device)
            for rows, attention in row_tiles(call):
                paid = attention.gather(-1, at.expand(-1, -1, attention.shape[2], 1)).squeeze(-1)
                later = torch.arange(ids.shape[1], device=paid.device)[rows] > at[:, :, 0]
                total += (paid * later).sum(-1)
            result[:, call.layer] = (total / (mask.sum(-1, keepdim=True).to(total) - 1)).cpu()
            return attend(call)

        with torch.no_grad(), lens.hooked(attention=watch):
            lens.forward(ids, mask, last=1)
        return result
