"""Attention span: how far back a head looks; local and global heads (Li et al. 2025, arXiv:2510.13554).

Ranks: head.

    d[h] = mean over response rows t of  Σ_s A[h, t, s] (t - s),  in tokens

Heads with the shortest spans are local, with the longest global. Cost: one forward, O(1) numbers per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.core.edits import Head
from sparing.core.head_scorer import MeanScorer, register_scorer
from sparing.core.lens import Lens
from sparing.core.samples import TextSample
from sparing.core.scores import Scores
from sparing.errors import require
from sparing.measures.batches import pad_left
from sparing.measures.heads import mean_distance, row_mean
from sparing.measures.watching import watch_rows


@register_scorer("attention_span", family="attention", data="text", paper="2510.13554",
                 summary="mean distance, in tokens, that the head looks back")  # fmt: skip
@dataclass(frozen=True)
class AttentionSpan(MeanScorer):
    """Mean backward distance of a head's attention."""

    def observe(self, lens: Lens, batch: Sequence[TextSample]) -> Tensor:
        """See `MeanScorer.observe`."""
        ids, mask = pad_left([sample.ids for sample in batch])
        spans = watch_rows(lens, ids, mask, mean_distance)
        counted = response_rows(mask, batch)
        return torch.stack([row_mean(layer, counted) for layer in spans], dim=1)


def response_rows(mask: Tensor, batch: Sequence[TextSample]) -> Tensor:
    """(B, T) bool: rows from each sample's response on, pads left out."""
    pads = (~mask).sum(-1)
    starts = pads + torch.tensor([sample.response for sample in batch])
    return torch.arange(mask.shape[1]) >= starts[:, None]


def local_and_global(spans: Scores, share: float = 0.3) -> tuple[list[Head], list[Head]]:
    """The `share` of heads with the shortest spans, and that with the longest (each at least one).

    Raises:
        ScoresMismatchError: scores over other units. InvalidInputError: a share outside (0, 0.5].
    """
    spans.require_axes("layer", "head")
    require(0 < share <= 0.5, "share", share, "a share in (0, 0.5]")
    ranked = [(unit[0], unit[1]) for unit in spans.ranked()]
    count = max(1, int(share * len(ranked) + 1e-9))
    return ranked[-count:][::-1], ranked[:count]
