"""Focus: how little of what a head may see it looks at, from the entropy of its rows.

Ranks: head.

    score[h] = mean over rows t of  1 - H(A[h, t]) / ln n_t,   H(p) = - Σ p ln p,  n_t = keys that row t may see

0 for a head that attends to everything alike, 1 for one that looks at a single token. Rows that see one key only are
left out. Entropy itself is (1 - score) ln n. Cost: one forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.core.head_scorer import MeanScorer, register_scorer
from sparing.core.lens import Lens
from sparing.core.samples import TextSample
from sparing.measures.batches import pad_left
from sparing.measures.heads import focus, row_mean
from sparing.measures.watching import watch_rows


@register_scorer("focus", family="attention", data="text", paper="-",
                 summary="1 - relative entropy of the head's rows: 0 uniform, 1 one token")  # fmt: skip
@dataclass(frozen=True)
class Focus(MeanScorer):
    """Mean focus of a head's rows."""

    def observe(self, lens: Lens, batch: Sequence[TextSample]) -> Tensor:
        """See `MeanScorer.observe`."""
        ids, mask = pad_left([sample.ids for sample in batch])
        rows = watch_rows(lens, ids, mask, focus)
        return torch.stack([row_mean(layer, mask) for layer in rows], dim=1)
