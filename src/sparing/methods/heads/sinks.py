"""Sink mass: how much of a head's attention goes to the first token (Xiao et al. 2023, arXiv:2309.17453).

Ranks: head.

    s[h] = mean over rows t >= 1 of A[h, t, 0],   0 = the first token that is no pad

Row 0 is left out: it can see nothing else. Cost: one forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.core.head_scorer import MeanScorer, register_scorer
from sparing.core.lens import AttentionCall, Lens
from sparing.core.samples import TextSample
from sparing.measures.batches import pad_left
from sparing.measures.heads import row_mean
from sparing.measures.watching import watch_rows


@register_scorer("sink_mass", family="attention", data="text", paper="2309.17453",
                 summary="attention paid to the first token")  # fmt: skip
@dataclass(frozen=True)
class SinkMass(MeanScorer):
    """Mean attention to the first token."""

    def observe(self, lens: Lens, batch: Sequence[TextSample]) -> Tensor:
        """See `MeanScorer.observe`."""
        ids, mask = pad_left([sample.ids for sample in batch])
        first = (~mask).sum(-1)

        def paid(call: AttentionCall, rows: slice, attention: Tensor) -> Tensor:
            places = first.to(attention.device).view(-1, 1, 1, 1).expand(*attention.shape[:3], 1)
            return attention.gather(-1, places).squeeze(-1)

        rows = watch_rows(lens, ids, mask, paid)
        later = torch.arange(ids.shape[1]) > first[:, None]
        return torch.stack([row_mean(layer, later) for layer in rows], dim=1)
