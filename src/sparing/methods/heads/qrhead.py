"""QRHead: heads through which a query finds the documents that answer it (Zhang et al. 2025, arXiv:2506.09944).

Ranks: head. Documents and a query stand in one prompt. Each head scores the documents by itself, with the calibration
and filter of in-context re-ranking (see `measures.documents`), per head and document:

    gold_mass:  score[h] = mean over samples of  sum over gold documents D of  score_h(D)
    ndcg:       score[h] = mean over samples of  nDCG@10 of the documents ranked by score_h

Cost: two forwards per sample, of which only the query's rows are looked at.

Deviations:
1. The documents are read twice (once with each query), not once with two endings; the numbers are the same.
2. Samples are made from planted facts; the paper detects heads on LongMemEval (gold mass) and Natural Questions (nDCG).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparing.core.head_scorer import MeanScorer, register_scorer
from sparing.core.lens import Lens
from sparing.core.samples import RankingSample
from sparing.errors import require
from sparing.measures.documents import document_scores, ndcg, query_attention


@register_scorer("qrhead", family="retrieval", data="ranking", paper="2506.09944",
                 summary="how well the head alone finds the documents that answer a query")  # fmt: skip
@dataclass(frozen=True)
class QRHead(MeanScorer):
    """Query-focused retrieval score.

    Attributes:
        by: "gold_mass" (calibrated attention to the gold documents) or "ndcg" (of the head's own ranking).
    """

    by: Literal["gold_mass", "ndcg"] = "gold_mass"

    def __post_init__(self) -> None:
        require(self.by in ("gold_mass", "ndcg"), "by", self.by, '"gold_mass" or "ndcg"')

    def observe(self, lens: Lens, batch: Sequence[RankingSample]) -> Tensor:
        """See `MeanScorer.observe`."""
        return torch.stack([self._one(lens, sample) for sample in batch])

    def _one(self, lens: Lens, sample: RankingSample) -> Tensor:
        real, null = (query_attention(lens, ids, sample.query_start) for ids in (sample.ids, sample.null_ids))
        scores = document_scores(real - null, sample.documents)
        if self.by == "ndcg":
            return ndcg(scores, sample.gold)
        return scores[..., list(sample.gold)].sum(-1)
